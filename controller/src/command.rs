//! The closed list of changes to the cluster's metadata, and what each one can answer.
//!
//! Invariant: a command holds everything that its effect depends on besides the state it is
//! applied to. Time, randomness and ids were chosen by the leader before it was proposed.

use std::collections::BTreeMap;

use chronik_types::cluster_image::{
    ClusterSettings, Controller, Drain, Gateway, ReassignmentCause,
};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, ControllerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One change, as it is stored in the log (JSON) and applied by every controller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// The first command of every leader.
    BecomeLeader(BecomeLeader),
    RegisterBroker(RegisterBroker),
    /// Brokers whose session ended or that shut down.
    FenceBrokers {
        brokers: Vec<BrokerSession>,
    },
    RegisterGateway {
        gateway: Gateway,
    },
    /// Gateways whose session ended or that left.
    RemoveGateways {
        gateways: Vec<GatewaySession>,
    },
    CreateTopics {
        topics: Vec<TopicPlan>,
    },
    DeleteTopics {
        topic_ids: Vec<TopicId>,
    },
    CreatePartitions {
        topics: Vec<PartitionsPlan>,
    },
    SetTopicConfigs(SetTopicConfigs),
    AllocateProducerIds {
        count: u32,
    },
    ReportPartitions(ReportPartitions),
    /// Moves of replicas to ask for, to change or to cancel.
    AlterReassignments {
        changes: Vec<ReassignmentChange>,
    },
    /// Moves whose turn it is.
    ActivateReassignments {
        partitions: Vec<PartitionAt>,
    },
    /// Partitions whose leaders shall hand over.
    SetWantedLeaders {
        leaders: Vec<WantedLeader>,
    },
    SetBrokerDrain {
        broker_id: BrokerId,
        drain: Drain,
    },
    UnregisterBroker {
        broker_id: BrokerId,
    },
    SetClusterSettings {
        settings: ClusterSettings,
    },
    /// Begins anew with a state that was restored from a backup: every number given out from now on
    /// is at least `floor`, which is above all that were given out since the backup.
    BeginAfterRestore {
        floor: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BecomeLeader {
    pub controller_id: ControllerId,
    /// Name of the cluster if it has none yet.
    pub cluster_id: String,
    /// The group, from the leader's configuration.
    pub controllers: Vec<Controller>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RegisterBroker {
    pub broker_id: BrokerId,
    pub incarnation_id: Uuid,
    pub rpc_address: String,
    pub rack: Option<String>,
    pub storage_id: Uuid,
    /// The replicas whose logs it holds, where the controllers' state may be older than that.
    #[serde(default)]
    pub held: Option<Vec<HeldReplica>>,
}

/// A log on a broker's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldReplica {
    pub raft_group_id: RaftGroupId,
    /// As which replica it is held; 0: the broker does not know.
    pub incarnation: u64,
}

/// A broker in the session that began with `broker_epoch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerSession {
    pub broker_id: BrokerId,
    pub broker_epoch: BrokerEpoch,
}

/// A gateway process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GatewaySession {
    pub gateway_id: String,
    pub incarnation_id: Uuid,
}

/// A topic to create; the leader has checked it and chosen id and assignment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopicPlan {
    pub topic_id: TopicId,
    pub name: String,
    pub configs: BTreeMap<String, String>,
    /// Brokers of partition i, preferred leader first.
    pub assignments: Vec<Vec<BrokerId>>,
}

/// Partitions to add to a topic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartitionsPlan {
    pub topic_id: TopicId,
    /// How many the topic had when the plan was made.
    pub present_count: usize,
    pub assignments: Vec<Vec<BrokerId>>,
}

/// Replaces a topic's configs if they still are `expected`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetTopicConfigs {
    pub topic_id: TopicId,
    pub expected: BTreeMap<String, String>,
    pub configs: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReportPartitions {
    pub session: BrokerSession,
    pub reports: Vec<PartitionReport>,
}

/// What the leader of a partition says of itself and its replicas.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartitionReport {
    pub raft_group_id: RaftGroupId,
    pub leader_epoch: LeaderEpoch,
    pub partition_epoch: PartitionEpoch,
    /// Brokers whose replica is caught up.
    pub caught_up: Vec<BrokerId>,
    /// The Raft group's voters, where the leader has brought them to what is wanted in
    /// `partition_epoch`; else none.
    #[serde(default)]
    pub voters: Vec<ReplicaId>,
}

/// A partition as somebody knew it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionAt {
    pub topic_id: TopicId,
    pub partition: PartitionIndex,
    pub partition_epoch: PartitionEpoch,
}

/// A move of one partition's replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReassignmentChange {
    pub topic_id: TopicId,
    pub partition: PartitionIndex,
    /// Who shall hold the partition, preferred leader first. None: back to where it was.
    pub target: Option<Vec<BrokerId>>,
    pub cause: ReassignmentCause,
}

/// The leader that a partition shall have; none: it may keep the one it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedLeader {
    pub at: PartitionAt,
    pub leader: Option<BrokerId>,
}

/// What applying a command answers. Not replicated: only the proposer needs it.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Nothing to say: blank and membership entries, and commands that cannot be refused.
    Done,
    BrokerRegistered(BrokerEpoch),
    /// Another process with another data folder holds the broker id.
    BrokerIdInUse,
    /// One per topic of the command, in order.
    Topics(Vec<Result<TopicId, TopicRefusal>>),
    /// The first id of the block.
    ProducerIds(i64),
    /// No more producer ids.
    ProducerIdsExhausted,
    Reported(Vec<ReportOutcome>),
    /// The broker epoch is not the current one, or the broker is fenced.
    Fenced,
    /// One per partition of the command, in order.
    Reassigned(Vec<Result<(), ReassignmentRefusal>>),
    /// Of a command about one broker.
    Broker(Result<(), BrokerRefusal>),
}

/// Why a partition's replicas are not moved, although the leader had found nothing wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReassignmentRefusal {
    #[error("there is no such partition")]
    UnknownPartition,
    #[error("broker {0} is not registered")]
    UnknownBroker(BrokerId),
    #[error("a partition needs at least one replica, and no broker twice")]
    InvalidTarget,
    #[error("no move of the partition is under way")]
    NoneInProgress,
    #[error("the partition has had no leader yet")]
    NeverLed,
}

/// Why a broker is not drained or unregistered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerRefusal {
    #[error("broker {0} is not registered")]
    Unknown(BrokerId),
    #[error("broker {0} is not fenced: stop it first")]
    Active(BrokerId),
    #[error("broker {broker_id} still holds {replica_count} replicas: drain it first")]
    HoldsReplicas {
        broker_id: BrokerId,
        replica_count: usize,
    },
}

/// Why a topic was not changed, although the leader had found nothing wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TopicRefusal {
    NameExists,
    /// The other topic's name, equal but for '.' and '_'.
    NameCollides(String),
    Unknown,
    /// The assignment names a broker that is not registered.
    UnknownBroker(BrokerId),
    /// Somebody else changed the topic first: look again.
    Changed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportOutcome {
    Accepted,
    StalePartitionEpoch,
    StaleLeaderEpoch,
    UnknownPartition,
}

/// Where a partition is found.
pub type PartitionKey = (TopicId, PartitionIndex);
