//! What an open Raft instance tells by itself: who leads, and that it has ended.
//!
//! Invariant: the one who watches holds nothing of the instance; one that ended by itself is closed, and
//! another is opened, unless the replica is closed.

use std::sync::{Arc, Weak};

use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use tracing::{error, warn};

use super::{Engine, Seat, WakeError, epoch};
use crate::replica::Leadership;
use crate::replica::raft_config::Raft;
use crate::replica::state_machine::ReplicaState;

/// Publishes who leads, from openraft's own view, until Raft stops. Holds nothing of the instance.
pub(super) fn watch_leadership(
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

impl Engine {
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
            let wait = self.lock().backoff.count_failure();
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
            let retry_at = self.lock().backoff.retry_at();
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
}
