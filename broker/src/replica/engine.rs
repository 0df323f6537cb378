//! The Raft instance of one replica: opened when something needs it, closed while the replica rests.
//!
//! Invariants:
//! - There is at most one instance of a replica at any time. Opening and closing take turns, and a
//!   new instance starts only after the state machine of the one before is gone.
//! - An instance is closed for rest only if all that this replica has is durable, committed and
//!   applied, it follows a known leader, and nobody uses it. What it promised (its vote) is on disk.
//! - Nothing is lost by closing: whoever holds a `RaftHandle` keeps the instance open, and whoever
//!   comes later opens it again.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use chronik_storage::{LogEntry, PartitionLog, Payload};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::{RaftGroupId, ReplicaId};
use futures::future::BoxFuture;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult, VoteRequest, VoteResponse};
use openraft::vote::RaftLeaderId;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{error, warn};

use super::codec;
use super::log_store::durably;
use super::raft_config::{LeaderId, Membership, Raft, TypeConfig, Vote};
use super::state_machine::ReplicaState;
use super::{Leadership, OpenError};

/// Before an instance that ended by itself is opened again; doubles each time.
const REOPEN_MIN: Duration = Duration::from_secs(1);
const REOPEN_MAX: Duration = Duration::from_secs(60);

/// Starts an instance over the replica's log and state. The guard is dropped with its state machine; the
/// token tells that the instance is being closed.
pub type Start = Box<
    dyn Fn(DropGuard, CancellationToken) -> BoxFuture<'static, Result<Raft, OpenError>>
        + Send
        + Sync,
>;

pub type DataMetrics =
    openraft::alias::WatchReceiverOf<TypeConfig, openraft::metrics::RaftDataMetrics<TypeConfig>>;

/// Why there is no instance.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    #[error("the replica is closed")]
    Closed,
    #[error("raft ended by itself and is opened again later")]
    Failed,
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// What a replica's instance is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineStatus {
    Open,
    /// There is none, or it is being closed.
    AtRest,
    /// It ended by itself, and waits to be opened again.
    Failed,
    Closed,
}

struct Running {
    raft: Raft,
    /// Counts the instances of this replica.
    number: u64,
    watcher: AbortHandle,
    /// Tells the feeds of append sessions, and appends that wait for room, that this instance takes
    /// nothing more.
    closing: CancellationToken,
    /// The state machine is gone.
    ended: CancellationToken,
}

enum Seat {
    Empty,
    Open(Running),
    Closing,
    Closed,
}

struct Inner {
    seat: Seat,
    opened: u64,
    /// Operations under way; the instance stays open while there are any.
    users: usize,
    last_used: Instant,
    /// Instances in a row that ended by themselves or did not start.
    failures: u32,
    retry_at: Option<Instant>,
}

/// One per replica, for as long as the replica.
pub struct Engine {
    replica_id: ReplicaId,
    log: PartitionLog,
    state: Arc<ReplicaState>,
    start: Start,
    inner: Mutex<Inner>,
    /// Held while an instance is opened or closed.
    turn: tokio::sync::Mutex<()>,
}

impl Engine {
    pub fn new(
        replica_id: ReplicaId,
        log: PartitionLog,
        state: Arc<ReplicaState>,
        start: Start,
    ) -> Arc<Engine> {
        let inner = Inner {
            seat: Seat::Empty,
            opened: 0,
            users: 0,
            last_used: Instant::now(),
            failures: 0,
            retry_at: None,
        };
        let engine = Engine {
            replica_id,
            log,
            state,
            start,
            inner: Mutex::new(inner),
            turn: tokio::sync::Mutex::new(()),
        };
        let at_rest = engine.leadership_at_rest();
        engine
            .state
            .update_leadership(|leadership| *leadership = at_rest);
        Arc::new(engine)
    }

    /// The instance, if it is open; kept open while the handle lives.
    pub fn running(self: &Arc<Self>) -> Option<RaftHandle> {
        let mut inner = self.lock();
        let Seat::Open(running) = &inner.seat else {
            return None;
        };
        let raft = running.raft.clone();
        inner.users = inner.users.saturating_add(1);
        Some(RaftHandle {
            raft,
            engine: self.clone(),
        })
    }

    /// The instance, opened if there is none. Many may ask at once; it is opened once. A caller
    /// that stops waiting does not undo the opening.
    pub async fn wake(self: &Arc<Self>) -> Result<RaftHandle, WakeError> {
        if let Some(handle) = self.running() {
            return Ok(handle);
        }
        match tokio::spawn(self.clone().open()).await {
            Ok(result) => result,
            // The runtime is shutting down.
            Err(_) => Err(WakeError::Closed),
        }
    }

    async fn open(self: Arc<Self>) -> Result<RaftHandle, WakeError> {
        let _turn = self.turn.lock().await;
        if let Some(handle) = self.running() {
            return Ok(handle);
        }
        {
            let inner = self.lock();
            if matches!(inner.seat, Seat::Closed) {
                return Err(WakeError::Closed);
            }
            if inner.retry_at.is_some_and(|at| Instant::now() < at) {
                return Err(WakeError::Failed);
            }
        }
        let (closing, ended) = (CancellationToken::new(), CancellationToken::new());
        let raft = match (self.start)(ended.clone().drop_guard(), closing.clone()).await {
            Ok(raft) => raft,
            Err(error) => {
                ended.cancelled().await;
                self.count_failure();
                return Err(error.into());
            }
        };
        // It answers only after it has published what it found in the log; before, its metrics say
        // that it knows nothing, and would be believed.
        if let Err(fatal) = raft.is_initialized().await {
            stop(raft, &ended, self.log.group_id()).await;
            self.count_failure();
            return Err(OpenError::Raft(fatal.to_string()).into());
        }
        let mut inner = self.lock();
        inner.opened = inner.opened.saturating_add(1);
        inner.users = inner.users.saturating_add(1);
        inner.last_used = Instant::now();
        let watch = watch_leadership(
            &raft,
            self.state.clone(),
            Arc::downgrade(&self),
            inner.opened,
        );
        inner.seat = Seat::Open(Running {
            raft: raft.clone(),
            number: inner.opened,
            watcher: tokio::spawn(watch).abort_handle(),
            closing,
            ended,
        });
        drop(inner);
        Ok(RaftHandle {
            raft,
            engine: self.clone(),
        })
    }

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

    /// Closes the instance if the replica has been at rest for `idle`. False: it is needed, or there
    /// is none.
    pub async fn close_if_idle(self: &Arc<Self>, idle: Duration) -> bool {
        let engine = self.clone();
        let close = async move {
            let _turn = engine.turn.lock().await;
            let Some(running) = engine.take_if_idle(idle) else {
                return false;
            };
            engine.finish(running).await;
            engine.state.save();
            engine.vacate();
            true
        };
        tokio::spawn(close).await.unwrap_or(false)
    }

    /// Closes the instance whatever it does, so that the replica leads no more; it is opened again
    /// when it is needed.
    pub async fn step_down(self: &Arc<Self>) {
        let engine = self.clone();
        let close = async move {
            let _turn = engine.turn.lock().await;
            let Some(running) = engine.take(Seat::Closing) else {
                return;
            };
            engine.finish(running).await;
            engine.state.save();
            let at_rest = engine.leadership_at_rest();
            engine.state.update_leadership(|now| *now = at_rest);
            engine.vacate();
        };
        // It fails only where the runtime is shutting down.
        let _ = tokio::spawn(close).await;
    }

    /// Closes the instance for good.
    pub async fn shut_down(self: &Arc<Self>) {
        let engine = self.clone();
        let close = async move {
            let _turn = engine.turn.lock().await;
            if let Some(running) = engine.take(Seat::Closed) {
                engine.finish(running).await;
            }
        };
        let _ = tokio::spawn(close).await;
    }

    pub fn status(&self) -> EngineStatus {
        let inner = self.lock();
        match inner.seat {
            Seat::Open(_) => EngineStatus::Open,
            Seat::Empty | Seat::Closing if inner.retry_at.is_some_and(|at| Instant::now() < at) => {
                EngineStatus::Failed
            }
            Seat::Empty | Seat::Closing => EngineStatus::AtRest,
            Seat::Closed => EngineStatus::Closed,
        }
    }

    /// How many instances there have been.
    pub fn opened(&self) -> u64 {
        self.lock().opened
    }

    /// How long nobody has used the replica's Raft. Zero while somebody does.
    pub fn idle_for(&self) -> Duration {
        let inner = self.lock();
        match inner.users {
            0 => inner.last_used.elapsed(),
            _ => Duration::ZERO,
        }
    }

    /// The vote that the replica holds, as its Raft would start with it.
    pub fn vote(&self) -> Vote {
        let inner = self.lock();
        match &inner.seat {
            Seat::Open(running) => running.raft.server_metrics().borrow_watched().vote,
            _ => self.vote_at_rest(),
        }
    }

    /// What openraft publishes of the open instance's log; the receiver does not keep it open.
    pub fn data_metrics(&self) -> Option<DataMetrics> {
        match &self.lock().seat {
            Seat::Open(running) => Some(running.raft.data_metrics()),
            _ => None,
        }
    }

    /// Answers a leader's message that asks nothing of a replica at rest, as its Raft would: it holds
    /// the leader's very vote, has what comes before, and knows all of it to be committed. None: it
    /// must be opened for this.
    pub fn answer_at_rest(
        &self,
        request: &AppendEntriesRequest<TypeConfig>,
    ) -> Option<StreamAppendResult<TypeConfig>> {
        // Held until all is compared, so that nothing is opened meanwhile.
        let inner = self.lock();
        let at_rest = matches!(inner.seat, Seat::Empty) && request.entries.is_empty();
        if !at_rest || !request.vote.committed || request.vote != self.vote_at_rest() {
            return None;
        }
        if let Some(prev) = &request.prev_log_id {
            let term = self.log.term_at(prev.index).ok().flatten()?;
            if term != codec::term(prev) || self.log.durable_index() < Some(prev.index) {
                return None;
            }
        }
        let commit = request.leader_commit.map(|log_id| log_id.index);
        (commit <= self.log.committed()).then_some(Ok(request.prev_log_id))
    }

    /// Answers a pre-vote from the log alone, as Raft does where there is no leader (dissertation, section
    /// 9.6): nothing is promised by it, so nothing has to be opened or written.
    pub fn answer_pre_vote(&self, request: &VoteRequest<TypeConfig>) -> VoteResponse<TypeConfig> {
        let vote = self.vote();
        let last = self.log.last_entry_id();
        let last_log_id = last.map(|(index, term)| codec::log_id(term, index));
        let granted = request.vote >= vote && request.last_log_id >= last_log_id;
        VoteResponse::new(vote, last_log_id, granted)
    }

    /// For append sessions: uses instance `number` once more. False: it takes nothing more.
    pub(super) fn enter(&self, number: u64) -> bool {
        let mut inner = self.lock();
        let open = matches!(&inner.seat, Seat::Open(running) if running.number == number);
        if open {
            inner.users = inner.users.saturating_add(1);
        }
        open
    }

    pub(super) fn leave(&self, count: usize) {
        let mut inner = self.lock();
        inner.users = inner.users.saturating_sub(count);
        inner.last_used = Instant::now();
    }

    /// The number of the open instance, and what tells that it closes.
    pub(super) fn instance(&self) -> Option<(u64, CancellationToken)> {
        match &self.lock().seat {
            Seat::Open(running) => Some((running.number, running.closing.clone())),
            _ => None,
        }
    }

    fn take_if_idle(&self, idle: Duration) -> Option<Running> {
        let mut inner = self.lock();
        let Seat::Open(running) = &inner.seat else {
            return None;
        };
        if inner.users > 0 || inner.last_used.elapsed() < idle || !self.is_settled(&running.raft) {
            return None;
        }
        match std::mem::replace(&mut inner.seat, Seat::Closing) {
            Seat::Open(running) => Some(running),
            _ => None,
        }
    }

    /// It follows a leader, and all that it has is durable, committed and applied; and everybody
    /// here knows so.
    fn is_settled(&self, raft: &Raft) -> bool {
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

    /// Takes the open instance out; leaves `seat` in any case, unless it is closed for good.
    fn take(&self, seat: Seat) -> Option<Running> {
        let mut inner = self.lock();
        match std::mem::replace(&mut inner.seat, Seat::Closed) {
            Seat::Closed => None,
            Seat::Open(running) => {
                inner.seat = seat;
                Some(running)
            }
            Seat::Empty | Seat::Closing => {
                inner.seat = match seat {
                    Seat::Closed => Seat::Closed,
                    _ => Seat::Empty,
                };
                None
            }
        }
    }

    async fn finish(&self, running: Running) {
        running.watcher.abort();
        running.closing.cancel();
        stop(running.raft, &running.ended, self.log.group_id()).await;
    }

    /// Nothing is open any more, and may be opened again.
    fn vacate(&self) {
        let mut inner = self.lock();
        if !matches!(inner.seat, Seat::Closed) {
            inner.seat = Seat::Empty;
        }
    }

    /// An instance ended by itself: its storage failed, or openraft did. Peers elect another leader;
    /// this replica tries again, later each time.
    async fn reopen(self: Arc<Self>, number: u64) {
        {
            let _turn = self.turn.lock().await;
            if self.instance().is_none_or(|(open, _)| open != number) {
                return;
            }
            let Some(running) = self.take(Seat::Closing) else {
                return;
            };
            let reason = match &running.raft.metrics().borrow_watched().running_state {
                Ok(()) => "unknown".to_owned(),
                Err(fatal) => fatal.to_string(),
            };
            self.finish(running).await;
            let wait = self.count_failure();
            error!(
                raft_group_id = self.log.group_id().0,
                replica_id = %self.replica_id,
                reason,
                reopened_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                "a replica's raft stopped by itself; it is opened again"
            );
            self.vacate();
        }
        loop {
            let retry_at = self.lock().retry_at.unwrap_or_else(Instant::now);
            tokio::time::sleep_until(retry_at).await;
            match self.wake().await {
                Ok(_) | Err(WakeError::Closed) => return,
                Err(error) => warn!(
                    raft_group_id = self.log.group_id().0,
                    %error,
                    "a replica's raft cannot be opened again yet"
                ),
            }
        }
    }

    fn count_failure(&self) -> Duration {
        let mut inner = self.lock();
        // One that ran for long has nothing to do with the failure before.
        if inner
            .retry_at
            .is_some_and(|at| at.elapsed() > REOPEN_MAX * 2)
        {
            inner.failures = 0;
        }
        let wait = REOPEN_MIN
            .saturating_mul(1 << inner.failures.min(16))
            .min(REOPEN_MAX);
        inner.failures = inner.failures.saturating_add(1);
        inner.retry_at = Some(Instant::now() + wait);
        wait
    }

    fn stored_vote(&self) -> Option<Vote> {
        let bytes = self.log.vote()?;
        // What this process wrote, or checked when it first opened the log.
        codec::decode_vote(&bytes).ok()
    }

    /// As Raft starts with it: a leader that was stopped does not lead on.
    fn vote_at_rest(&self) -> Vote {
        let mut vote = self.stored_vote().unwrap_or(Vote {
            leader_id: LeaderId::new(0, self.replica_id),
            committed: false,
        });
        vote.committed &= vote.leader_id.voted_for != self.replica_id;
        vote
    }

    fn leadership_at_rest(&self) -> Leadership {
        let vote = self.vote_at_rest();
        Leadership {
            leader: vote.committed.then_some(vote.leader_id.voted_for),
            leader_epoch: epoch(vote.leader_id.term),
            is_leader: false,
            ready: false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until nothing of the instance is left.
async fn stop(raft: Raft, ended: &CancellationToken, raft_group_id: RaftGroupId) {
    if let Err(error) = raft.shutdown().await {
        warn!(%raft_group_id, %error, "raft stopped with an error");
    }
    drop(raft);
    ended.cancelled().await;
}

/// A term beyond Kafka's range cannot append: the log store refuses it.
fn epoch(term: u64) -> LeaderEpoch {
    LeaderEpoch::try_from(term).unwrap_or(LeaderEpoch(i32::MAX))
}

/// Publishes who leads, from openraft's own view, until Raft stops. Holds nothing of the instance.
fn watch_leadership(
    raft: &Raft,
    state: Arc<ReplicaState>,
    engine: Weak<Engine>,
    number: u64,
) -> impl Future<Output = ()> + Send + use<> {
    let mut metrics = raft.server_metrics();
    async move {
        loop {
            let now = {
                let metrics = metrics.borrow_and_update();
                let is_leader = metrics.state == ServerState::Leader;
                let leader = if is_leader {
                    Some(metrics.id)
                } else {
                    metrics.current_leader
                };
                Leadership {
                    leader: leader.filter(|leader| is_leader || *leader != metrics.id),
                    leader_epoch: epoch(metrics.vote.leader_id.term),
                    is_leader,
                    ready: false,
                }
            };
            state.update_leadership(|leadership| *leadership = now);
            if metrics.changed().await.is_err() {
                break;
            }
        }
        state.update_leadership(|leadership| *leadership = Leadership::default());
        if let Some(engine) = engine.upgrade() {
            // Not in this task, which the closing ends.
            tokio::spawn(engine.reopen(number));
        }
    }
}

/// A replica's open Raft instance; it stays open while there is a handle. Not to be kept.
pub struct RaftHandle {
    raft: Raft,
    engine: Arc<Engine>,
}

impl Deref for RaftHandle {
    type Target = Raft;

    fn deref(&self) -> &Raft {
        &self.raft
    }
}

impl Drop for RaftHandle {
    fn drop(&mut self) {
        self.engine.leave(1);
    }
}
