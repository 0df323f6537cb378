//! What a replica at rest does without its Raft to win an election.
//!
//! ```text
//!   stand ---> votes of others ---> win ---> followers have the first entry ---> commit ---> followers know it
//!   (vote on disk)           (committed vote and first entry on disk)           (ready)
//! ```
//!
//! Invariant: what is written and sent is what Raft would write and send. It is written while the turn is held, and
//! each step begins with a look at whether the one before it still holds.

use std::collections::BTreeSet;
use std::sync::Arc;

use chronik_storage::{LogEntry, Payload};
use chronik_types::id::ReplicaId;
use futures::future::join;
use openraft::entry::EntryPayload;
use openraft::raft::VoteRequest;
use openraft::vote::RaftLeaderId;
use tokio_util::sync::CancellationToken;

use super::Engine;
use super::follower::next;
use super::leader::{RestingLeader, sole_voters};
use crate::replica::codec;
use crate::replica::log_store::durably;
use crate::replica::raft_config::{AppendRequest, Entry, LeaderId, LogId, TypeConfig, Vote};

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
        let followers = voters.into_iter().filter(|voter| *voter != self.replica_id);
        *self.leads() = Some(RestingLeader::new(term, followers));
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
}
