//! What a replica at rest answers and writes by itself, held against what Raft does with the same messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use chronik_storage::LogEntry;
use chronik_types::id::{BrokerId, ReplicaId};
use futures::stream::{StreamExt, iter};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::entry::EntryPayload;
use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult, VoteRequest};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::timeout;

use super::{last_log_id, to_rest};
use crate::peers::RaftEndpoint;
use crate::replica::engine::EngineStatus;
use crate::replica::log_store::{LogStore, to_raft};
use crate::replica::raft_config::{Entry, LogId, TypeConfig, Vote};
use crate::replica::test_batches::value;
use crate::replica::test_cluster::{Cluster, LIMIT};
use crate::replica::traces::Traces;
use crate::replica::{Replica, append_session, codec};
use crate::test_wait::until;

fn entryless(
    vote: Vote,
    prev: Option<LogId>,
    commit: Option<LogId>,
) -> AppendEntriesRequest<TypeConfig> {
    AppendEntriesRequest {
        vote,
        prev_log_id: prev,
        entries: Vec::new(),
        leader_commit: commit,
    }
}

fn append(
    vote: Vote,
    prev: Option<LogId>,
    entries: Vec<Entry>,
    commit: Option<LogId>,
) -> AppendEntriesRequest<TypeConfig> {
    AppendEntriesRequest {
        entries,
        ..entryless(vote, prev, commit)
    }
}

fn blank(term: u64, index: u64) -> Entry {
    Entry {
        log_id: codec::log_id(term, index),
        payload: EntryPayload::Blank,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_at_rest_is_asked_for_its_vote_without_being_opened() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    let follower = cluster.replica(1).clone();
    to_rest(&follower).await;
    let (vote, last) = (follower.vote(), last_log_id(&follower).unwrap());
    let at = |term, index| Some(codec::log_id(term, index));
    let term = codec::term(&last);
    for (vote_term, last_log_id, granted) in [
        (vote.leader_id.term + 1, Some(last), true),
        (vote.leader_id.term + 1, at(term, last.index + 5), true),
        (vote.leader_id.term + 1, at(term, last.index - 1), false),
        (vote.leader_id.term + 1, None, false),
        (vote.leader_id.term - 1, Some(last), false),
    ] {
        let candidate = Vote::new(vote_term, cluster.nodes[2].id);
        let request = VoteRequest::<TypeConfig>::new(candidate, last_log_id);
        let answer = follower.engine().answer_pre_vote(&request);
        assert_eq!(answer.vote_granted, granted, "{request}");
        assert_eq!((answer.vote, answer.last_log_id), (vote, Some(last)));
    }
    assert_eq!(follower.engine().status(), EngineStatus::AtRest);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_at_rest_takes_only_what_asks_little_of_it() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    let follower = cluster.replica(1).clone();
    let (vote, last) = (follower.vote(), last_log_id(&follower).unwrap());
    let engine = follower.engine();
    let term = codec::term(&last);
    let at = |term, index| Some(codec::log_id(term, index));
    let same = entryless(vote, Some(last), Some(last));
    assert_eq!(engine.follow_at_rest(&same).await, None, "open");
    to_rest(&follower).await;
    assert_eq!(engine.follow_at_rest(&same).await, Some(Ok(Some(last))));
    assert_eq!(
        engine.follow_at_rest(&entryless(vote, None, None)).await,
        Some(Ok(None))
    );
    let mut uncommitted = vote;
    uncommitted.committed = false;
    let mut older = vote;
    older.leader_id.term -= 1;
    let old = entryless(older, Some(last), Some(last));
    let refused = Some(Err(StreamAppendError::HigherVote(vote)));
    assert_eq!(engine.follow_at_rest(&old).await, refused);
    for (why, request) in [
        ("no leader", entryless(uncommitted, Some(last), Some(last))),
        (
            "not there",
            entryless(vote, at(term, last.index + 1), Some(last)),
        ),
        (
            "another log",
            entryless(vote, at(term + 1, last.index), Some(last)),
        ),
        (
            "a gap",
            append(
                vote,
                Some(last),
                vec![blank(term, last.index + 2)],
                Some(last),
            ),
        ),
        (
            "another entry",
            append(
                vote,
                at(term, last.index - 1),
                vec![blank(term + 1, last.index)],
                None,
            ),
        ),
    ] {
        assert_eq!(engine.follow_at_rest(&request).await, None, "{why}");
    }
    let records = {
        use openraft::storage::RaftLogReader;
        let mut log = LogStore::new(
            cluster.replica(0).log().clone(),
            Arc::default(),
            Arc::default(),
            Default::default(),
        );
        let range = last.index..last.index + 1;
        let mut entries = log.try_get_log_entries(range).await.unwrap();
        entries[0].log_id = codec::log_id(term, last.index + 1);
        entries
    };
    let request = append(vote, Some(last), records, Some(last));
    assert_eq!(engine.follow_at_rest(&request).await, None, "records");
    assert_eq!(engine.status(), EngineStatus::AtRest);
    assert_eq!(
        (follower.vote(), last_log_id(&follower)),
        (vote, Some(last))
    );
    cluster.stop_all().await;
}

/// Two followers with the same log get the same messages: the one rests whenever it may, the other never.
struct Twins {
    resting: Arc<Replica>,
    open: Arc<Replica>,
    /// Messages that were answered without an instance.
    answered_at_rest: AtomicU32,
}

impl Twins {
    async fn vote(&self, request: &VoteRequest<TypeConfig>) {
        let opened = self.resting.engine().opened();
        let first = RaftEndpoint::vote(&*self.resting, request.clone(), false);
        let first = timeout(LIMIT, first).await.unwrap().unwrap();
        let second = RaftEndpoint::vote(&*self.open, request.clone(), false);
        let second = timeout(LIMIT, second).await.unwrap().unwrap();
        assert_eq!(first, second, "{request}");
        self.agree(opened).await;
    }

    async fn append(&self, request: &AppendEntriesRequest<TypeConfig>) {
        let opened = self.resting.engine().opened();
        let first = Self::appended(&self.resting, request).await;
        let second = Self::appended(&self.open, request).await;
        assert_eq!(first, second, "{request}");
        self.agree(opened).await;
    }

    async fn appended(
        replica: &Replica,
        request: &AppendEntriesRequest<TypeConfig>,
    ) -> StreamAppendResult<TypeConfig> {
        let requests = iter([request.clone()]).boxed();
        let mut answers = append_session::answers(replica.engine().clone(), requests);
        timeout(LIMIT, answers.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }

    /// Waits until both are the same, and lets the one rest again if it may.
    async fn agree(&self, opened: u64) {
        let rests = self.resting.engine().status() == EngineStatus::AtRest;
        if rests && self.resting.engine().opened() == opened {
            self.answered_at_rest.fetch_add(1, Ordering::Relaxed);
            let log = self.resting.log();
            let last = log.last_entry_id().map(|(index, _)| index);
            assert_eq!(log.durable_index(), last, "answered before it was on disk");
        }
        let seen = |replica: &Replica| {
            let log = replica.log();
            let applied = replica.state.applied_id();
            let leadership = *replica.leadership().borrow();
            (
                replica.vote(),
                log.last_entry_id(),
                log.committed(),
                applied,
                leadership,
            )
        };
        // Raft applies, and publishes what it knows, after it has answered.
        until("both replicas are the same", || {
            seen(&self.resting) == seen(&self.open)
        })
        .await;
        assert_eq!(
            self.resting.log().term_starts(),
            self.open.log().term_starts()
        );
        assert_eq!(self.resting.log().vote(), self.open.log().vote());
        self.resting
            .engine()
            .close_if_idle(super::NOW, &Arc::default())
            .await;
    }
}

/// Messages of leaders and candidates as Raft allows them, by seed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_at_rest_does_what_raft_does() {
    for seed in 0..6 {
        eprintln!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let mut cluster = Cluster::start(3, 2).await;
        for n in 0..random.random_range(1..30) {
            cluster.ack(0, value(&n.to_string())).await;
        }
        cluster.wait_for_followers(0).await;
        let end = cluster.replica(0).high_watermark().0;
        cluster.wait_for_watermark(1, end).await;
        cluster.wait_for_watermark(2, end).await;
        let first = cluster
            .replica(0)
            .log()
            .read_entries(0..u64::MAX, usize::MAX)
            .unwrap();
        cluster.stop(0).await;
        let twins = Twins {
            resting: cluster.replica(1).clone(),
            open: cluster.replica(2).clone(),
            answered_at_rest: AtomicU32::default(),
        };
        let _open = twins.open.wake().await.unwrap();
        to_rest(&twins.resting).await;
        let rival = ReplicaId {
            broker_id: BrokerId(9),
            incarnation: 1,
        };
        play(&mut random, &twins, &first, [cluster.nodes[0].id, rival]).await;
        let at_rest = twins.answered_at_rest.load(Ordering::Relaxed);
        assert!(
            at_rest > 50,
            "only {at_rest} messages were answered at rest"
        );
        drop(_open);
        drop(twins);
        cluster.stop_all().await;
    }
}

async fn play(random: &mut StdRng, twins: &Twins, first: &[LogEntry], candidates: [ReplicaId; 2]) {
    let mut leader = candidates[0];
    // The log of whoever leads, and how much of it is committed.
    let mut log: Vec<u64> = first.iter().map(|entry| entry.term).collect();
    let mut term = *log.last().unwrap();
    let mut committed = log.len();
    let id = |log: &[u64], len: usize| {
        let index = len.checked_sub(1)?;
        Some(codec::log_id(log[index], index as u64))
    };
    let mut leads = true;
    for _ in 0..150 {
        let vote = Vote {
            leader_id: openraft::vote::RaftLeaderId::new(term, leader),
            committed: true,
        };
        let has = twins
            .open
            .log()
            .last_entry_id()
            .map_or(0, |(index, _)| index as usize + 1);
        match random.random_range(0..8) {
            // A candidate, who may have too little, or come too late.
            0 => {
                let short = usize::from(random.random_bool(0.3));
                let late = u64::from(random.random_bool(0.3));
                let candidate = candidates[random.random_range(0..2)];
                let vote = Vote::new(term + 1 - late, candidate);
                let mut request = VoteRequest::<TypeConfig>::new(vote, id(&log, log.len() - short));
                request.leadership_transfer = true;
                twins.vote(&request).await;
                if late == 0 && twins.open.vote().leader_id.term > term {
                    (term, leader, leads) = (term + 1, candidate, false);
                }
            }
            // A leader that this candidate became, perhaps without what is not committed.
            1 if !leads => {
                if random.random_bool(0.2) {
                    log.truncate(committed);
                }
                log.push(term);
                leads = true;
            }
            2 if leads => {
                let before = Vote {
                    leader_id: openraft::vote::RaftLeaderId::new(term - 1, leader),
                    committed: true,
                };
                twins
                    .append(&entryless(before, id(&log, log.len()), None))
                    .await;
            }
            3 if leads => {
                let len = random.random_range(0..=log.len());
                // Raft remembers what it has taken of this leader; a replica at rest goes by the message.
                let commit = id(&log, committed.min(len));
                twins.append(&entryless(vote, id(&log, len), commit)).await;
            }
            4 if leads && random.random_bool(0.3) => log.push(term),
            _ if leads => {
                // What comes next, or what a probe takes out of the middle.
                let from = match random.random_bool(0.7) {
                    true => has.min(log.len()),
                    false => random.random_range(0..=log.len()),
                };
                let to = log.len().min(from + 8);
                let entries: Vec<Entry> = (from..to)
                    .map(|n| {
                        // Records of before are there already; only empty entries can be made here.
                        match first.get(n) {
                            Some(known) if log[n] == known.term => {
                                to_raft(known.clone(), &Traces::default()).unwrap()
                            }
                            _ => blank(log[n], n as u64),
                        }
                    })
                    .collect();
                let request = append(vote, id(&log, from), entries, id(&log, committed.min(to)));
                twins.append(&request).await;
                let has = twins
                    .open
                    .log()
                    .last_entry_id()
                    .map_or(0, |(index, _)| index as usize + 1);
                // Both of three have it: it is committed, if it is of this term.
                if has == log.len() && log.last() == Some(&term) {
                    committed = committed.max(has);
                }
            }
            _ => {}
        }
    }
}

/// Founding, voting and following at rest, up to the first record; and nothing of it is lost with the power.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_group_opens_its_leader_alone() {
    let mut cluster = Cluster::start(3, 2).await;
    let leader = cluster.replica(0).clone();
    let founded = || leader.state.applied_id();
    for n in [1, 2] {
        let follower = cluster.replica(n).clone();
        until("the follower knows what is committed", || {
            follower.state.applied_id() == founded()
        })
        .await;
        assert_eq!(follower.engine().opened(), 0);
        assert_eq!(follower.state.voters(), leader.state.voters());
        assert_eq!(
            follower.leadership().borrow().leader,
            Some(leader.replica_id())
        );
    }
    let follower = cluster.replica(1).clone();
    let (vote, last) = (follower.vote(), last_log_id(&follower));
    drop(follower);
    cluster.crash(1).await;
    cluster.open(1).await;
    assert_eq!(cluster.replica(1).vote(), vote);
    assert_eq!(last_log_id(cluster.replica(1)), last);
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    assert_eq!(cluster.replica(1).engine().opened(), 1);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vote_once_given_at_rest_stays_given() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(2, 1).await;
    to_rest(cluster.replica(2)).await;
    // No leader interferes.
    cluster.stop(0).await;
    let (term, last) = (
        cluster.replica(2).vote().leader_id.term + 1,
        last_log_id(cluster.replica(2)),
    );
    let candidates = [cluster.nodes[1].id, cluster.nodes[0].id];
    let asks = |candidate| VoteRequest::<TypeConfig>::new(Vote::new(term, candidate), last);
    let voter = cluster.replica(2).clone();
    let opened = voter.engine().opened();
    let answer = voter
        .engine()
        .vote_at_rest(&asks(candidates[0]))
        .await
        .unwrap();
    assert!(answer.vote_granted);
    let answer = voter
        .engine()
        .vote_at_rest(&asks(candidates[1]))
        .await
        .unwrap();
    assert!(!answer.vote_granted, "another candidate of the same term");
    assert_eq!(voter.engine().opened(), opened);
    drop(voter);
    cluster.crash(2).await;
    cluster.open(2).await;
    let voter = cluster.replica(2).clone();
    assert_eq!(voter.vote(), Vote::new(term, candidates[0]));
    let answer = voter
        .engine()
        .vote_at_rest(&asks(candidates[1]))
        .await
        .unwrap();
    assert!(!answer.vote_granted, "after the power failed");
    let open = voter.wake().await.unwrap();
    assert_eq!(open.server_metrics().borrow_watched().vote, voter.vote());
    drop(open);
    drop(voter);
    cluster.stop_all().await;
}
