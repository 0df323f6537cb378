//! The checkpoint: for every log what the WAL need not say any more.
//!
//! Invariant: checkpoint, segments up to the sizes it names, and the WAL from the place it names are
//! together the whole state. It is replaced at once by a rename, so a crash leaves the old or the new.

use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::crc32c;
use uuid::Uuid;

use crate::codec::Reader;
use crate::disk::{Disk, read_full_at};
use crate::entry::TermStart;
use crate::error::{OpenError, StorageError};
use crate::partition_log::state::{LogState, ReplicaState};
use crate::segment::Segment;
use crate::wal::recovery::WalStart;

const MAGIC: &[u8; 8] = b"CHRCHKP\x01";
/// Magic and checksum.
const PREFIX_SIZE: usize = 12;
/// Least bytes of each repeated part, to bound what a count may reserve.
const GROUP_SIZE_MIN: usize = 48;
const SEGMENT_SIZE: usize = 88;
const TERM_START_SIZE: usize = 24;
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub storage_id: Uuid,
    pub wal: WalStart,
    /// Nothing was written after this checkpoint if the WAL ends before this record.
    pub clean_at_record: Option<u64>,
    pub groups: Vec<GroupCheckpoint>,
}

/// A log as the checkpoint knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupCheckpoint {
    pub group: RaftGroupId,
    pub first_index: u64,
    pub flushed_next: u64,
    pub committed_next: u64,
    pub replay_from_record: u64,
    pub segments: Vec<Segment>,
    /// Of the flushed entries.
    pub term_starts: Vec<TermStart>,
    pub vote: Option<Bytes>,
    pub replica_state: Option<ReplicaState>,
}

impl GroupCheckpoint {
    /// All that is flushed must be fsynced.
    pub fn capture(group: RaftGroupId, state: &mut LogState) -> Self {
        let starts = state.term_starts.iter();
        let term_starts = starts
            .filter(|s| s.first_index < state.flushed_next)
            .copied()
            .collect();
        GroupCheckpoint {
            group,
            // An empty log has no place yet.
            first_index: if state.segments.is_empty() {
                0
            } else {
                state.first_index
            },
            flushed_next: if state.segments.is_empty() {
                0
            } else {
                state.flushed_next
            },
            committed_next: state.committed_next.min(state.durable_next),
            replay_from_record: state.replay_from_record,
            segments: state.segments.clone(),
            term_starts,
            vote: state.vote.clone(),
            replica_state: state.checkpointed_replica_state().cloned(),
        }
    }

    pub fn into_state(self, segment_bytes: u64) -> LogState {
        let flushed_next = self.flushed_next;
        LogState {
            tail_first: flushed_next,
            tail_base: self
                .segments
                .last()
                .map_or(Offset::ZERO, |segment| segment.next_offset),
            first_index: self.first_index,
            flushed_next,
            ready_next: flushed_next,
            durable_next: flushed_next,
            // Clamped when the WAL is read.
            committed_next: self.committed_next.max(flushed_next),
            segments: self.segments,
            term_starts: self.term_starts,
            vote: self.vote,
            durable_replica_state: self.replica_state.clone(),
            replica_state: self.replica_state,
            replay_from_record: self.replay_from_record,
            segment_bytes,
            ..LogState::default()
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        for number in [
            self.group.0,
            self.first_index,
            self.flushed_next,
            self.committed_next,
            self.replay_from_record,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&(self.segments.len() as u32).to_le_bytes());
        for segment in &self.segments {
            encode_segment(out, segment);
        }
        out.extend_from_slice(&(self.term_starts.len() as u32).to_le_bytes());
        for start in &self.term_starts {
            out.extend_from_slice(&start.term.to_le_bytes());
            out.extend_from_slice(&start.first_index.to_le_bytes());
            out.extend_from_slice(&start.first_offset.0.to_le_bytes());
        }
        encode_bytes(out, self.vote.as_ref());
        encode_bytes(out, self.replica_state.as_ref().map(|state| &state.state));
        if let Some(state) = &self.replica_state {
            out.extend_from_slice(&state.index.to_le_bytes());
        }
    }

    fn decode(reader: &mut Reader<'_>, left: usize) -> Option<Self> {
        let group = RaftGroupId(reader.u64()?);
        let first_index = reader.u64()?;
        let flushed_next = reader.u64()?;
        let committed_next = reader.u64()?;
        let replay_from_record = reader.u64()?;
        let count = bounded(reader.u32()?, left, SEGMENT_SIZE)?;
        let segments = (0..count)
            .map(|_| decode_segment(reader))
            .collect::<Option<_>>()?;
        let count = bounded(reader.u32()?, left, TERM_START_SIZE)?;
        let term_starts = (0..count)
            .map(|_| {
                Some(TermStart {
                    term: reader.u64()?,
                    first_index: reader.u64()?,
                    first_offset: Offset(reader.i64()?),
                })
            })
            .collect::<Option<_>>()?;
        let vote = decode_bytes(reader)?;
        let replica_state = match decode_bytes(reader)? {
            Some(state) => Some(ReplicaState {
                index: reader.u64()?,
                state,
            }),
            None => None,
        };
        Some(GroupCheckpoint {
            group,
            first_index,
            flushed_next,
            committed_next,
            replay_from_record,
            segments,
            term_starts,
            vote,
            replica_state,
        })
    }
}

impl Checkpoint {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; PREFIX_SIZE];
        out[..MAGIC.len()].copy_from_slice(MAGIC);
        out.extend_from_slice(self.storage_id.as_bytes());
        let wal = self.wal;
        for number in [wal.sequence, wal.frame, wal.record, wal.confirmed_frame] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(u8::from(self.clean_at_record.is_some()));
        out.extend_from_slice(&self.clean_at_record.unwrap_or(0).to_le_bytes());
        out.extend_from_slice(&(self.groups.len() as u32).to_le_bytes());
        for group in &self.groups {
            group.encode(&mut out);
        }
        let crc = crc32c(&out[PREFIX_SIZE..]);
        out[MAGIC.len()..PREFIX_SIZE].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut reader = Reader::new(bytes);
        if reader.take(MAGIC.len()) != Some(MAGIC) {
            return Err("the file is no checkpoint");
        }
        let crc = reader.u32().ok_or("the file is cut short")?;
        if crc32c(&bytes[PREFIX_SIZE..]) != crc {
            return Err("the checkpoint's checksum is wrong");
        }
        Self::decode_fields(&mut reader, bytes.len()).ok_or("the checkpoint makes no sense")
    }

    fn decode_fields(reader: &mut Reader<'_>, left: usize) -> Option<Self> {
        let storage_id = Uuid::from_slice(reader.take(16)?).ok()?;
        let wal = WalStart {
            sequence: reader.u64()?,
            frame: reader.u64()?,
            record: reader.u64()?,
            confirmed_frame: reader.u64()?,
        };
        let is_clean = reader.u8()? != 0;
        let clean_at_record = Some(reader.u64()?).filter(|_| is_clean);
        let count = bounded(reader.u32()?, left, GROUP_SIZE_MIN)?;
        let groups = (0..count)
            .map(|_| GroupCheckpoint::decode(reader, left))
            .collect::<Option<_>>()?;
        let checkpoint = Checkpoint {
            storage_id,
            wal,
            clean_at_record,
            groups,
        };
        reader.is_at_end().then_some(checkpoint)
    }

    /// Replaces the checkpoint of the storage in `dir`; durable when this returns.
    pub fn write(&self, disk: &dyn Disk, dir: &Path) -> Result<(), StorageError> {
        let temporary = dir.join("checkpoint.new");
        let write = || -> io::Result<()> {
            let bytes = self.encode();
            let file = disk.open(&temporary, true)?;
            file.set_size(0)?;
            file.write_at(&[IoSlice::new(&bytes)], 0)?;
            file.sync_data()?;
            disk.rename(&temporary, &path_of(dir))?;
            disk.sync_dir(dir)
        };
        write().map_err(|e| StorageError::io("cannot write", &path_of(dir), e))
    }

    /// The checkpoint of the storage in `dir`; `None` if none was ever written.
    pub fn read(disk: &dyn Disk, dir: &Path) -> Result<Option<Self>, OpenError> {
        let path = path_of(dir);
        let read = || -> io::Result<Vec<u8>> {
            let file = disk.open(&path, false)?;
            let size = usize::try_from(file.size()?).map_err(io::Error::other)?;
            let mut bytes = vec![0; size];
            let count = read_full_at(&*file, &mut bytes, 0)?;
            bytes.truncate(count);
            Ok(bytes)
        };
        let bytes = match read() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(OpenError::Io {
                    operation: "cannot read",
                    file: path,
                    source,
                });
            }
        };
        Checkpoint::decode(&bytes)
            .map(Some)
            .map_err(|why| OpenError::Corrupt {
                file: path,
                position: 0,
                why: why.to_owned(),
            })
    }
}

fn path_of(dir: &Path) -> PathBuf {
    dir.join("checkpoint")
}

fn bounded(count: u32, left: usize, size_min: usize) -> Option<usize> {
    let count = usize::try_from(count).ok()?;
    (count <= left / size_min).then_some(count)
}

fn encode_bytes(out: &mut Vec<u8>, bytes: Option<&Bytes>) {
    let length = bytes.map_or(NONE, |bytes| bytes.len() as u32);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes.map_or(&[], |bytes| bytes));
}

fn decode_bytes(reader: &mut Reader<'_>) -> Option<Option<Bytes>> {
    match reader.u32()? {
        NONE => Some(None),
        length => Some(Some(Bytes::copy_from_slice(reader.take(length as usize)?))),
    }
}

fn encode_segment(out: &mut Vec<u8>, segment: &Segment) {
    for number in [segment.base_offset.0, segment.next_offset.0] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    for number in [
        segment.first_index,
        segment.next_index,
        segment.log_bytes,
        segment.slots,
        segment.offset_index_entries,
        segment.time_index_entries,
        segment.unindexed_bytes,
    ] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    for number in [segment.max_timestamp, segment.indexed_timestamp] {
        out.extend_from_slice(&number.to_le_bytes());
    }
}

fn decode_segment(reader: &mut Reader<'_>) -> Option<Segment> {
    Some(Segment {
        base_offset: Offset(reader.i64()?),
        next_offset: Offset(reader.i64()?),
        first_index: reader.u64()?,
        next_index: reader.u64()?,
        log_bytes: reader.u64()?,
        slots: reader.u64()?,
        offset_index_entries: reader.u64()?,
        time_index_entries: reader.u64()?,
        unindexed_bytes: reader.u64()?,
        max_timestamp: reader.i64()?,
        indexed_timestamp: reader.i64()?,
    })
}

#[cfg(test)]
#[path = "checkpoint_test.rs"]
mod tests;
