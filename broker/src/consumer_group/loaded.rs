//! Reading a log of group records: what it says about its groups.
//!
//! Invariant: a record that makes no sense is left out with a warning and stops nothing; a batch
//! whose checksum does not match stops the reading.

use std::collections::HashMap;

use bytes::Bytes;
use chronik_types::offset::Offset;
use chronik_types::record_batch::BatchHeader;

use super::batch::{self, Record, UnreadableBatch};
use super::offsets::Offsets;
use super::records::{GroupValue, Key, OffsetValue};

/// What a log says about its groups.
#[derive(Default)]
pub(super) struct Loaded {
    pub groups: HashMap<String, (Option<GroupValue>, Offsets)>,
}

impl Loaded {
    /// Takes over what a batch of the log says; the offset after it.
    pub fn replay(&mut self, bytes: &Bytes) -> Result<Offset, UnreadableBatch> {
        let (next, records) = read_batch(bytes)?;
        for (offset, record) in records {
            match Key::parse(&record.key) {
                Ok(Key::Offset {
                    group,
                    topic,
                    partition,
                }) => {
                    let (_, offsets) = self.groups.entry(group).or_default();
                    replay_offset(offsets, &topic, partition, record.value, offset);
                }
                Ok(Key::Group { group }) => self.replay_group(group, record.value, offset),
                Ok(Key::Unknown { version }) => {
                    tracing::warn!(%offset, version, "record key of an unknown version is skipped");
                }
                Err(error) => {
                    tracing::warn!(%offset, %error, "record of a consumer group is skipped");
                }
            }
        }
        self.groups
            .retain(|_, (value, offsets)| value.is_some() || !offsets.is_empty());
        Ok(next)
    }

    fn replay_group(&mut self, group: String, value: Option<Bytes>, offset: Offset) {
        let slot = &mut self.groups.entry(group).or_default().0;
        match value.map(|value| GroupValue::parse(&value)).transpose() {
            Ok(value) => *slot = value,
            Err(error) => {
                tracing::warn!(%offset, %error, "record of a consumer group is skipped");
            }
        }
    }

    pub fn group_count(&self) -> usize {
        self.groups.len()
    }
}

pub(super) fn replay_offset(
    offsets: &mut Offsets,
    topic: &str,
    partition: i32,
    value: Option<Bytes>,
    written_at: Offset,
) {
    match value.map(|value| OffsetValue::parse(&value)).transpose() {
        Ok(Some(value)) => offsets.committed(topic, partition, value, written_at),
        Ok(None) => offsets.removed(topic, partition, written_at),
        Err(error) => {
            tracing::warn!(offset = %written_at, %error, "committed offset is skipped");
        }
    }
}

/// The records of a batch and the offset after it. A compressed batch is none of ours and is left
/// out: somebody else wrote to the topic, and that must not stop the groups.
pub(super) fn read_batch(
    bytes: &Bytes,
) -> Result<(Offset, Vec<(Offset, Record)>), UnreadableBatch> {
    let header = BatchHeader::parse(bytes)?;
    match batch::decode(bytes) {
        Ok((header, records)) => Ok((header.next_offset(), records)),
        Err(UnreadableBatch::Invalid(error)) => Err(error.into()),
        Err(error) => {
            tracing::warn!(offset = %header.base_offset, %error, "batch is skipped");
            Ok((header.next_offset(), Vec::new()))
        }
    }
}
