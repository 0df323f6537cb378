//! A replica without its Raft: when it may rest, and what its log says of it meanwhile.
//!
//! Invariant: it is what Raft would say if it were started from this log.

use std::collections::BTreeSet;

use chronik_storage::{LogEntry, Payload};
use chronik_types::id::ReplicaId;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft::vote::RaftLeaderId;

use super::{Engine, Seat, epoch};
use crate::replica::log_store::durably;
use crate::replica::raft_config::{LeaderId, Membership, Raft, Vote};
use crate::replica::{Leadership, OpenError, codec};

impl Engine {
    /// Writes the group's first membership into an empty log, as Raft does when it is initialized, but
    /// without the election that it would start. False: an instance is open, which must do it.
    pub async fn found(&self, voters: BTreeSet<ReplicaId>) -> Result<bool, OpenError> {
        let _turn = self.turn.lock().await;
        if !matches!(self.lock().seat, Seat::Empty) {
            return Ok(false);
        }
        if self.log.last_entry_id().is_some() {
            return Ok(true);
        }
        if !voters.contains(&self.replica_id) {
            let why = "the replica is not among the voters";
            return Err(OpenError::Initialize(why.to_owned()));
        }
        let membership = Membership::new_with_defaults(vec![voters], []);
        let first = LogEntry {
            index: 0,
            term: 0,
            payload: Payload::Membership(codec::encode_membership(&membership)),
        };
        durably(|on_durable| self.log.append(vec![first], on_durable))
            .await
            .map_err(|error| OpenError::Initialize(error.to_string()))?;
        Ok(true)
    }

    /// The vote that the replica holds, as its Raft would start with it.
    pub fn vote(&self) -> Vote {
        let inner = self.lock();
        match &inner.seat {
            Seat::Open(running) => running.raft.server_metrics().borrow_watched().vote,
            _ => self.held_at_rest(),
        }
    }

    /// It follows a leader, and all that it has is durable, committed and applied; and everybody
    /// here knows so.
    pub(super) fn is_settled(&self, raft: &Raft) -> bool {
        let published = *self.state.leadership.borrow();
        {
            let metrics = raft.server_metrics();
            let metrics = metrics.borrow_watched();
            let follows = matches!(metrics.state, ServerState::Follower | ServerState::Learner);
            let leader = metrics
                .current_leader
                .filter(|leader| *leader != metrics.id);
            if !follows
                || leader.is_none()
                || published.leader != leader
                || u64::try_from(published.leader_epoch.0) != Ok(metrics.vote.leader_id.term)
            {
                return false;
            }
            if Some(metrics.vote) != self.stored_vote() {
                return false;
            }
        }
        let last = self.log.last_entry_id();
        let index = last.map(|(index, _)| index);
        last == self.state.applied_id()
            && index == self.log.durable_index()
            && index == self.log.committed()
    }

    /// The last membership in the log, and whether it is applied, if no Raft has to be asked for it.
    pub fn membership_at_rest(&self) -> Option<(Membership, bool)> {
        let last = self.log.last_entry_id().map(|(index, _)| index)?;
        let unapplied = self.applies_at_rest(last)?;
        let newest = unapplied
            .iter()
            .rev()
            .find_map(|entry| match &entry.payload {
                Payload::Membership(bytes) => Some(bytes),
                _ => None,
            });
        match newest {
            Some(bytes) => Some((codec::decode_membership(bytes).ok()?, false)),
            None => Some((self.state.with_membership(Clone::clone), true)),
        }
    }

    pub(super) fn leadership_at_rest(&self) -> Leadership {
        let vote = self.held_at_rest();
        let voted_for = vote.leader_id.voted_for;
        Leadership {
            leader: vote.committed.then_some(voted_for),
            leader_epoch: epoch(vote.leader_id.term),
            is_leader: vote.committed && voted_for == self.replica_id,
            ready: false,
        }
    }

    /// To be asked while the turn is held: an open instance publishes by itself.
    pub(super) fn publish_at_rest(&self) {
        let at_rest = self.leadership_at_rest();
        self.state.update_leadership(|now| *now = at_rest);
    }

    /// As Raft starts with it: a leader that was stopped does not lead on, unless this process has closed its
    /// Raft for rest.
    pub(super) fn held_at_rest(&self) -> Vote {
        let mut vote = self.stored_vote().unwrap_or(Vote {
            leader_id: LeaderId::new(0, self.replica_id),
            committed: false,
        });
        let leader = vote.leader_id;
        vote.committed &=
            leader.voted_for != self.replica_id || self.leads_in() == Some(leader.term);
        vote
    }

    pub(super) fn stored_vote(&self) -> Option<Vote> {
        let bytes = self.log.vote()?;
        // What this process wrote, or checked when it first opened the log.
        codec::decode_vote(&bytes).ok()
    }
}
