//! The cluster's metadata at one revision, as the controller publishes it to brokers and gateways.
//!
//! Invariant: an image is immutable. A change makes a new image with a higher revision that shares
//! all unchanged topics with the old one.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use crate::id::{BrokerId, ControllerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};

/// A controller as brokers, gateways and operators reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controller {
    pub controller_id: ControllerId,
    /// `host:port` of its gRPC services.
    pub rpc_address: String,
    /// `host:port` of its REST admin API.
    pub rest_address: String,
}

/// A registered broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broker {
    pub broker_id: BrokerId,
    /// Chosen by the broker process at its start.
    pub incarnation_id: Uuid,
    pub broker_epoch: BrokerEpoch,
    /// `host:port` of its gRPC services.
    pub rpc_address: String,
    pub rack: Option<String>,
    /// Not trusted to lead or serve: its session ran out, or it is shutting down.
    pub fenced: bool,
    /// What an operator wants moved away from it.
    #[serde(default)]
    pub drain: Drain,
}

/// What an operator wants a broker to be free of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Drain {
    #[default]
    None,
    /// It shall lead nothing, and keeps its replicas.
    Leaders,
    /// It shall hold nothing: it is to leave the cluster.
    Replicas,
}

/// Settings of the whole cluster that operators change while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterSettings {
    /// Partitions whose replicas are moved at the same time; 1 or more.
    pub reassignment_parallel_max: u32,
    /// Bytes per second that one broker takes in by copies of segment files; none: unlimited.
    pub reassignment_bytes_per_second: Option<u64>,
    /// Whether leadership goes back to the preferred leaders by itself.
    pub leader_balance_enable: bool,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self {
            reassignment_parallel_max: 100,
            reassignment_bytes_per_second: None,
            leader_balance_enable: true,
        }
    }
}

/// One `host:port` that a gateway offers to Kafka clients.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
}

/// A registered gateway; one whose session ran out is removed from the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    pub gateway_id: String,
    pub incarnation_id: Uuid,
    pub rack: Option<String>,
    pub endpoints: Vec<Endpoint>,
}

/// Why a partition's replicas are moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReassignmentCause {
    /// Somebody named the replicas.
    #[default]
    Request,
    /// A broker is being emptied.
    Drain,
    /// Brokers hold unequal numbers of replicas.
    Balance,
}

/// A move of a partition's replicas that was asked for and has not come to its end.
///
/// While it waits its turn, `Partition::replicas` is what it was. While it is active, `replicas`
/// holds the target, in its order, and then those that will go. It ends when the leader has
/// reported that exactly the target votes, and the target is in sync.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reassignment {
    /// Brokers that shall hold the partition in the end, preferred leader first.
    pub target: Vec<BrokerId>,
    /// Brokers that held it before: where a move that is cancelled goes back to.
    pub original: Vec<BrokerId>,
    pub active: bool,
    pub cause: ReassignmentCause,
}

/// One partition: where it should be (assignment) and what its leader last reported.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    pub partition: PartitionIndex,
    pub raft_group_id: RaftGroupId,
    /// The assignment: preferred leader first. Replicas on their way in and out are part of it.
    pub replicas: Vec<ReplicaId>,
    /// In-sync replicas, decided by the controller from the leader's reports.
    pub isr: Vec<BrokerId>,
    /// The leader in `leader_epoch`, as it reported itself; none before the first election.
    pub leader: Option<BrokerId>,
    pub leader_epoch: LeaderEpoch,
    pub partition_epoch: PartitionEpoch,
    #[serde(default)]
    pub reassignment: Option<Box<Reassignment>>,
    /// The controllers ask the leader to hand over to this replica, which is in sync.
    #[serde(default)]
    pub wanted_leader: Option<BrokerId>,
}

impl Partition {
    /// The move of replicas that is under way.
    pub fn active_reassignment(&self) -> Option<&Reassignment> {
        self.reassignment.as_deref().filter(|moving| moving.active)
    }

    /// The replicas that shall vote in the end, preferred leader first: all of the assignment but
    /// those on their way out.
    pub fn target_replicas(&self) -> Vec<ReplicaId> {
        match self.active_reassignment() {
            None => self.replicas.clone(),
            Some(moving) => {
                let target = moving.target.iter();
                target.filter_map(|id| self.replica_on(*id)).collect()
            }
        }
    }

    /// Brokers on their way in: of the target, and not there before.
    pub fn adding(&self) -> Vec<BrokerId> {
        let Some(moving) = &self.reassignment else {
            return Vec::new();
        };
        let target = moving.target.iter().copied();
        target.filter(|id| !moving.original.contains(id)).collect()
    }

    /// Brokers on their way out: holding a replica, and not of the target.
    pub fn removing(&self) -> Vec<BrokerId> {
        let Some(moving) = &self.reassignment else {
            return Vec::new();
        };
        let held = self.replicas.iter().map(|replica| replica.broker_id);
        held.filter(|id| !moving.target.contains(id)).collect()
    }

    /// Brokers of the assignment, those on their way in and out included.
    pub fn brokers(&self) -> impl Iterator<Item = BrokerId> + '_ {
        self.replicas.iter().map(|replica| replica.broker_id)
    }

    /// Fewer in-sync replicas than the assignment has, replicas on their way in not counted.
    pub fn is_under_replicated(&self) -> bool {
        let expected = match self.active_reassignment() {
            None => self.replicas.len(),
            Some(_) => self.replicas.len().saturating_sub(self.adding().len()),
        };
        self.isr.len() < expected
    }

    /// The replica on `broker_id`, if the assignment has one.
    pub fn replica_on(&self, broker_id: BrokerId) -> Option<ReplicaId> {
        self.replicas
            .iter()
            .copied()
            .find(|r| r.broker_id == broker_id)
    }
}

/// A topic and its partitions, in index order without gaps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topic {
    pub topic_id: TopicId,
    pub name: Arc<str>,
    /// Only what differs from the defaults (`topic_config`).
    pub configs: BTreeMap<String, String>,
    pub partitions: Vec<Partition>,
}

impl Topic {
    pub fn partition(&self, index: PartitionIndex) -> Option<&Partition> {
        usize::try_from(index.0)
            .ok()
            .and_then(|i| self.partitions.get(i))
    }

    pub fn is_internal(&self) -> bool {
        matches!(&*self.name, "__consumer_offsets" | "__transaction_state")
    }
}

/// The controllers' state was put back to that of a backup. Revisions between the two were given out
/// before that and are forgotten: they are not given out again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The revision of the backup.
    pub backup_revision: u64,
    /// The first revision after the restore.
    pub revision: u64,
}

/// All cluster metadata at `revision`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterImage {
    pub cluster_id: String,
    /// Rises by every applied controller command that changed something.
    pub revision: u64,
    /// The controllers' leader, where known.
    pub controller_leader: Option<ControllerId>,
    pub controllers: BTreeMap<ControllerId, Controller>,
    pub brokers: BTreeMap<BrokerId, Broker>,
    pub gateways: BTreeMap<String, Gateway>,
    pub topics: HashMap<TopicId, Arc<Topic>>,
    pub topic_ids: HashMap<Arc<str>, TopicId>,
    pub settings: ClusterSettings,
    /// Oldest first. A change never adds one: whoever follows the image gets a full one instead.
    pub restores: Vec<Restore>,
}

impl ClusterImage {
    /// The first revision after the last restore; 0: there was none.
    pub fn restored_at(&self) -> u64 {
        self.restores.last().map_or(0, |restore| restore.revision)
    }

    /// Whether the broker has not registered since the last restore: the image has its word of before
    /// the backup, at best.
    pub fn is_from_before_restore(&self, broker: &Broker) -> bool {
        broker.broker_epoch.0 < self.restored_at()
    }

    /// Whether what was assigned at `revision` is unknown here, because the controllers' state was
    /// put back to an earlier one since. What is unknown is not gone: nobody has decided so.
    pub fn is_forgotten(&self, revision: u64) -> bool {
        let within = |r: &Restore| r.backup_revision < revision && revision < r.revision;
        self.restores.iter().any(within)
    }

    /// Whether the broker is registered and its session is kept.
    pub fn is_live(&self, broker_id: BrokerId) -> bool {
        let broker = self.brokers.get(&broker_id);
        broker.is_some_and(|broker| !broker.fenced)
    }

    pub fn topic(&self, topic_id: TopicId) -> Option<&Arc<Topic>> {
        self.topics.get(&topic_id)
    }

    pub fn topic_by_name(&self, name: &str) -> Option<&Arc<Topic>> {
        self.topic_ids.get(name).and_then(|id| self.topics.get(id))
    }

    /// Adds or replaces a topic.
    pub fn put_topic(&mut self, topic: Arc<Topic>) {
        self.topic_ids.insert(topic.name.clone(), topic.topic_id);
        self.topics.insert(topic.topic_id, topic);
    }

    /// Removes a topic; nothing happens where it is not there.
    pub fn remove_topic(&mut self, topic_id: TopicId) {
        if let Some(topic) = self.topics.remove(&topic_id)
            && self.topic_ids.get(&topic.name) == Some(&topic_id)
        {
            self.topic_ids.remove(&topic.name);
        }
    }

    /// Applies a change on top of this image. The caller has checked that `change.revision` is
    /// higher than this image's.
    pub fn apply(&mut self, change: ImageChange) {
        self.revision = change.revision;
        if let Some(leader) = change.controller_leader {
            self.controller_leader = leader;
        }
        if let Some(settings) = change.settings {
            self.settings = settings;
        }
        for controller in change.controllers {
            self.controllers
                .insert(controller.controller_id, controller);
        }
        for broker in change.brokers {
            self.brokers.insert(broker.broker_id, broker);
        }
        for broker_id in change.removed_brokers {
            self.brokers.remove(&broker_id);
        }
        for gateway in change.gateways {
            self.gateways.insert(gateway.gateway_id.clone(), gateway);
        }
        for gateway_id in change.removed_gateways {
            self.gateways.remove(&gateway_id);
        }
        for topic_id in change.removed_topics {
            self.remove_topic(topic_id);
        }
        for topic in change.topics {
            self.put_topic(topic);
        }
        for (topic_id, partition) in change.partitions {
            let Some(topic) = self.topics.get_mut(&topic_id) else {
                continue;
            };
            let topic = Arc::make_mut(topic);
            let slot = usize::try_from(partition.partition.0)
                .ok()
                .and_then(|index| topic.partitions.get_mut(index));
            if let Some(slot) = slot {
                *slot = partition;
            }
        }
    }
}

/// What one revision, or a run of revisions, changed. Entries replace the whole item they name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageChange {
    pub revision: u64,
    /// `Some(x)`: the controllers' leader is now `x`.
    pub controller_leader: Option<Option<ControllerId>>,
    pub controllers: Vec<Controller>,
    pub brokers: Vec<Broker>,
    pub removed_brokers: Vec<BrokerId>,
    pub gateways: Vec<Gateway>,
    pub removed_gateways: Vec<String>,
    /// Created topics, and topics whose configs or number of partitions changed.
    pub topics: Vec<Arc<Topic>>,
    pub removed_topics: Vec<TopicId>,
    /// Single partitions that changed; applied after `topics`.
    pub partitions: Vec<(TopicId, Partition)>,
    /// The settings in force from now on, where they changed.
    pub settings: Option<ClusterSettings>,
}
