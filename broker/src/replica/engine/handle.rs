//! Who uses a replica's open Raft instance.
//!
//! Invariant: each use is counted once, under the lock that guards the instance, and given back once;
//! so what is in use is not closed for rest.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Engine, Inner, Seat};
use crate::replica::raft_config::Raft;

/// A replica's open Raft instance; it stays open while there is a handle. Not to be kept.
pub struct RaftHandle {
    pub(super) raft: Raft,
    /// Who makes a handle has counted it.
    pub(super) engine: Arc<Engine>,
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

impl Engine {
    /// The instance, if it is open; kept open while the handle lives.
    pub fn running(self: &Arc<Self>) -> Option<RaftHandle> {
        self.handle(&mut self.lock())
    }

    /// As `running`; the instance of a replica that leads at rest is opened. None: it follows, or has stopped.
    pub async fn leading(self: &Arc<Self>) -> Option<RaftHandle> {
        {
            // One look: a leader that is being opened or closed is the one or the other.
            let mut inner = self.lock();
            let open = self.handle(&mut inner);
            if open.is_some() || !self.leads_at_rest() {
                return open;
            }
        }
        self.wake().await.ok()
    }

    fn handle(self: &Arc<Self>, inner: &mut Inner) -> Option<RaftHandle> {
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

    /// For append sessions: uses instance `number` once more. False: it takes nothing more.
    pub(in crate::replica) fn enter(&self, number: u64) -> bool {
        let mut inner = self.lock();
        let open = matches!(&inner.seat, Seat::Open(running) if running.number == number);
        if open {
            inner.users = inner.users.saturating_add(1);
        }
        open
    }

    pub(in crate::replica) fn leave(&self, count: usize) {
        let mut inner = self.lock();
        inner.users = inner.users.saturating_sub(count);
        inner.last_used = Instant::now();
    }

    /// How long nobody has used the replica's Raft. Zero while somebody does.
    pub fn idle_for(&self) -> Duration {
        let inner = self.lock();
        match inner.users {
            0 => inner.last_used.elapsed(),
            _ => Duration::ZERO,
        }
    }

    /// The number of the open instance, and what tells that it closes.
    pub(in crate::replica) fn instance(&self) -> Option<(u64, CancellationToken)> {
        match &self.lock().seat {
            Seat::Open(running) => Some((running.number, running.closing.clone())),
            _ => None,
        }
    }
}
