//! Whether this replica leads still, as a majority of the voters says.
//!
//! Invariant: a replica is only confirmed as the leader by answers to what was sent after the question;
//! so nobody else led when it was asked. A lease is good for writes alone, which a majority has to take anyway.

use std::time::Duration;

use chronik_types::epoch::LeaderEpoch;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::Fatal;
use openraft::raft::linearizable_read::LinearizerOption;
use tokio::time::{Instant, timeout, timeout_at};

use super::Replica;
use super::error::AppendError;
use super::raft_config::TypeConfig;

/// How long a majority may take to say who leads, before a client is told to look for the leader. Shorter than
/// gateways wait for an answer beyond what the client allows (1 s).
const CONFIRM_TIMEOUT: Duration = Duration::from_millis(500);

pub(super) fn stopped(fatal: &Fatal<TypeConfig>) -> AppendError {
    match fatal {
        Fatal::StorageError(_) | Fatal::Panicked => AppendError::Storage,
        Fatal::Stopped => AppendError::NotLeader { leader: None },
    }
}

impl Replica {
    /// A leader that has not heard from a majority for a while (a resting group sends no heartbeats) asks
    /// it before it writes again.
    pub async fn renew_lease(&self, deadline: Instant) -> Result<(), AppendError> {
        let Some(raft) = self.leading_raft().await else {
            return Err(self.not_leader());
        };
        let mut metrics = raft.data_metrics();
        let acked_before = metrics.borrow_and_update().last_quorum_acked;
        let mut leadership = self.state.leadership.subscribe();
        loop {
            if let Err(fatal) = raft.trigger().heartbeat().await {
                return Err(stopped(&fatal));
            }
            let retry_at = deadline.min(Instant::now() + self.heartbeat_interval);
            let renewed = async {
                while metrics.borrow_and_update().last_quorum_acked <= acked_before {
                    if metrics.changed().await.is_err() {
                        return false;
                    }
                }
                true
            };
            tokio::select! {
                biased;
                () = async { drop(leadership.wait_for(|l| !l.is_leader).await) } => {
                    return Err(self.not_leader());
                }
                renewed = timeout_at(retry_at, renewed) => match renewed {
                    Ok(true) => return Ok(()),
                    Ok(false) => return Err(AppendError::NotLeader { leader: None }),
                    Err(_) if Instant::now() >= deadline => return Err(AppendError::TimedOut),
                    Err(_) => {}
                }
            }
        }
    }

    /// Whether this replica leads in the epoch still, and nobody has led after it: a majority is asked. False also
    /// where that cannot be told soon.
    ///
    /// Its own state does not tell: a leader whose Raft waits for its disk goes on for a while without knowing that
    /// another one was elected.
    pub async fn leads_still(&self, leader_epoch: LeaderEpoch) -> bool {
        let Some(raft) = self.leading_raft().await else {
            return false;
        };
        let option =
            LinearizerOption::new(Some(Duration::ZERO), true).with_wait_timeout(CONFIRM_TIMEOUT);
        match timeout(CONFIRM_TIMEOUT, raft.get_read_linearizer(option)).await {
            Ok(Ok(answer)) => {
                let term = answer.read_log_id().committed_leader_id().term;
                i64::try_from(term) == Ok(i64::from(leader_epoch.0))
            }
            Ok(Err(_)) | Err(_) => false,
        }
    }
}
