//! The Raft node: start, propose, who leads, stop.
//!
//! Invariants: a proposal ends as applied, as certainly not appended, or as unknown; never as a
//! success that a majority does not hold. Until it is decided as whom this controller takes part, it
//! does not: no vote, no entry.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use openraft::errors::{ClientWriteError, RaftError};
use openraft::type_config::async_runtime::WatchReceiver;
use openraft::{Raft, ServerState, SnapshotPolicy};
use tokio::sync::{Notify, watch};

use super::introduction;
use super::log_bound::bound_log;
use super::log_store::LogStore;
use super::network::{Network, RaftRpc};
use super::state_machine::StateMachine;
use super::type_config::{Proposal, TypeConfig};
use crate::command::{Command, Outcome};
use crate::config::Config;
use crate::db::{Contents, Db, DbError};
use crate::founding::{Identity, NodeId, Standing};
use crate::image_feed::ImageFeed;
use crate::peers::Peers;
use crate::state::StateDump;

/// Longest wait for a successor when the leader stops.
const HANDOVER_TIMEOUT: Duration = Duration::from_millis(1500);
/// Between two looks whether the peers of a new group take part, which is a matter of milliseconds.
const FIRST_CONTACT_RETRY: Duration = Duration::from_millis(10);

pub type ControllersRaft = Raft<TypeConfig, StateMachine>;

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
    inner: Arc<Inner>,
}

struct Inner {
    controller_id: u64,
    write_timeout: Duration,
    peers: Peers,
    leadership: watch::Receiver<Leadership>,
    /// Set once, when it takes part.
    member: OnceLock<(NodeId, ControllersRaft)>,
    standing: Mutex<Standing>,
    /// Peers that are waited for before it is decided who this controller is.
    awaited: Mutex<BTreeSet<u64>>,
    awaited_came: Notify,
    /// Held while a step of a membership change is done.
    membership_lock: tokio::sync::Mutex<()>,
}

/// A node that does not take part yet.
pub struct Unstarted {
    node: RaftNode,
    config: openraft::Config,
    log_store: LogStore,
    log_bytes_max: u64,
    machine: StateMachine,
    leadership: watch::Sender<Leadership>,
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

impl Unstarted {
    pub fn node(&self) -> &RaftNode {
        &self.node
    }

    /// Begins to take part as decided, which is on disk already.
    pub async fn start(self, identity: Identity) -> Result<(), RaftStartError> {
        let Some(node_id) = identity.node_id else {
            return Err(RaftStartError::Raft("it is not decided who this is".into()));
        };
        // Told before anything is voted for: who hears "empty" may found a group.
        lock(&self.node.inner.standing).identity = identity;
        let growth = self.log_store.growth();
        let raft = Raft::new(
            node_id.to_raft(),
            Arc::new(self.config),
            Network::new(self.node.inner.peers.clone()),
            self.log_store,
            self.machine,
        )
        .await
        .map_err(|error| RaftStartError::Raft(error.to_string()))?;
        watch_leadership(node_id, &raft, self.leadership);
        // `self` is consumed, so it is the first.
        let _ = self.node.inner.member.set((node_id, raft.clone()));
        let ended = self.node.leadership();
        tokio::spawn(bound_log(raft, growth, self.log_bytes_max, ended));
        Ok(())
    }
}

impl RaftNode {
    /// Recovers from the database. `base` is what a group would be founded on.
    pub fn prepare(
        config: &Config,
        peers: Peers,
        db: Db,
        mut contents: Contents,
        base: String,
    ) -> Result<(Unstarted, ImageFeed), RaftStartError> {
        let standing = Standing {
            identity: contents.identity.clone(),
            base,
            group: config.group().iter().map(|c| c.id).collect(),
        };
        let log_store = LogStore::new(db.clone(), &mut contents)?;
        let (machine, feed) = StateMachine::new(db, &mut contents, config.watch_history_max)?;
        let (leadership, watched) = watch::channel(Leadership::Unknown);
        let inner = Inner {
            controller_id: config.controller_id,
            write_timeout: config.write_timeout(),
            peers,
            leadership: watched,
            member: OnceLock::new(),
            standing: Mutex::new(standing),
            awaited: Mutex::default(),
            awaited_came: Notify::new(),
            membership_lock: tokio::sync::Mutex::default(),
        };
        let unstarted = Unstarted {
            node: RaftNode {
                inner: Arc::new(inner),
            },
            config: raft_config(config).map_err(RaftStartError::Config)?,
            log_store,
            log_bytes_max: config.raft.snapshot_log_bytes,
            machine,
            leadership,
        };
        Ok((unstarted, feed))
    }

    pub fn controller_id(&self) -> u64 {
        self.inner.controller_id
    }

    /// As whom this controller takes part, and its Raft; none: it does not yet.
    pub(super) fn member(&self) -> Option<(NodeId, &ControllersRaft)> {
        self.inner.member.get().map(|(id, raft)| (*id, raft))
    }

    pub(super) fn peers(&self) -> &Peers {
        &self.inner.peers
    }

    pub(super) fn membership_lock(&self) -> &tokio::sync::Mutex<()> {
        &self.inner.membership_lock
    }

    /// What this controller tells of itself.
    pub fn standing(&self) -> Standing {
        lock(&self.inner.standing).clone()
    }

    /// A peer that asks is up, so it can be asked at once what it was waited for to answer.
    pub(super) fn heard_from(&self, peer: u64) {
        if lock(&self.inner.awaited).remove(&peer) {
            self.inner.awaited_came.notify_one();
        }
    }

    /// Names the peers whose questions `awaited_came` waits for from now on.
    pub fn expect(&self, awaited: BTreeSet<u64>) {
        *lock(&self.inner.awaited) = awaited;
    }

    pub async fn awaited_came(&self) {
        self.inner.awaited_came.notified().await;
    }

    /// Writes the first membership if the group has none. Every founder does so with the same
    /// voters, so the first entry is the same everywhere, whoever starts first.
    pub async fn found_group(&self, config: &Config) -> Result<(), RaftStartError> {
        let Some((_, raft)) = self.member() else {
            return Ok(());
        };
        let initialized = raft.is_initialized().await;
        if initialized.map_err(|error| RaftStartError::Raft(error.to_string()))? {
            return Ok(());
        }
        let group = config.group();
        let voters: BTreeSet<u64> = group
            .iter()
            .map(|c| NodeId::founder(c.id).to_raft())
            .collect();
        match raft.initialize(voters).await {
            // Refused: the leader of the group was faster and has written to this log.
            Ok(()) | Err(RaftError::APIError(_)) => Ok(()),
            Err(RaftError::Fatal(error)) => Err(RaftStartError::Raft(error.to_string())),
        }
    }

    /// Asks for the first election as soon as a majority takes part, instead of waiting for a
    /// timeout. Only the lowest id does so: two at once would split the votes.
    pub async fn campaign_first(&self, config: &Config) {
        let group = config.group();
        let own_id = self.inner.controller_id;
        let mut waiting: Vec<u64> = group
            .iter()
            .map(|c| c.id)
            .filter(|id| *id != own_id)
            .collect();
        let Some((_, raft)) = self.member() else {
            return;
        };
        if waiting.iter().any(|peer| *peer < own_id) {
            return;
        }
        let majority = group.len() / 2 + 1;
        while *self.inner.leadership.borrow() == Leadership::Unknown {
            let asked = futures::future::join_all(waiting.into_iter().map(async |peer| {
                let channel = self.inner.peers.channel(peer)?;
                let answer = introduction::describe(channel, own_id, peer).await;
                (!answer.is_ok_and(|answer| answer.takes_part)).then_some(peer)
            }));
            waiting = asked.await.into_iter().flatten().collect();
            if group.len() - waiting.len() >= majority {
                // An error means that Raft has stopped; `failed` tells the process.
                let _ = raft.trigger().elect(true).await;
                return;
            }
            tokio::time::sleep(FIRST_CONTACT_RETRY).await;
        }
    }

    /// Has the command applied by the group and returns its answer.
    pub async fn propose(&self, command: &Command) -> Result<Outcome, ProposeError> {
        let proposal = Proposal::encode(command)
            .map_err(|error| ProposeError::Unencodable(error.to_string()))?;
        let Some((_, raft)) = self.member() else {
            return Err(ProposeError::NotLeader);
        };
        let write = raft.client_write(proposal);
        match tokio::time::timeout(self.inner.write_timeout, write).await {
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
        self.inner.leadership.clone()
    }

    pub fn status(&self) -> RaftStatus {
        let Some((_, raft)) = self.member() else {
            return RaftStatus::default();
        };
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        RaftStatus {
            term: metrics.current_term,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            applied_log_index: metrics.last_applied.map_or(0, |id| id.index),
            snapshot_log_index: metrics.snapshot.map_or(0, |id| id.index),
            purged_log_index: metrics.purged.map_or(0, |id| id.index),
        }
    }

    /// The applied state; none: nothing is applied yet.
    pub async fn dump(&self) -> Result<Option<StateDump>, String> {
        let Some((_, raft)) = self.member() else {
            return Ok(None);
        };
        let snapshot = raft
            .get_snapshot()
            .await
            .map_err(|error| error.to_string())?;
        Ok(snapshot.map(|snapshot| snapshot.snapshot))
    }

    /// The service for the other controllers.
    pub fn rpc(&self) -> RaftRpc {
        RaftRpc { node: self.clone() }
    }

    /// Resolves when Raft has stopped by itself, with the reason: the process has to stop.
    pub async fn failed(&self) -> String {
        let mut leadership = self.leadership();
        // The watching task ends with Raft's core.
        while leadership.changed().await.is_ok() {}
        let error = self.member().and_then(|(_, raft)| {
            let metrics = raft.metrics();
            metrics.borrow_watched().running_state.clone().err()
        });
        error.map_or_else(|| "raft stopped".to_owned(), |error| error.to_string())
    }

    /// Hands leadership over if it is here, so that the others need not wait for a timeout.
    pub async fn hand_over(&self) {
        let Leadership::Local { .. } = *self.inner.leadership.borrow() else {
            return;
        };
        let Some((_, raft)) = self.member() else {
            return;
        };
        let Some(successor) = self.best_follower() else {
            return;
        };
        let mut leadership = self.leadership();
        let handover = async {
            raft.trigger().transfer_leader(successor).await.ok()?;
            let remote = |l: &Leadership| matches!(l, Leadership::Remote { .. });
            leadership.wait_for(remote).await.ok().map(|_| ())
        };
        let outcome = tokio::time::timeout(HANDOVER_TIMEOUT, handover).await;
        let handed_over = matches!(outcome, Ok(Some(())));
        let successor = NodeId::of_raft(successor);
        tracing::info!(%successor, handed_over, "stops leading the controllers");
    }

    pub async fn shut_down(&self) {
        if let Some((_, raft)) = self.member()
            && let Err(error) = raft.shutdown().await
        {
            tracing::warn!(%error, "raft did not stop in order");
        }
    }

    /// A voter that has all of the log.
    fn best_follower(&self) -> Option<u64> {
        let (own_id, raft) = self.member()?;
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let last = metrics.last_log_index;
        let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
        metrics
            .replication
            .iter()
            .flatten()
            .filter(|(id, _)| **id != own_id.to_raft() && voters.contains(id))
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
        // A leader sends an entry to the others before its own disk has it. Killed in between and
        // back before anybody missed it, it would give the entry's index to another one in the same
        // term, and the controllers would hold different states for ever.
        enable_leader_restore: Some(false),
        // Against a partial partition that keeps a leader without a majority: needs > 3 voters.
        quorum_loss_probe_interval: (config.controllers.len() > 3)
            .then(|| raft.election_timeout_max_ms.saturating_mul(3)),
        ..Default::default()
    }
    .validate()
    .map_err(|error| error.to_string())
}

/// Follows who leads; ends when Raft's core ends.
fn watch_leadership(own_id: NodeId, raft: &ControllersRaft, leadership: watch::Sender<Leadership>) {
    let mut metrics = raft.server_metrics();
    let own_id = own_id.to_raft();
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
                    Some(id) if id != own_id => Leadership::Remote {
                        controller_id: NodeId::of_raft(id).controller_id(),
                    },
                    _ => Leadership::Unknown,
                }
            };
            leadership.send_if_modified(|known| std::mem::replace(known, current) != current);
            if metrics.changed().await.is_err() {
                return;
            }
        }
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
