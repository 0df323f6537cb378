//! What the cluster image assigns to this broker, followed from one image to the next.
//!
//! Invariant: what is wanted is exactly what the last image taken in assigns to this broker; topics
//! that it shares with the image before are not looked at.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use chronik_types::cluster_image::{ClusterImage, Topic};
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId, TopicId};

use crate::leadership::{Assigned, Moving, Place};
use crate::replica::PartitionState;

/// One replica that the image assigns to this broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub replica_id: ReplicaId,
    pub place: Place,
    /// Preferred leader first.
    pub replicas: Vec<ReplicaId>,
    /// Those that shall vote in the end.
    pub voters: Vec<ReplicaId>,
    pub moving: Option<Moving>,
    pub state: PartitionState,
}

impl Wanted {
    pub(super) fn assigned(&self, group: RaftGroupId) -> Assigned {
        Assigned {
            group,
            place: self.place,
            replicas: self.replicas.clone(),
            voters: self.voters.clone(),
            moving: self.moving,
        }
    }

    /// Whether all replicas were assigned together, so that they are the group's first voters. A
    /// replica that came later waits for its leader instead.
    pub fn is_founder(&self) -> bool {
        self.replicas
            .iter()
            .all(|replica| replica.incarnation == self.replica_id.incarnation)
    }
}

/// What the image assigns to this broker, kept up to date from one image to the next: a change costs
/// what it touches, not what there is.
#[derive(Debug)]
pub struct Assignment {
    broker_id: BrokerId,
    topics: HashMap<TopicId, Arc<Topic>>,
    pub(super) wanted: BTreeMap<RaftGroupId, Wanted>,
    /// Brokers that share a partition with this one.
    pub(super) peers: BTreeSet<BrokerId>,
}

/// What a new image changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct AssignmentChange {
    /// Groups that are wanted and were not, or as another replica, or the other way round.
    pub moved: bool,
    /// Other replicas of groups that stay wanted.
    pub placed: bool,
    /// Groups that stay wanted, whose partition changed.
    pub updated: Vec<RaftGroupId>,
}

impl Assignment {
    pub fn new(broker_id: BrokerId) -> Self {
        Self {
            broker_id,
            topics: HashMap::new(),
            wanted: BTreeMap::new(),
            peers: BTreeSet::new(),
        }
    }

    pub fn wanted(&self) -> &BTreeMap<RaftGroupId, Wanted> {
        &self.wanted
    }

    /// Peers that share a partition with this broker, and where they are.
    pub fn peer_addresses(&self, image: &ClusterImage) -> BTreeMap<BrokerId, String> {
        let address = |peer: &BrokerId| Some((*peer, image.brokers.get(peer)?.rpc_address.clone()));
        self.peers.iter().filter_map(address).collect()
    }

    /// Takes in an image. Topics that it shares with the one before are not looked at.
    pub fn take_in(&mut self, image: &ClusterImage) -> AssignmentChange {
        let mut change = AssignmentChange::default();
        for (topic_id, topic) in &image.topics {
            let before = self.topics.get(topic_id).cloned();
            if before
                .as_ref()
                .is_some_and(|before| Arc::ptr_eq(before, topic))
            {
                continue;
            }
            self.take_in_topic(before.as_deref(), topic, &mut change);
            self.topics.insert(*topic_id, topic.clone());
        }
        if self.topics.len() > image.topics.len() {
            let wanted = &mut self.wanted;
            self.topics.retain(|topic_id, topic| {
                let stays = image.topics.contains_key(topic_id);
                if !stays {
                    for partition in &topic.partitions {
                        change.moved |= wanted.remove(&partition.raft_group_id).is_some();
                    }
                }
                stays
            });
        }
        if change.moved || change.placed {
            let replicas = self.wanted.values().flat_map(|wanted| &wanted.replicas);
            let mut peers = BTreeSet::new();
            for replica in replicas {
                if !peers.contains(&replica.broker_id) {
                    peers.insert(replica.broker_id);
                }
            }
            peers.remove(&self.broker_id);
            self.peers = peers;
        }
        change
    }

    fn take_in_topic(
        &mut self,
        before: Option<&Topic>,
        topic: &Topic,
        change: &mut AssignmentChange,
    ) {
        let same_configs = before.is_some_and(|before| before.configs == topic.configs);
        let mut old = before
            .map(|before| before.partitions.as_slice())
            .unwrap_or_default()
            .iter();
        for partition in &topic.partitions {
            let old = old.next();
            if same_configs && old == Some(partition) {
                continue;
            }
            if let Some(old) = old
                && old.raft_group_id != partition.raft_group_id
            {
                change.moved |= self.wanted.remove(&old.raft_group_id).is_some();
            }
            let group = partition.raft_group_id;
            let Some(replica_id) = partition.replica_on(self.broker_id) else {
                change.moved |= self.wanted.remove(&group).is_some();
                continue;
            };
            let wanted = Wanted {
                replica_id,
                place: Place {
                    topic_id: topic.topic_id,
                    partition: partition.partition,
                },
                replicas: partition.replicas.clone(),
                voters: partition.target_replicas(),
                moving: partition.active_reassignment().map(|_| Moving {
                    partition_epoch: partition.partition_epoch,
                    leader: partition.leader,
                    leader_epoch: partition.leader_epoch,
                }),
                state: PartitionState::new(topic, partition),
            };
            match self.wanted.get_mut(&group) {
                Some(known) if *known == wanted => {}
                Some(known) => {
                    change.moved |= known.replica_id != replica_id;
                    change.placed |= known.replicas != wanted.replicas;
                    change.updated.push(group);
                    *known = wanted;
                }
                None => {
                    change.moved = true;
                    self.wanted.insert(group, wanted);
                }
            }
        }
        // Topics do not lose partitions.
        for gone in old {
            change.moved |= self.wanted.remove(&gone.raft_group_id).is_some();
        }
    }
}
