//! The Raft instance of one replica: opened when something needs it, closed while the replica rests.
//!
//! ```text
//!           wake                    close_if_idle, step_down, or it ended by itself
//!   Empty --------> Open ---------------------------------> Closing --------> Empty
//!
//!   shut_down, from any of them: Closed, for good
//! ```
//!
//! Opening and closing are here, since they share the turn. Around them:
//! - `handle` counts who uses the open instance, and so keeps it open.
//! - `watch` publishes what the instance says of leadership, and opens another one where it ended by
//!   itself; later each time, as `backoff` says.
//! - `rest` tells when a replica may rest, and what its log says meanwhile.
//! - `follower` votes and follows a new leader without an instance.
//! - `candidate` wins an election, and `leader` leads a group that nobody uses, without an instance.
//!
//! Invariants:
//! - There is at most one instance of a replica at any time. Opening and closing take turns, and a
//!   new instance starts only after the state machine of the one before is gone.
//! - An instance is closed for rest only if all that this replica has is durable, committed and
//!   applied, it follows a known leader or leads followers that have it too or are away, and nobody uses it. What it
//!   promised (its vote) is on disk.
//! - Nothing is lost by rest: whoever holds a `RaftHandle` keeps the instance open, and whoever comes
//!   later opens it again.

mod backoff;
mod candidate;
mod follower;
mod handle;
mod leader;
mod rest;
mod watch;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chronik_storage::PartitionLog;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use futures::future::BoxFuture;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

use self::backoff::Backoff;
use self::leader::RestingLeader;
use self::watch::watch_leadership;
use super::OpenError;
use super::raft_config::Raft;
use super::state_machine::ReplicaState;

pub use candidate::Candidacy;
pub use handle::RaftHandle;

/// Starts an instance over the replica's log and state.
pub type Start =
    Box<dyn Fn(Beginning) -> BoxFuture<'static, Result<Raft, OpenError>> + Send + Sync>;

/// How an instance starts.
pub struct Beginning {
    /// It leads on in the term of the vote that is stored.
    pub leads_on: bool,
    /// Dropped with its state machine.
    pub ended: DropGuard,
    /// Tells that the instance is being closed.
    pub closing: CancellationToken,
}

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
    watcher: JoinHandle<()>,
    /// Tells the feeds of append sessions, and appends that wait for room, that this instance takes
    /// nothing more.
    closing: CancellationToken,
    /// The state machine is gone.
    ended: CancellationToken,
    /// What was known of its followers before it was opened, if it leads on.
    floor: Option<RestingLeader>,
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
    backoff: Backoff,
}

/// One per replica, for as long as the replica.
pub struct Engine {
    replica_id: ReplicaId,
    log: PartitionLog,
    state: Arc<ReplicaState>,
    start: Start,
    inner: Mutex<Inner>,
    /// Set where this process leads without an instance. Taken after `inner`, if both are.
    leads: Mutex<Option<RestingLeader>>,
    /// Held while an instance is opened or closed, and while a replica at rest writes.
    turn: tokio::sync::Mutex<()>,
}

impl Engine {
    /// The log that Raft keeps its entries in.
    pub(super) fn log(&self) -> &PartitionLog {
        &self.log
    }

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
            backoff: Backoff::default(),
        };
        let engine = Engine {
            replica_id,
            log,
            state,
            start,
            inner: Mutex::new(inner),
            leads: Mutex::new(None),
            turn: tokio::sync::Mutex::new(()),
        };
        let at_rest = engine.leadership_at_rest();
        engine
            .state
            .update_leadership(|leadership| *leadership = at_rest);
        Arc::new(engine)
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
            if inner.backoff.is_waiting() {
                return Err(WakeError::Failed);
            }
        }
        let (closing, ended) = (CancellationToken::new(), CancellationToken::new());
        let beginning = Beginning {
            leads_on: self.may_lead_on(),
            ended: ended.clone().drop_guard(),
            closing: closing.clone(),
        };
        let raft = match (self.start)(beginning).await {
            Ok(raft) => raft,
            Err(error) => {
                ended.cancelled().await;
                self.not_opened();
                return Err(error.into());
            }
        };
        // It answers only after it has published what it found in the log; before, its metrics say
        // that it knows nothing, and would be believed.
        if let Err(fatal) = raft.is_initialized().await {
            stop(raft, &ended, self.log.group_id()).await;
            self.not_opened();
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
            watcher: tokio::spawn(watch),
            closing,
            ended,
            // Whether it leads, it says itself from now on.
            floor: self.leads().take(),
        });
        drop(inner);
        Ok(RaftHandle {
            raft,
            engine: self.clone(),
        })
    }

    /// Closes the instance if the replica has been at rest for `idle`. False: it is needed, or there
    /// is none. Replicas of brokers that are `away` may lack something: a leader speaks to them when they are
    /// back.
    pub async fn close_if_idle(
        self: &Arc<Self>,
        idle: Duration,
        away: &Arc<BTreeSet<BrokerId>>,
    ) -> bool {
        let (engine, away) = (self.clone(), away.clone());
        let close = async move {
            let _turn = engine.turn.lock().await;
            let Some(running) = engine.take_if_idle(idle, &away) else {
                return false;
            };
            engine.finish(running).await;
            engine.state.save();
            // Something may have come in until it was closed.
            if !engine.may_lead_on() {
                engine.lead_no_more_at_rest();
            }
            engine.publish_at_rest();
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
            engine.lead_no_more_at_rest();
            if let Some(running) = engine.take(Seat::Closing) {
                engine.finish(running).await;
                engine.state.save();
            }
            if engine.status() != EngineStatus::Closed {
                engine.publish_at_rest();
            }
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
            engine.lead_no_more_at_rest();
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
            Seat::Empty | Seat::Closing if inner.backoff.is_waiting() => EngineStatus::Failed,
            Seat::Empty | Seat::Closing => EngineStatus::AtRest,
            Seat::Closed => EngineStatus::Closed,
        }
    }

    /// How many instances there have been.
    pub fn opened(&self) -> u64 {
        self.lock().opened
    }

    fn take_if_idle(&self, idle: Duration, away: &BTreeSet<BrokerId>) -> Option<Running> {
        let mut inner = self.lock();
        let Seat::Open(running) = &inner.seat else {
            return None;
        };
        if inner.users > 0 || inner.last_used.elapsed() < idle {
            return None;
        }
        if !self.is_settled(&running.raft) && !self.rest_as_leader(running, away) {
            return None;
        }
        match std::mem::replace(&mut inner.seat, Seat::Closing) {
            Seat::Open(running) => Some(running),
            _ => None,
        }
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
        // It may be in the middle of publishing; an error says that it was aborted.
        let _ = running.watcher.await;
        running.closing.cancel();
        stop(running.raft, &running.ended, self.log.group_id()).await;
    }

    /// An instance did not start. Without one nobody can lead on.
    fn not_opened(&self) {
        self.lock().backoff.count_failure();
        self.lead_no_more_at_rest();
        self.publish_at_rest();
    }

    /// Nothing is open any more, and may be opened again.
    fn vacate(&self) {
        let mut inner = self.lock();
        if !matches!(inner.seat, Seat::Closed) {
            inner.seat = Seat::Empty;
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
