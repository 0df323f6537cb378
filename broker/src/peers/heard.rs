//! Which leaders this process has heard from, so that a leadership known only from disk, or won by
//! a process that has died since, is not taken for a living one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use chronik_types::id::{BrokerId, RaftGroupId};
use uuid::Uuid;

use super::endpoint::RaftEndpoint;

/// A leader that spoke to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeardLeader {
    pub term: u64,
    pub broker: BrokerId,
    /// The process that spoke.
    pub incarnation: Uuid,
}

/// The last leader heard per group.
#[derive(Default)]
pub struct Heard {
    leaders: Mutex<HashMap<RaftGroupId, HeardLeader>>,
}

impl Heard {
    /// `endpoint` has just accepted a leader's message that came from `broker`.
    pub(super) fn record(
        &self,
        group: RaftGroupId,
        endpoint: &dyn RaftEndpoint,
        broker: BrokerId,
        incarnation: Uuid,
    ) {
        let vote = endpoint.current_vote();
        if vote.committed && vote.leader_id.voted_for.broker_id == broker {
            let leader = HeardLeader {
                term: vote.leader_id.term,
                broker,
                incarnation,
            };
            self.lock().insert(group, leader);
        }
    }

    pub fn leader(&self, group: RaftGroupId) -> Option<HeardLeader> {
        self.lock().get(&group).copied()
    }

    pub fn forget(&self, group: RaftGroupId) {
        self.lock().remove(&group);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RaftGroupId, HeardLeader>> {
        self.leaders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
