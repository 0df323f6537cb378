//! What a replica at rest does without its Raft while others choose a leader: it votes, and takes the
//! entry with which a leader begins its term. So thousands of partitions that nobody uses get other
//! leaders without thousands of followers being opened.
//!
//! Invariants:
//! - What is answered and written is what Raft would answer and write if it were opened. What takes
//!   more than is written here is left to Raft, which is opened and gets the message as it came.
//! - An answer is given when all that it promises is on disk. No instance opens before that, even
//!   where nobody waits for the answer any more.

use std::sync::Arc;

use chronik_storage::{LogEntry, Payload};
use futures::future::join;
use openraft::entry::EntryPayload;
use openraft::raft::{StreamAppendError, StreamAppendResult, VoteRequest, VoteResponse};

use super::{Engine, Seat};
use crate::replica::codec;
use crate::replica::log_store::durably;
use crate::replica::raft_config::{AppendRequest, LogId, TypeConfig, Vote};

type AppendAnswer = StreamAppendResult<TypeConfig>;

/// What a leader's message asks of a replica at rest.
struct Follow {
    /// None: it is the vote that the replica holds.
    new_vote: Option<Vote>,
    /// Empty entries that continue the log.
    new_entries: Vec<LogEntry>,
    /// Up to where entries are to be applied. None: they are.
    commit: Option<u64>,
    /// Up to where both logs are the same afterwards.
    matched: Option<LogId>,
}

impl Engine {
    /// Answers a pre-vote from the log alone, as Raft does where there is no leader (dissertation, section
    /// 9.6): nothing is promised by it, so nothing has to be opened or written.
    pub fn answer_pre_vote(&self, request: &VoteRequest<TypeConfig>) -> VoteResponse<TypeConfig> {
        let vote = self.vote();
        let last_log_id = self.last_log_id();
        let granted = request.vote >= vote && request.last_log_id >= last_log_id;
        VoteResponse::new(vote, last_log_id, granted)
    }

    /// Votes, if the replica rests (dissertation, sections 3.4 and 3.6.1). None: Raft is to be asked.
    pub async fn vote_at_rest(
        self: &Arc<Self>,
        request: &VoteRequest<TypeConfig>,
    ) -> Option<VoteResponse<TypeConfig>> {
        if !self.is_vacant() {
            return None;
        }
        let (engine, request) = (self.clone(), request.clone());
        let vote = async move {
            let _turn = engine.turn.lock().await;
            engine.grant(&request).await
        };
        tokio::spawn(vote).await.ok().flatten()
    }

    /// Takes a leader's message, if the replica rests and little is asked of it (dissertation, section
    /// 3.5). None: Raft is to be asked.
    pub async fn follow_at_rest(self: &Arc<Self>, request: &AppendRequest) -> Option<AppendAnswer> {
        // Whatever is being written here at this moment, the turn waits for.
        if !self.is_vacant() {
            return None;
        }
        let (engine, request) = (self.clone(), request.clone());
        let follow = async move {
            let _turn = engine.turn.lock().await;
            if let Some(higher) = engine.higher_vote(&request) {
                return Some(Err(StreamAppendError::HigherVote(higher)));
            }
            let follow = engine.asks(&request)?;
            engine.follow(follow).await
        };
        tokio::spawn(follow).await.ok().flatten()
    }

    fn is_vacant(&self) -> bool {
        let inner = self.lock();
        matches!(inner.seat, Seat::Empty) && !inner.backoff.is_waiting()
    }

    /// All that the log has is on disk too. To be asked while the turn is held.
    pub(super) fn is_at_rest(&self) -> bool {
        let last = self.log.last_entry_id().map(|(index, _)| index);
        self.is_vacant() && !self.log.is_damaged() && self.log.durable_index() == last
    }

    pub(super) fn last_log_id(&self) -> Option<LogId> {
        let (index, term) = self.log.last_entry_id()?;
        Some(codec::log_id(term, index))
    }

    async fn grant(&self, request: &VoteRequest<TypeConfig>) -> Option<VoteResponse<TypeConfig>> {
        // No lease to look at: an instance begins without one.
        if !self.is_at_rest() {
            return None;
        }
        let (vote, last_log_id) = (self.held_at_rest(), self.last_log_id());
        if request.last_log_id < last_log_id || !request.vote.ge(&vote) {
            return Some(VoteResponse::new(vote, last_log_id, false));
        }
        if request.vote != vote {
            self.save_vote(&request.vote).await.ok()?;
            self.publish_at_rest();
        }
        Some(VoteResponse::new(request.vote, last_log_id, true))
    }

    /// The vote that the replica holds, if the message comes from a leader of before.
    fn higher_vote(&self, request: &AppendRequest) -> Option<Vote> {
        let held = self.held_at_rest();
        let is_old = request.vote.committed && !request.vote.ge(&held);
        (self.is_at_rest() && is_old).then_some(held)
    }

    /// None: more than a replica at rest can do.
    fn asks(&self, request: &AppendRequest) -> Option<Follow> {
        let held = self.held_at_rest();
        if !self.is_at_rest() || !request.vote.committed || !request.vote.ge(&held) {
            return None;
        }
        if let Some(prev) = &request.prev_log_id
            && self.term_at(prev.index) != Some(codec::term(prev))
        {
            return None;
        }
        let last = self.log.last_entry_id().map(|(index, _)| index);
        let mut matched = request.prev_log_id;
        let mut new_entries = Vec::new();
        for entry in &request.entries {
            let (index, term) = (entry.log_id.index, codec::term(&entry.log_id));
            if index != next(matched.map(|log_id| log_id.index)) {
                return None;
            }
            if Some(index) > last {
                let EntryPayload::Blank = entry.payload else {
                    return None;
                };
                new_entries.push(LogEntry {
                    index,
                    term,
                    payload: Payload::Blank,
                });
            } else if self.term_at(index) != Some(term) {
                return None;
            }
            matched = Some(entry.log_id);
        }
        let commit = request.leader_commit.min(matched);
        let commit = commit.map(|log_id| log_id.index);
        let commit = (commit > self.log.committed()).then_some(commit).flatten();
        if let Some(commit) = commit {
            self.applies_at_rest(commit)?;
        }
        Some(Follow {
            new_vote: (request.vote != held).then_some(request.vote),
            new_entries,
            commit,
            matched,
        })
    }

    /// The entries of the log that are not applied and come up to `commit`, if there are no records
    /// among them.
    pub(super) fn applies_at_rest(&self, commit: u64) -> Option<Vec<LogEntry>> {
        let applied = self.state.applied_index();
        let last = self.log.last_entry_id().map(|(index, _)| index);
        let range = next(applied)..next(last.min(Some(commit)));
        if range.is_empty() {
            return Some(Vec::new());
        }
        let entries = self.log.read_entries_cached(range.clone(), usize::MAX)?;
        let is_light =
            |entry: &LogEntry| matches!(entry.payload, Payload::Blank | Payload::Membership(_));
        let is_whole = entries.last().map(|entry| entry.index) == range.end.checked_sub(1);
        (is_whole && entries.iter().all(is_light)).then_some(entries)
    }

    async fn follow(&self, follow: Follow) -> Option<AppendAnswer> {
        let Follow {
            new_vote,
            new_entries,
            commit,
            matched,
        } = follow;
        let appends = !new_entries.is_empty();
        // In this order in the WAL.
        let vote = async {
            match &new_vote {
                Some(vote) => self.save_vote(vote).await,
                None => Ok(()),
            }
        };
        let entries = async {
            match appends {
                true => durably(|on_durable| self.log.append(new_entries, on_durable)).await,
                false => Ok(()),
            }
        };
        let (voted, appended) = join(vote, entries).await;
        if new_vote.is_some() && voted.is_ok() {
            self.publish_at_rest();
        }
        voted.and(appended).ok()?;
        if appends {
            self.state.growth.grew(self.log.group_id());
        }
        if let Some(commit) = commit {
            let entries = self.applies_at_rest(commit)?;
            self.log.set_committed(commit);
            self.state.apply_at_rest(entries).ok()?;
        }
        Some(Ok(matched))
    }

    pub(super) async fn save_vote(&self, vote: &Vote) -> std::io::Result<()> {
        let bytes = codec::encode_vote(vote);
        durably(|on_durable| self.log.save_vote(bytes, on_durable)).await
    }

    pub(super) fn term_at(&self, index: u64) -> Option<u64> {
        self.log.term_at(index).ok().flatten()
    }
}

pub(super) fn next(index: Option<u64>) -> u64 {
    index.map_or(0, |index| index.saturating_add(1))
}
