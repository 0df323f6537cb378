//! The running Raft node: start, propose, who leads, stop.
//!
//! Invariant: a proposal ends as applied, as certainly not appended, or as unknown; never as a
//! success that a majority does not hold.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use openraft::errors::{ClientWriteError, RaftError};
use openraft::type_config::async_runtime::WatchReceiver;
use openraft::{Raft, ServerState, SnapshotPolicy};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::log_store::LogStore;
use super::network::{Network, RaftRpc};
use super::state_machine::StateMachine;
use super::type_config::{Proposal, TypeConfig};
use crate::command::{Command, Outcome};
use crate::config::Config;
use crate::db::{Contents, Db, DbError};
use crate::image_feed::ImageFeed;
use crate::peers::{Peers, endpoint};

/// Longest wait for a successor when the leader stops.
const HANDOVER_TIMEOUT: Duration = Duration::from_millis(1500);
/// Between two attempts to reach the peers of a new group.
const FIRST_CONTACT_RETRY: Duration = Duration::from_millis(50);

/// Who leads, as far as this node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leadership {
    Unknown,
    Local { term: u64 },
    Remote { controller_id: u64 },
}

/// Why a proposal was not applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    #[error("this controller does not lead, or lost its majority; nothing was changed")]
    NotLeader,
    #[error("no majority answered in time; the outcome is unknown")]
    UnknownOutcome,
    #[error("this controller is stopping: {0}")]
    Stopped(String),
    #[error("the command cannot be encoded: {0}")]
    Unencodable(String),
}

/// Numbers for metrics and the REST API.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RaftStatus {
    pub term: u64,
    pub last_log_index: u64,
    pub applied_log_index: u64,
    pub snapshot_log_index: u64,
    pub purged_log_index: u64,
}

/// Handle of the Raft node. Cheap to clone.
#[derive(Clone)]
pub struct RaftNode {
    controller_id: u64,
    raft: Raft<TypeConfig, StateMachine>,
    write_timeout: Duration,
    leadership: watch::Receiver<Leadership>,
}

/// Why the node could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RaftStartError {
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("raft configuration: {0}")]
    Config(String),
    #[error("raft: {0}")]
    Raft(String),
}

impl RaftNode {
    /// Recovers from the database and starts to take part.
    pub async fn start(
        config: &Config,
        peers: Peers,
        db: Db,
        mut contents: Contents,
    ) -> Result<(RaftNode, ImageFeed), RaftStartError> {
        let log_store = LogStore::new(db.clone(), &mut contents)?;
        let (machine, feed) = StateMachine::new(db, &mut contents, config.watch_history_max)?;
        let raft_config = raft_config(config).map_err(RaftStartError::Config)?;
        let network = Network::new(peers);
        let raft = Raft::new(
            config.controller_id,
            Arc::new(raft_config),
            network,
            log_store,
            machine,
        )
        .await
        .map_err(|error| RaftStartError::Raft(error.to_string()))?;
        let leadership = watch_leadership(config.controller_id, &raft);
        let node = RaftNode {
            controller_id: config.controller_id,
            raft,
            write_timeout: config.write_timeout(),
            leadership,
        };
        Ok((node, feed))
    }

    /// Founds the group if this node has never been in one. Every node does so with the same
    /// voters, so the first entry is the same everywhere, whoever starts first. True: it is new.
    pub async fn found_group(&self, config: &Config) -> Result<bool, RaftStartError> {
        let initialized = self.raft.is_initialized().await;
        if initialized.map_err(|error| RaftStartError::Raft(error.to_string()))? {
            return Ok(false);
        }
        let voters: BTreeSet<u64> = config.group().iter().map(|c| c.id).collect();
        match self.raft.initialize(voters).await {
            // Refused: the leader of the group was faster and has written to this log.
            Ok(()) | Err(RaftError::APIError(_)) => Ok(true),
            Err(RaftError::Fatal(error)) => Err(RaftStartError::Raft(error.to_string())),
        }
    }

    /// Asks for the first election as soon as a majority can be reached, instead of waiting for a
    /// timeout. Only the lowest id does so: two at once would split the votes.
    pub async fn campaign_first(&self, config: &Config, stop: CancellationToken) {
        let group = config.group();
        // One alone elects itself at once.
        let is_lowest = group
            .iter()
            .all(|controller| controller.id >= self.controller_id);
        if group.len() == 1 || !is_lowest {
            return;
        }
        let mut waiting: Vec<_> = group
            .iter()
            .filter(|c| c.id != self.controller_id)
            .collect();
        let majority = group.len() / 2 + 1;
        loop {
            let mut unreached = Vec::new();
            for peer in waiting {
                let Ok(endpoint) = endpoint(&peer.rpc_address) else {
                    continue;
                };
                if endpoint.connect().await.is_err() {
                    unreached.push(peer);
                }
            }
            waiting = unreached;
            let leaderless = *self.leadership.borrow() == Leadership::Unknown;
            if !leaderless {
                return;
            }
            if group.len() - waiting.len() >= majority {
                // An error means that Raft has stopped; `failed` tells the process.
                let _ = self.raft.trigger().elect(true).await;
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(FIRST_CONTACT_RETRY) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Has the command applied by the group and returns its answer.
    pub async fn propose(&self, command: &Command) -> Result<Outcome, ProposeError> {
        let proposal = Proposal::encode(command)
            .map_err(|error| ProposeError::Unencodable(error.to_string()))?;
        let write = self.raft.client_write(proposal);
        match tokio::time::timeout(self.write_timeout, write).await {
            Ok(Ok(response)) => Ok(response.data),
            Ok(Err(RaftError::APIError(error))) => Err(match error {
                ClientWriteError::ForwardToLeader(_)
                | ClientWriteError::ChangeMembershipError(_) => ProposeError::NotLeader,
                _ => ProposeError::UnknownOutcome,
            }),
            Ok(Err(RaftError::Fatal(error))) => Err(ProposeError::Stopped(error.to_string())),
            Err(_) => Err(ProposeError::UnknownOutcome),
        }
    }

    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    pub fn status(&self) -> RaftStatus {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        RaftStatus {
            term: metrics.current_term,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            applied_log_index: metrics.last_applied.map_or(0, |id| id.index),
            snapshot_log_index: metrics.snapshot.map_or(0, |id| id.index),
            purged_log_index: metrics.purged.map_or(0, |id| id.index),
        }
    }

    /// The service for the other controllers.
    pub fn rpc(&self) -> RaftRpc {
        RaftRpc {
            controller_id: self.controller_id,
            raft: self.raft.clone(),
        }
    }

    /// Resolves when Raft has stopped by itself, with the reason: the process has to stop.
    pub async fn failed(&self) -> String {
        let mut leadership = self.leadership.clone();
        // The watching task ends with Raft's core.
        while leadership.changed().await.is_ok() {}
        let metrics = self.raft.metrics();
        let state = metrics.borrow_watched().running_state.clone();
        state
            .err()
            .map_or_else(|| "raft stopped".to_owned(), |error| error.to_string())
    }

    /// Hands leadership over if it is here, so that the others need not wait for a timeout.
    pub async fn hand_over(&self) {
        let Leadership::Local { .. } = *self.leadership.borrow() else {
            return;
        };
        let Some(successor) = self.best_follower() else {
            return;
        };
        let mut leadership = self.leadership.clone();
        let handover = async {
            self.raft.trigger().transfer_leader(successor).await.ok()?;
            let remote = |l: &Leadership| matches!(l, Leadership::Remote { .. });
            leadership.wait_for(remote).await.ok().map(|_| ())
        };
        let outcome = tokio::time::timeout(HANDOVER_TIMEOUT, handover).await;
        let handed_over = matches!(outcome, Ok(Some(())));
        tracing::info!(successor, handed_over, "stops leading the controllers");
    }

    pub async fn shut_down(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "raft did not stop in order");
        }
    }

    /// A follower that has all of the log.
    fn best_follower(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let last = metrics.last_log_index;
        metrics
            .replication
            .iter()
            .flatten()
            .filter(|(id, _)| **id != self.controller_id)
            .find(|(_, matching)| matching.map(|log_id| log_id.index) >= last)
            .map(|(id, _)| *id)
    }
}

fn raft_config(config: &Config) -> Result<openraft::Config, String> {
    let raft = &config.raft;
    openraft::Config {
        cluster_name: "chronik-controllers".to_owned(),
        heartbeat_interval: raft.heartbeat_interval_ms,
        election_timeout_min: raft.election_timeout_min_ms,
        election_timeout_max: raft.election_timeout_max_ms,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(raft.snapshot_log_entries),
        max_in_snapshot_log_to_keep: raft.retained_log_entries,
        api_channel_size: Some(1024),
        notification_channel_size: Some(1024),
        state_machine_channel_size: Some(64),
        enable_pre_vote: Some(true),
        // Against a partial partition that keeps a leader without a majority: needs > 3 voters.
        quorum_loss_probe_interval: (config.controllers.len() > 3)
            .then(|| raft.election_timeout_max_ms.saturating_mul(3)),
        ..Default::default()
    }
    .validate()
    .map_err(|error| error.to_string())
}

/// Follows who leads; ends when Raft's core ends.
fn watch_leadership(
    own_id: u64,
    raft: &Raft<TypeConfig, StateMachine>,
) -> watch::Receiver<Leadership> {
    let mut metrics = raft.server_metrics();
    let (sender, receiver) = watch::channel(Leadership::Unknown);
    tokio::spawn(async move {
        loop {
            let current = {
                let metrics = metrics.borrow_watched();
                match metrics.current_leader {
                    Some(id) if id == own_id && metrics.state == ServerState::Leader => {
                        Leadership::Local {
                            term: metrics.vote.leader_id.term,
                        }
                    }
                    Some(id) if id != own_id => Leadership::Remote { controller_id: id },
                    _ => Leadership::Unknown,
                }
            };
            sender.send_if_modified(|known| std::mem::replace(known, current) != current);
            if metrics.changed().await.is_err() {
                return;
            }
        }
    });
    receiver
}
