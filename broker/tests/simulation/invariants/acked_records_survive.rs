//! What was acknowledged with acks=all is in the log for ever, at the offset that its producer was
//! told. (That it is there once is `refused_stays_out`.)

use std::collections::BTreeMap;

use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

use super::replicas_agree::ReplicasAgree;
use super::{BatchKey, Stored};

#[derive(Default)]
pub struct AckedRecordsSurvive {
    acked: BTreeMap<(RaftGroupId, Offset), BatchKey>,
}

impl AckedRecordsSurvive {
    pub fn acked(
        &mut self,
        group: RaftGroupId,
        base_offset: Offset,
        key: BatchKey,
    ) -> Result<(), String> {
        match self.acked.insert((group, base_offset), key) {
            Some(other) if other != key => Err(format!(
                "two batches were acknowledged at offset {base_offset} of group {group}"
            )),
            _ => Ok(()),
        }
    }

    /// A batch was committed.
    pub fn committed(&self, group: RaftGroupId, batch: &Stored) -> Result<(), String> {
        match self.acked.get(&(group, batch.base_offset)) {
            Some(key) if *key != batch.key => Err(format!(
                "acknowledged at {} of group {group}, but another batch was committed there: {batch:?}",
                batch.base_offset
            )),
            _ => Ok(()),
        }
    }

    /// Compares with the whole log at the end.
    pub fn finish(&self, committed: &ReplicasAgree) -> Result<(), String> {
        for ((group, offset), key) in &self.acked {
            let log = committed.log(*group);
            let at = log.partition_point(|batch| batch.next_offset <= *offset);
            let found = log.get(at);
            if found.is_none_or(|batch| batch.key != *key || batch.base_offset != *offset) {
                return Err(format!(
                    "an acknowledged batch is lost: group {group} offset {offset}: there is {found:?}"
                ));
            }
        }
        Ok(())
    }

    pub fn count(&self) -> usize {
        self.acked.len()
    }
}
