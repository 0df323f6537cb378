//! One partition's replica: an openraft group over the partition's log.
//!
//! Invariant: only this module knows how Raft indexes map to offsets. Outside, a partition has
//! offsets, a high watermark and leader epochs.

pub mod codec;
pub mod error;
pub mod proposer;
pub mod raft_config;
pub mod state_machine;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use chronik_storage::PartitionLog;
use chronik_types::cluster_image::{Partition, Topic};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use chronik_types::offset::Offset;
use chronik_types::topic_config;
use openraft::network::RaftNetworkFactory;
use tokio::sync::watch;

pub use error::{AppendError, LeaderHint, OpenError, ReadError};
pub use proposer::{Acks, AppendFuture, Appended, ProduceItem};
pub use raft_config::{Batches, Raft, TypeConfig};

/// What the controller last said about the partition, as far as its replica needs it. `reconcile`
/// publishes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionState {
    pub isr: Vec<BrokerId>,
    pub min_insync_replicas: usize,
    pub max_message_bytes: usize,
    pub log_append_time: bool,
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
}

/// SKELETON: the signatures others code against; the bodies follow in the next commits.
pub struct Replica {
    raft: Raft,
    log: PartitionLog,
    replica_id: ReplicaId,
    leadership: watch::Receiver<Leadership>,
}

impl Replica {
    /// Opens the log and starts Raft; a new replica waits for `initialize` or for a leader.
    pub async fn open<N: RaftNetworkFactory<TypeConfig>>(
        _options: ReplicaOptions<N>,
    ) -> Result<Arc<Replica>, OpenError> {
        Err(OpenError::Raft("not there yet".to_owned()))
    }

    pub fn replica_id(&self) -> ReplicaId {
        self.replica_id
    }

    pub fn group_id(&self) -> RaftGroupId {
        self.log.group_id()
    }

    /// For the Raft transport and the leadership driver.
    pub fn raft(&self) -> &Raft {
        &self.raft
    }

    pub fn log(&self) -> &PartitionLog {
        &self.log
    }

    /// Makes `voters` the group's first membership. Nothing happens where it has one. To be called
    /// on every replica of a new group, with the same voters.
    pub async fn initialize(&self, _voters: BTreeSet<ReplicaId>) -> Result<(), OpenError> {
        Err(OpenError::Raft("not there yet".to_owned()))
    }

    /// Stage 1, synchronous and in order: checks and queues. Stage 2: the future.
    pub fn enqueue(self: &Arc<Self>, _item: ProduceItem) -> Result<AppendFuture, AppendError> {
        Err(AppendError::NotLeader { leader: None })
    }

    /// Appends batches with acks=all (for the group coordinator); their base offset once committed.
    pub async fn append_internal(
        self: &Arc<Self>,
        _records: Bytes,
    ) -> Result<Offset, AppendError> {
        Err(AppendError::NotLeader { leader: None })
    }

    /// Committed batches from `offset` on, whole, in order; the first may begin below `offset`.
    /// Empty at the high watermark. Any replica may be asked.
    pub async fn read_committed_from(
        &self,
        _offset: Offset,
        _max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        Err(ReadError::NotLeader { leader: None })
    }

    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    pub fn high_watermark(&self) -> Offset {
        Offset::ZERO
    }

    pub fn log_start_offset(&self) -> Offset {
        self.log.log_start_offset()
    }

    /// None where this replica does not lead.
    pub fn progress(&self) -> Option<Progress> {
        None
    }

    /// Asks Raft to hand leadership over; `leadership` tells when it happened.
    pub async fn transfer_leadership(&self, _to: ReplicaId) -> Result<(), AppendError> {
        Err(AppendError::NotLeader { leader: None })
    }

    /// Starts an election, after a pre-vote round if `pre_vote`.
    pub async fn campaign(&self, _pre_vote: bool) -> Result<(), AppendError> {
        Err(AppendError::NotLeader { leader: None })
    }

    /// Stops Raft and saves the replica's state. The log stays open.
    pub async fn shutdown(&self) {}
}
