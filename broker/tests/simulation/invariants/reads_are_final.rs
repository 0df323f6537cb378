//! What a consumer has read is what is committed, in order and without gaps; nothing of it is ever
//! taken back.

use std::collections::BTreeMap;

use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

use super::Stored;
use super::replicas_agree::ReplicasAgree;

#[derive(Default)]
pub struct ReadsAreFinal {
    /// Read before any replica was seen to have it committed.
    unconfirmed: BTreeMap<(RaftGroupId, Offset), Stored>,
}

impl ReadsAreFinal {
    /// A consumer that is at `from` has read these.
    pub fn read(
        &mut self,
        group: RaftGroupId,
        from: Offset,
        batches: &[Stored],
    ) -> Result<(), String> {
        let mut expected = None;
        for batch in batches {
            let is_next = match expected {
                None => batch.base_offset <= from && from < batch.next_offset,
                Some(expected) => batch.base_offset == expected,
            };
            if !is_next {
                return Err(format!(
                    "a consumer at {from} of group {group} read {batch:?} after {expected:?}"
                ));
            }
            expected = Some(batch.next_offset);
            self.unconfirmed.insert((group, batch.base_offset), *batch);
        }
        Ok(())
    }

    /// Compares with what is committed by now.
    pub fn confirm(&mut self, committed: &ReplicasAgree) -> Result<(), String> {
        let mut wrong = None;
        self.unconfirmed.retain(|(group, offset), read| {
            let log = committed.log(*group);
            let at = log.partition_point(|other| other.next_offset <= *offset);
            match log.get(at) {
                None => true,
                Some(other) => {
                    if other != read {
                        wrong = Some(format!(
                            "what was read is not what is committed: group {group}: read {read:?}, \
                             committed {other:?}"
                        ));
                    }
                    false
                }
            }
        });
        wrong.map_or(Ok(()), Err)
    }

    /// At the end everything that was read is committed.
    pub fn finish(&self) -> Result<(), String> {
        match self.unconfirmed.first_key_value() {
            Some(((group, _), read)) => Err(format!(
                "read, but never committed: group {group}: {read:?}"
            )),
            None => Ok(()),
        }
    }
}
