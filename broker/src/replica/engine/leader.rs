//! What a replica at rest does without its Raft to win an election, and to lead while nobody uses it.
//!
//! ```text
//!   stand ---> votes of others ---> win ---> followers have the first entry ---> commit ---> followers know it
//!   (vote on disk)           (committed vote and first entry on disk)           (ready)
//! ```
//!
//! Invariants:
//! - What is written and sent is what Raft would write and send. Raft, opened at any point, goes on from
//!   there: as the leader of the same term after `commit`, before it as a follower that may campaign anew.
//!   (A leader of openraft that is restored does not count its own log for what it had written before.)
//! - A replica leads at rest only in the process that won the election, or in which its Raft led until it was
//!   closed: all that it has told others is in its log. After a restart nobody leads on.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard, PoisonError};

use chronik_storage::{LogEntry, Payload};
use chronik_types::id::{BrokerId, ReplicaId};
use futures::future::join;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft::entry::EntryPayload;
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use openraft::vote::RaftLeaderId;
use tokio_util::sync::CancellationToken;

use super::follower::next;
use super::{Engine, Running, Seat, epoch};
use crate::replica::codec;
use crate::replica::log_store::durably;
use crate::replica::raft_config::{Entry, LeaderId, LogId, Membership, TypeConfig, Vote};
use crate::replica::{FollowerProgress, Progress};

type AppendRequest = AppendEntriesRequest<TypeConfig>;

/// A leader whose Raft is closed.
pub(super) struct RestingLeader {
    term: u64,
    followers: Vec<RestingFollower>,
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

/// What a replica at rest asks votes with.
#[derive(Debug, Clone)]
pub struct Candidacy {
    pub vote: Vote,
    pub last_log_id: Option<LogId>,
    pub voters: BTreeSet<ReplicaId>,
}

impl Candidacy {
    /// `by_force`: the leader before is gone for certain, so its lease need not be waited for.
    pub fn request(&self, by_force: bool) -> VoteRequest<TypeConfig> {
        let mut request = VoteRequest::new(self.vote, self.last_log_id);
        request.leadership_transfer = by_force;
        request
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
        if self.leads_in().is_none() || self.speak_at_rest().is_none() {
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

    /// A follower has said that its log is the same up to `matched`, an entry of the leader's term; `committed`: in
    /// answer to a message that said so of that entry.
    pub fn matched_at_rest(&self, follower: ReplicaId, matched: LogId, committed: bool) {
        let mut leader = self.leads();
        let leader = leader.as_mut();
        // Not of a term before, which the replica has led too.
        let leader = leader.filter(|leader| leader.term == codec::term(&matched));
        if let Some(leader) = leader {
            let known = leader.followers.iter_mut();
            for known in known.filter(|known| known.progress.replica == follower) {
                let progress = &mut known.progress;
                progress.matched = progress.matched.max(Some(matched.index));
                known.knows_commit |= committed;
            }
        }
    }

    /// With what the replica could campaign in a term above `rival` and its own. None: Raft has to, or the replica
    /// leads at rest.
    pub async fn candidacy(&self, rival: u64) -> Option<Candidacy> {
        // What is being written now is waited for.
        let _turn = self.turn.lock().await;
        self.may_stand(rival)
    }

    fn may_stand(&self, rival: u64) -> Option<Candidacy> {
        if !self.is_at_rest() || self.leads_at_rest() {
            return None;
        }
        let (members, _) = self.membership_at_rest()?;
        let voters = sole_voters(&members)?;
        let term = self
            .held_at_rest()
            .leader_id
            .term
            .max(rival)
            .checked_add(1)?;
        voters.contains(&self.replica_id).then(|| Candidacy {
            vote: Vote {
                leader_id: LeaderId::new(term, self.replica_id),
                committed: false,
            },
            last_log_id: self.last_log_id(),
            voters,
        })
    }

    /// Takes a term and votes for itself (dissertation, section 3.4). None: Raft has to, or the replica leads at
    /// rest. Takes none for a caller that stopped waiting before it was its turn: a term that nobody asks votes
    /// for only disturbs.
    pub async fn stand(self: &Arc<Self>, rival: u64) -> Option<Candidacy> {
        let engine = self.clone();
        let gone = CancellationToken::new();
        let _caller = gone.clone().drop_guard();
        let stand = async move {
            let _turn = engine.turn.lock().await;
            if gone.is_cancelled() {
                return None;
            }
            let candidacy = engine.may_stand(rival)?;
            engine.save_vote(&candidacy.vote).await.ok()?;
            engine.publish_at_rest();
            Some(candidacy)
        };
        tokio::spawn(stand).await.ok().flatten()
    }

    /// Remembers the vote of one that refused its own, so that the next term taken is above it.
    pub async fn outvoted(self: &Arc<Self>, mut vote: Vote) {
        // As Raft does: this replica has not heard of that leader from itself.
        vote.committed = false;
        let engine = self.clone();
        let save = async move {
            let _turn = engine.turn.lock().await;
            if engine.is_at_rest() && vote > engine.held_at_rest() {
                // It is known no worse than before if it cannot be written.
                let _ = engine.save_vote(&vote).await;
                engine.publish_at_rest();
            }
        };
        let _ = tokio::spawn(save).await;
    }

    /// A majority has voted for it: begins its term with an empty entry (dissertation, section 6.4), and gives
    /// what is to be sent to the others. None: it is too late, or Raft has to go on.
    pub async fn win(self: &Arc<Self>, candidacy: &Candidacy) -> Option<AppendRequest> {
        let (engine, candidacy) = (self.clone(), candidacy.clone());
        let win = async move {
            let _turn = engine.turn.lock().await;
            let is_still = engine.is_at_rest()
                && engine.stored_vote() == Some(candidacy.vote)
                && engine.last_log_id() == candidacy.last_log_id;
            if !is_still {
                return None;
            }
            engine.begin_term(candidacy).await
        };
        tokio::spawn(win).await.ok().flatten()
    }

    async fn begin_term(&self, candidacy: Candidacy) -> Option<AppendRequest> {
        let Candidacy {
            mut vote,
            last_log_id: prev_log_id,
            voters,
        } = candidacy;
        vote.committed = true;
        let term = vote.leader_id.term;
        let first = LogEntry {
            index: next(prev_log_id.map(|log_id| log_id.index)),
            term,
            payload: Payload::Blank,
        };
        let log_id = codec::log_id(term, first.index);
        let leader_commit = self.log.committed();
        let leader_commit = leader_commit.and_then(|index| {
            let term = self.term_at(index)?;
            Some(codec::log_id(term, index))
        });
        // In this order in the WAL.
        let entry = durably(|on_durable| self.log.append(vec![first], on_durable));
        let (voted, appended) = join(self.save_vote(&vote), entry).await;
        voted.and(appended).ok()?;
        let followers = voters.iter().filter(|voter| **voter != self.replica_id);
        let followers = followers.map(|replica| {
            RestingFollower::new(FollowerProgress {
                replica: *replica,
                matched: None,
            })
        });
        *self.leads() = Some(RestingLeader {
            term,
            followers: followers.collect(),
        });
        self.state.growth.grew(self.log.group_id());
        self.publish_at_rest();
        Some(AppendRequest {
            vote,
            prev_log_id,
            entries: vec![Entry {
                log_id,
                payload: EntryPayload::Blank,
            }],
            leader_commit,
        })
    }

    /// A majority has the first entry of the term: it is committed. False: Raft has to go on.
    pub async fn commit_at_rest(self: &Arc<Self>, first: LogId) -> bool {
        let engine = self.clone();
        let commit = async move {
            let _turn = engine.turn.lock().await;
            if !engine.is_at_rest()
                || !engine.leads_at_rest()
                || engine.last_log_id() != Some(first)
            {
                return false;
            }
            let Some(entries) = engine.applies_at_rest(first.index) else {
                return false;
            };
            engine.log.set_committed(first.index);
            engine.state.apply_at_rest(entries).is_ok()
        };
        tokio::spawn(commit).await.unwrap_or(false)
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
fn sole_voters(membership: &Membership) -> Option<BTreeSet<ReplicaId>> {
    let [voters] = membership.get_joint_config().as_slice() else {
        return None;
    };
    let nodes: BTreeSet<ReplicaId> = membership.nodes().map(|(id, ())| *id).collect();
    (nodes == *voters).then(|| voters.clone())
}
