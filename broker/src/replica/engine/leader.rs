//! What a replica does to lead without its Raft, while nobody uses it.
//!
//! Invariants:
//! - A replica leads at rest only in the process that won the election, or in which its Raft led until it was
//!   closed: all that it has told others is in its log. After a restart nobody leads on.
//! - Raft, opened at any point, goes on as the leader of the same term, if all of the log is committed and
//!   applied; else as a follower that may campaign anew, since a leader of openraft that is restored does not
//!   count its own log for what it had written before.

use std::collections::BTreeSet;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use chronik_types::id::{BrokerId, ReplicaId};
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;

use super::{Engine, Running, Seat, epoch};
use crate::replica::codec;
use crate::replica::raft_config::{AppendRequest, LogId, Membership, Raft};
use crate::replica::{FollowerProgress, Progress};

/// A leader whose Raft is closed.
pub(super) struct RestingLeader {
    term: u64,
    followers: Vec<RestingFollower>,
}

impl RestingLeader {
    /// At the beginning of its term.
    pub(super) fn new(term: u64, followers: impl Iterator<Item = ReplicaId>) -> Self {
        let followers = followers.map(|replica| {
            RestingFollower::new(FollowerProgress {
                replica,
                matched: None,
            })
        });
        Self {
            term,
            followers: followers.collect(),
        }
    }
}

/// One of its followers.
struct RestingFollower {
    progress: FollowerProgress,
    /// It knows that all entries are committed.
    knows_commit: bool,
}

impl RestingFollower {
    fn new(progress: FollowerProgress) -> Self {
        Self {
            progress,
            knows_commit: false,
        }
    }
}

impl Engine {
    /// The replica leads, and its Raft is closed, or about to be closed or opened.
    pub fn leads_at_rest(&self) -> bool {
        let held = self.held_at_rest();
        held.committed && held.leader_id.voted_for == self.replica_id
    }

    /// An instance that is opened now leads on.
    pub(super) fn may_lead_on(&self) -> bool {
        self.leads_at_rest() && self.state.applied_index() == self.last_log_id().map(|id| id.index)
    }

    /// The term in which this process may lead on without an election.
    pub(super) fn leads_in(&self) -> Option<u64> {
        self.leads().as_ref().map(|leader| leader.term)
    }

    /// Raft leads by itself from now on, or the replica leads no more.
    pub(super) fn lead_no_more_at_rest(&self) {
        *self.leads() = None;
    }

    /// The open Raft of a leader that may rest, and whose followers all have all there is; it does not count as used.
    pub fn about_to_rest(&self, idle: Duration) -> Option<Raft> {
        let inner = self.lock();
        let Seat::Open(running) = &inner.seat else {
            return None;
        };
        let may_rest = inner.users == 0
            && inner.last_used.elapsed() >= idle
            && self.settled_leader(running, &BTreeSet::new()).is_some();
        may_rest.then(|| running.raft.clone())
    }

    /// Keeps what a leader's Raft knows, if all is settled in its group. False: it is not.
    pub(super) fn rest_as_leader(&self, running: &Running, away: &BTreeSet<BrokerId>) -> bool {
        let leader = self.settled_leader(running, away);
        let is_settled = leader.is_some();
        *self.leads() = leader;
        is_settled
    }

    /// All of the group have all there is, but for those that are away, and nobody joins, leaves or copies.
    fn settled_leader(
        &self,
        running: &Running,
        away: &BTreeSet<BrokerId>,
    ) -> Option<RestingLeader> {
        let published = *self.state.leadership.borrow();
        let last = self.log.last_entry_id();
        let index = last.map(|(index, _)| index);
        let is_whole = last == self.state.applied_id()
            && index == self.log.durable_index()
            && index == self.log.committed()
            && !self.log.is_damaged()
            && self.state.copies.offered().is_none();
        let (members, is_applied) = self.membership_at_rest()?;
        let voters = sole_voters(&members).filter(|_| is_applied && is_whole)?;
        let term = {
            let metrics = running.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            let effective = &metrics.membership_config;
            let term = metrics.vote.leader_id.term;
            let leads = metrics.state == ServerState::Leader
                && published.is_leader
                && published.ready
                && published.leader_epoch == epoch(term)
                && Some(metrics.vote) == self.stored_vote()
                && *effective.membership() == members;
            leads.then_some(term)?
        };
        let followers = running.progress(self.replica_id)?.followers;
        let replicas: BTreeSet<ReplicaId> = followers.iter().map(|known| known.replica).collect();
        if replicas.len() + 1 != voters.len() || !replicas.is_subset(&voters) {
            return None;
        }
        let has_all = |follower: &FollowerProgress| {
            follower.matched == index || away.contains(&follower.replica.broker_id)
        };
        let are_settled = followers.iter().all(has_all);
        // The last message to them may be lost, so they are told once more (`behind_at_rest`).
        let followers = followers.into_iter().map(RestingFollower::new).collect();
        are_settled.then_some(RestingLeader { term, followers })
    }

    /// None where this replica does not lead.
    pub fn progress(&self) -> Option<Progress> {
        // One look: a leader that is being opened or closed is the one or the other.
        let inner = self.lock();
        match &inner.seat {
            Seat::Open(running) => running.progress(self.replica_id),
            Seat::Empty | Seat::Closing => self.progress_at_rest(),
            Seat::Closed => None,
        }
    }

    fn progress_at_rest(&self) -> Option<Progress> {
        if !self.leads_at_rest() {
            return None;
        }
        let leader = self.leads();
        let followers = leader.as_ref()?.followers.iter();
        let followers = followers.map(|follower| follower.progress).collect();
        let last_index = self.log.last_entry_id().map(|(index, _)| index);
        Some(Progress {
            last_index,
            followers,
        })
    }

    /// A leader's message without entries, to a follower that can be reached again. None: this is no leader at
    /// rest, or its term has only begun.
    pub fn speak_at_rest(&self) -> Option<AppendRequest> {
        let vote = self.held_at_rest();
        let last = self.last_log_id()?;
        self.may_lead_on().then(|| AppendRequest {
            vote,
            prev_log_id: Some(last),
            entries: Vec::new(),
            leader_commit: Some(last),
        })
    }

    /// Followers of a leader at rest that can be reached, and are not known to have the whole log and to know that
    /// it is committed.
    pub fn behind_at_rest(&self, away: &BTreeSet<BrokerId>) -> Vec<ReplicaId> {
        // Most replicas follow.
        if self.leads_in().is_none() || !self.may_lead_on() {
            return Vec::new();
        }
        let leader = self.leads();
        let followers = leader.iter().flat_map(|leader| &leader.followers);
        let behind = followers.filter(|follower| !follower.knows_commit);
        behind
            .map(|follower| follower.progress.replica)
            .filter(|replica| !away.contains(&replica.broker_id))
            .collect()
    }

    /// Followers of these brokers were restarted, or may have been: what a follower knows to be committed it may
    /// have forgotten.
    pub fn unsure_at_rest(&self, brokers: &BTreeSet<BrokerId>) {
        for leader in self.leads().iter_mut() {
            for follower in &mut leader.followers {
                let broker = follower.progress.replica.broker_id;
                follower.knows_commit &= !brokers.contains(&broker);
            }
        }
    }

    /// A follower has said that its log is the same up to `matched`, an entry of the leader's term; `committed`: in
    /// answer to a message that said so of that entry.
    pub fn matched_at_rest(&self, follower: ReplicaId, matched: LogId, committed: bool) {
        // A late answer may be about less than there is by now.
        let last = self.last_log_id();
        let mut leader = self.leads();
        let leader = leader.as_mut();
        // Not of a term before, which the replica has led too.
        let leader = leader.filter(|leader| leader.term == codec::term(&matched));
        if let Some(leader) = leader {
            let known = leader.followers.iter_mut();
            for known in known.filter(|known| known.progress.replica == follower) {
                let progress = &mut known.progress;
                progress.matched = progress.matched.max(Some(matched.index));
                known.knows_commit |= committed && last == Some(matched);
            }
        }
    }

    pub(super) fn leads(&self) -> MutexGuard<'_, Option<RestingLeader>> {
        self.leads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    /// What a leader's Raft knows of its followers. One that leads on begins with knowing nothing, and searches
    /// their logs anew; what was known before it was opened holds all the same, since in one term they only grow.
    fn progress(&self, me: ReplicaId) -> Option<Progress> {
        let term = self
            .raft
            .server_metrics()
            .borrow_watched()
            .vote
            .leader_id
            .term;
        let floor = self.floor.as_ref().filter(|floor| floor.term == term);
        let before = |replica: ReplicaId| {
            let known = floor?.followers.iter().map(|follower| follower.progress);
            let mut known = known.filter(|known| known.replica == replica);
            known.next()?.matched
        };
        let metrics = self.raft.data_metrics();
        let metrics = metrics.borrow_watched();
        let followers = metrics.replication.as_ref()?.iter();
        let followers = followers.filter(|(replica, _)| **replica != me);
        let followers = followers.map(|(replica, matched)| FollowerProgress {
            replica: *replica,
            matched: matched.map(|log_id| log_id.index).max(before(*replica)),
        });
        Some(Progress {
            last_index: metrics.last_log.map(|log_id| log_id.index),
            followers: followers.collect(),
        })
    }
}

/// Who votes, where nobody joins or leaves.
pub(super) fn sole_voters(membership: &Membership) -> Option<BTreeSet<ReplicaId>> {
    let [voters] = membership.get_joint_config().as_slice() else {
        return None;
    };
    let nodes: BTreeSet<ReplicaId> = membership.nodes().map(|(id, ())| *id).collect();
    (nodes == *voters).then(|| voters.clone())
}
