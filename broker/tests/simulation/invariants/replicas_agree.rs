//! Below their high watermarks all replicas of a partition have the same bytes, at every time and
//! after every restart; offsets have no gaps, and leader epochs never go down.

use std::collections::BTreeMap;

use chronik_types::id::{BrokerId, RaftGroupId};
use chronik_types::offset::Offset;

use super::Stored;

/// The committed log of each group, as the first replica to commit had it.
#[derive(Default)]
pub struct ReplicasAgree {
    logs: BTreeMap<RaftGroupId, Vec<Stored>>,
}

impl ReplicasAgree {
    /// A replica has these batches below its high watermark. Gives those that are new.
    pub fn committed(
        &mut self,
        group: RaftGroupId,
        broker: BrokerId,
        batches: &[Stored],
    ) -> Result<Vec<Stored>, String> {
        let log = self.logs.entry(group).or_default();
        let mut new = Vec::new();
        for batch in batches {
            let end = log.last().map_or(Offset::ZERO, |last| last.next_offset);
            if batch.base_offset < end {
                let at = log.partition_point(|other| other.next_offset <= batch.base_offset);
                if log[at] != *batch {
                    return Err(format!(
                        "replicas differ: group {group}: broker {broker} has {batch:?} where \
                         another one committed {:?}",
                        log[at]
                    ));
                }
                continue;
            }
            if batch.base_offset != end {
                return Err(format!(
                    "a gap in the log: group {group}: broker {broker} has a committed batch at {} \
                     where {end} is due",
                    batch.base_offset
                ));
            }
            if log
                .last()
                .is_some_and(|l| l.leader_epoch > batch.leader_epoch)
            {
                return Err(format!(
                    "the leader epoch goes down: group {group}: broker {broker} has {batch:?} \
                     after {:?}",
                    log.last()
                ));
            }
            log.push(*batch);
            new.push(*batch);
        }
        Ok(new)
    }

    pub fn log(&self, group: RaftGroupId) -> &[Stored] {
        self.logs.get(&group).map_or(&[], |log| log)
    }

    /// End of what any replica has committed.
    pub fn end(&self, group: RaftGroupId) -> Offset {
        self.log(group)
            .last()
            .map_or(Offset::ZERO, |last| last.next_offset)
    }
}
