//! In one leader epoch of a partition at most one process ever leads.

use std::collections::BTreeMap;

use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::{BrokerId, RaftGroupId};

/// A process: its broker, and which one of it.
type Leader = (BrokerId, u64);

#[derive(Default)]
pub struct OneLeaderPerEpoch {
    leaders: BTreeMap<(RaftGroupId, LeaderEpoch), Leader>,
}

impl OneLeaderPerEpoch {
    /// A replica takes itself for the leader. True: for the first time.
    pub fn leads(
        &mut self,
        group: RaftGroupId,
        epoch: LeaderEpoch,
        leader: Leader,
    ) -> Result<bool, String> {
        let is_new = !self.leaders.contains_key(&(group, epoch));
        let first = *self.leaders.entry((group, epoch)).or_insert(leader);
        if first != leader {
            return Err(format!(
                "two leaders in one epoch: group {group} epoch {epoch}: {first:?} and {leader:?} \
                 (broker, process)"
            ));
        }
        Ok(is_new)
    }
}
