//! One partition's replica: an openraft group over the partition's log.
//!
//! Invariant: only this module knows how Raft indexes map to offsets. Outside, a partition has
//! offsets, a high watermark and leader epochs.

pub mod codec;
pub mod raft_config;

mod admission;
pub mod append_session;
mod applied;
pub mod engine;
pub mod producer_state;
mod records;
mod traces;
pub mod watermark;

pub mod copy;
pub mod error;
mod growth;
mod in_flight;
mod lease;
pub mod log_start;
pub mod log_store;
mod proposer;
pub mod purge;
mod queue;
pub mod read;
mod rebuild;
mod room;
pub mod state_machine;

#[cfg(test)]
mod engine_test;
#[cfg(test)]
mod log_life_test;
#[cfg(test)]
mod log_store_test;
#[cfg(test)]
mod producer_state_test;
#[cfg(test)]
mod replica_test;
#[cfg(test)]
pub mod test_batches;
#[cfg(test)]
pub mod test_cluster;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use chronik_storage::PartitionLog;
use chronik_types::cluster_image::{Partition, Topic};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use chronik_types::offset::Offset;
use chronik_types::topic_config;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{InitializeError, RaftError};
use openraft::network::{NetSnapshot, RaftNetworkFactory};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use engine::{Beginning, Engine, RaftHandle, WakeError};
use log_store::LogStore;
use queue::Queue;
use state_machine::{ReplicaState, StateMachine};
use watermark::Watermark;

pub use admission::is_corrupt;
pub use error::{AppendError, LeaderHint, LogStartError, OpenError, ReadError};
pub use purge::Upkeep;
pub use queue::{Acks, AppendFuture, Appended, ProduceItem};
pub use raft_config::{Batches, Raft, TypeConfig, Vote};
pub use read::{EpochEnd, ReadRequest, ReadResult, TimestampOffset};

/// What the controller last said about the partition, as far as its replica needs it. `reconcile`
/// publishes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionState {
    pub isr: Vec<BrokerId>,
    pub min_insync_replicas: usize,
    pub max_message_bytes: usize,
    pub log_append_time: bool,
    pub log: LogConfig,
}

/// How long a partition's log keeps what, from the topic's configs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// cleanup.policy has `delete`.
    pub deletes: bool,
    /// cleanup.policy has `compact`.
    pub compacts: bool,
    /// Negative: no limit.
    pub retention_ms: i64,
    /// Negative: no limit.
    pub retention_bytes: i64,
    pub segment_bytes: u64,
    pub segment_ms: i64,
    pub delete_retention_ms: i64,
    pub min_compaction_lag_ms: i64,
    pub max_compaction_lag_ms: i64,
    pub min_cleanable_dirty_thousandths: i64,
}

impl LogConfig {
    fn new(configs: &BTreeMap<String, String>) -> LogConfig {
        let number = |name| topic_config::effective_number(configs, name);
        LogConfig {
            deletes: topic_config::has_cleanup(configs, "delete"),
            compacts: topic_config::has_cleanup(configs, "compact"),
            retention_ms: number(topic_config::RETENTION_MS),
            retention_bytes: number(topic_config::RETENTION_BYTES),
            segment_bytes: u64::try_from(number(topic_config::SEGMENT_BYTES)).unwrap_or(1 << 30),
            segment_ms: number(topic_config::SEGMENT_MS),
            delete_retention_ms: number(topic_config::DELETE_RETENTION_MS),
            min_compaction_lag_ms: number(topic_config::MIN_COMPACTION_LAG_MS),
            max_compaction_lag_ms: number(topic_config::MAX_COMPACTION_LAG_MS),
            min_cleanable_dirty_thousandths: topic_config::effective_thousandths(
                configs,
                topic_config::MIN_CLEANABLE_DIRTY_RATIO,
            ),
        }
    }
}

impl PartitionState {
    pub fn new(topic: &Topic, partition: &Partition) -> PartitionState {
        let number = |name| {
            usize::try_from(topic_config::effective_number(&topic.configs, name)).unwrap_or(0)
        };
        PartitionState {
            isr: partition.isr.clone(),
            min_insync_replicas: number(topic_config::MIN_INSYNC_REPLICAS).max(1),
            max_message_bytes: number(topic_config::MAX_MESSAGE_BYTES),
            log_append_time: topic_config::effective(
                &topic.configs,
                topic_config::MESSAGE_TIMESTAMP_TYPE,
            ) == "LogAppendTime",
            log: LogConfig::new(&topic.configs),
        }
    }
}

/// Who leads, as this replica knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Leadership {
    pub leader: Option<ReplicaId>,
    /// Raft's term.
    pub leader_epoch: LeaderEpoch,
    /// This replica leads.
    pub is_leader: bool,
    /// This replica leads, and has applied the first entry of its own term: its producer state and
    /// high watermark are complete.
    pub ready: bool,
}

/// How far a follower is, as its leader knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FollowerProgress {
    pub replica: ReplicaId,
    /// Last Raft index known to be durable there.
    pub matched: Option<u64>,
}

/// The leader's view of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Last Raft index of the leader's log.
    pub last_index: Option<u64>,
    pub followers: Vec<FollowerProgress>,
}

/// What a replica is made of.
pub struct ReplicaOptions<N> {
    pub replica_id: ReplicaId,
    pub log: PartitionLog,
    pub network: N,
    pub raft_config: Arc<openraft::Config>,
    pub state: watch::Receiver<PartitionState>,
    pub upkeep: Upkeep,
}

/// How long `append_internal` waits for its commit, as Kafka's offsets.commit.timeout.ms.
const INTERNAL_APPEND_TIMEOUT: Duration = Duration::from_secs(5);

/// A replica that runs. Dropped after `shutdown`, by `reconcile`.
pub struct Replica {
    replica_id: ReplicaId,
    log: PartitionLog,
    engine: Arc<Engine>,
    heartbeat_interval: Duration,
    state: Arc<ReplicaState>,
    queue: Queue,
    partition: watch::Receiver<PartitionState>,
}

impl Replica {
    /// Opens the log and starts Raft; a new replica waits for `initialize` or for a leader.
    pub async fn open<N>(options: ReplicaOptions<N>) -> Result<Arc<Replica>, OpenError>
    where
        N: RaftNetworkFactory<TypeConfig> + Clone + Sync,
        N::Network: NetSnapshot<TypeConfig, SnapshotData = Bytes>,
    {
        let replica = Self::open_at_rest(options)?;
        match replica.engine.wake().await {
            Ok(_) => Ok(replica),
            Err(WakeError::Open(error)) => Err(error),
            Err(error) => Err(OpenError::Raft(error.to_string())),
        }
    }

    /// Opens the log only; Raft is started when something needs it.
    pub fn open_at_rest<N>(options: ReplicaOptions<N>) -> Result<Arc<Replica>, OpenError>
    where
        N: RaftNetworkFactory<TypeConfig> + Clone + Sync,
        N::Network: NetSnapshot<TypeConfig, SnapshotData = Bytes>,
    {
        let ReplicaOptions {
            replica_id,
            log,
            network,
            raft_config,
            state: partition,
            upkeep,
        } = options;
        if let Some(vote) = log.vote() {
            codec::decode_vote(&vote)?;
        }
        log.set_segment_bytes(partition.borrow().log.segment_bytes);
        let state = Arc::new(ReplicaState::load(log.clone(), upkeep)?);
        let heartbeat_interval = Duration::from_millis(raft_config.heartbeat_interval);
        let (raft_log, raft_state) = (log.clone(), state.clone());
        let start: engine::Start = Box::new(move |beginning| {
            let Beginning {
                leads_on,
                ended,
                closing,
            } = beginning;
            let log_store = LogStore::new(
                raft_log.clone(),
                raft_state.traces.clone(),
                raft_state.growth.clone(),
                closing,
            );
            let state_machine = StateMachine::new(raft_state.clone()).telling(ended);
            let network = network.clone();
            let config = match leads_on {
                true => raft_config::leading_on(&raft_config),
                false => raft_config.clone(),
            };
            Box::pin(async move {
                Raft::new(replica_id, config, network, log_store, state_machine)
                    .await
                    .map_err(|fatal| OpenError::Raft(fatal.to_string()))
            })
        });
        Ok(Arc::new(Replica {
            replica_id,
            engine: Engine::new(replica_id, log.clone(), state.clone(), start),
            log,
            heartbeat_interval,
            state,
            queue: Queue::default(),
            partition,
        }))
    }

    pub fn replica_id(&self) -> ReplicaId {
        self.replica_id
    }

    pub fn group_id(&self) -> RaftGroupId {
        self.log.group_id()
    }

    /// This replica's Raft, where it runs. It is closed while the replica rests, and stays open while there is
    /// a handle: not to be kept.
    pub fn raft(&self) -> Option<RaftHandle> {
        self.engine.running()
    }

    /// This replica's Raft, opened if it does not run: takes milliseconds.
    pub async fn wake(&self) -> Result<RaftHandle, WakeError> {
        self.engine.wake().await
    }

    /// This replica's Raft if it runs or if it leads: a leader's is opened. None: it follows, or has stopped.
    pub async fn leading_raft(&self) -> Option<RaftHandle> {
        self.engine.leading().await
    }

    /// Opens, closes, and knows what a closed Raft would answer.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The vote that this replica holds.
    pub fn vote(&self) -> Vote {
        self.engine.vote()
    }

    pub fn log(&self) -> &PartitionLog {
        &self.log
    }

    /// Makes `voters` the group's first membership. Nothing happens where it has one. To be called
    /// on every replica of a new group, with the same voters. It starts no election where Raft does not
    /// run yet.
    pub async fn initialize(&self, voters: BTreeSet<ReplicaId>) -> Result<(), OpenError> {
        if self.engine.found(voters.clone()).await? {
            return Ok(());
        }
        let failed = |error: &dyn std::fmt::Display| OpenError::Initialize(error.to_string());
        let raft = self.wake().await.map_err(|error| failed(&error))?;
        if raft
            .is_initialized()
            .await
            .map_err(|error| failed(&error))?
        {
            return Ok(());
        }
        match raft.initialize(voters).await {
            // A leader's first message came in between.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Stage 1, synchronous and in order: checks and queues. Stage 2: the future.
    pub fn enqueue(self: &Arc<Self>, item: ProduceItem) -> Result<AppendFuture, AppendError> {
        {
            let leadership = self.state.leadership.borrow();
            if !leadership.is_leader
                || item
                    .leader_epoch
                    .is_some_and(|e| e != leadership.leader_epoch)
            {
                drop(leadership);
                return Err(self.not_leader());
            }
        }
        // Records that cannot be committed, for want of a majority, must not use up the memory that
        // other partitions need.
        if self.log.is_overloaded() {
            return Err(AppendError::Overloaded);
        }
        if self.log.check_room(item.records.len()).is_err() {
            return Err(AppendError::Storage);
        }
        let (max_message_bytes, log_append_time, compacts) = {
            let partition = self.partition.borrow();
            let compacts = partition.log.compacts;
            (
                partition.max_message_bytes,
                partition.log_append_time,
                compacts,
            )
        };
        let admitted = admission::admit(&item.records, max_message_bytes)?;
        let held = self.log.hold(item.records.len());
        let held = held.map_err(|_| AppendError::Overloaded)?;
        if compacts {
            admission::check_keys(&item.records)?;
        }
        let time = log_append_time.then(state_machine::now_ms);
        let (future, start) = self.queue.push(item, admitted, time, held)?;
        if start {
            tokio::spawn(proposer::run(self.clone()));
        }
        Ok(future)
    }

    /// Appends batches with acks=all if this replica leads in `leader_epoch` (for the group
    /// coordinator); their base offset once committed.
    pub async fn append_internal(
        self: &Arc<Self>,
        leader_epoch: LeaderEpoch,
        records: Bytes,
    ) -> Result<Offset, AppendError> {
        let deadline = Instant::now() + INTERNAL_APPEND_TIMEOUT;
        let item = ProduceItem {
            records,
            acks: Acks::All,
            deadline,
            leader_epoch: Some(leader_epoch),
            trace: None,
        };
        let appended = self.enqueue(item)?.until(deadline).await?;
        Ok(appended.base_offset)
    }

    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.state.leadership.subscribe()
    }

    /// Moves whenever records are committed; long polls wait on it.
    pub fn watermark(&self) -> &Arc<Watermark> {
        &self.state.watermark
    }

    pub fn high_watermark(&self) -> Offset {
        self.state.watermark.get()
    }

    pub fn log_start_offset(&self) -> Offset {
        self.log.log_start_offset()
    }

    /// Tells `watcher` of the next append to the log; the same one each time.
    pub fn watch_growth(&self, watcher: &mpsc::UnboundedSender<RaftGroupId>) {
        self.state.growth.watch(watcher);
    }

    /// Brokers whose replicas are in sync, as the controller last said.
    pub fn isr(&self) -> Vec<BrokerId> {
        self.partition.borrow().isr.clone()
    }

    /// What the controller last said about the log's life.
    pub fn log_config(&self) -> LogConfig {
        self.partition.borrow().log
    }

    /// Who leads, for a client that asked here in vain.
    pub fn leader_hint(&self) -> Option<LeaderHint> {
        let leadership = *self.state.leadership.borrow();
        let leader = leadership.leader?;
        Some(LeaderHint {
            broker_id: leader.broker_id,
            leader_epoch: leadership.leader_epoch,
        })
    }

    /// None where this replica does not lead.
    pub fn progress(&self) -> Option<Progress> {
        self.engine.progress()
    }

    /// Asks Raft to hand leadership over; `leadership` tells when it happened.
    pub async fn transfer_leadership(&self, to: ReplicaId) -> Result<(), AppendError> {
        let stopped = AppendError::NotLeader { leader: None };
        let raft = self.leading_raft().await.ok_or(stopped.clone())?;
        let asked = raft.trigger().transfer_leader(to).await;
        asked.map_err(|_| stopped)
    }

    /// Starts an election, after a pre-vote round if `pre_vote`.
    pub async fn campaign(&self, pre_vote: bool) -> Result<(), AppendError> {
        let stopped = AppendError::NotLeader { leader: None };
        let raft = self.wake().await.map_err(|_| stopped.clone())?;
        let asked = raft.trigger().elect(pre_vote).await;
        asked.map_err(|_| stopped)
    }

    /// Makes a leader lead no more, at once and whatever it does: proposals under way end with an
    /// unknown outcome. For one that its followers cannot hear.
    pub async fn step_down(&self) {
        self.engine.step_down().await;
    }

    /// Stops Raft and saves the replica's state. The log stays open.
    pub async fn shutdown(&self) {
        self.state.is_closing.store(true, Ordering::SeqCst);
        self.queue.close();
        self.engine.shut_down().await;
        self.state
            .update_leadership(|leadership| *leadership = Leadership::default());
        self.state.save();
    }

    fn not_leader(&self) -> AppendError {
        // While leadership is being handed over this replica is still known as the leader.
        let leader = self
            .leader_hint()
            .filter(|hint| hint.broker_id != self.replica_id.broker_id);
        AppendError::NotLeader { leader }
    }

    /// How many replicas are in sync, and how many acks=all requires.
    fn in_sync(&self) -> (usize, usize) {
        let partition = self.partition.borrow();
        (partition.isr.len(), partition.min_insync_replicas)
    }

    /// Voters that have the entry `index` on disk, as this leader knows.
    fn replicated_count(&self, index: u64) -> usize {
        let has = |last: Option<u64>| last.is_some_and(|last| last >= index);
        let voters = self.state.voters();
        let followers = self.progress().map_or(0, |progress| {
            progress
                .followers
                .iter()
                .filter(|follower| voters.contains(&follower.replica) && has(follower.matched))
                .count()
        });
        let here = voters.contains(&self.replica_id) && has(self.log.durable_index());
        followers + usize::from(here)
    }

    /// How many replicas have every entry that is committed on disk, at least: the smallest majority of
    /// all the configurations that may be in force, which Raft changes when an entry is appended and the
    /// state machine when it is applied.
    fn committed_count(&self) -> usize {
        let smallest = |configs: &[BTreeSet<ReplicaId>]| {
            let sizes = configs.iter().map(|config| config.len() / 2 + 1);
            sizes.min().unwrap_or(0)
        };
        let applied = self
            .state
            .with_membership(|m| smallest(m.get_joint_config()));
        let Some(raft) = self.raft() else {
            return applied;
        };
        let metrics = raft.server_metrics();
        let metrics = metrics.borrow_watched();
        applied.min(smallest(
            metrics.membership_config.membership().get_joint_config(),
        ))
    }
}
