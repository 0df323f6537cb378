//! The coordinators over the broker's real replicas: which partitions are those of
//! `__consumer_offsets`, and how a replica is a `GroupLog`.
//!
//! Invariant: after `refresh` exactly the replicas of `__consumer_offsets` that run here have a
//! coordinator.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use bytes::Bytes;
use chronik_types::cluster_image::ClusterImage;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::config::GroupConfig;
use super::coordinators::Coordinators;
use super::log::{AppendError, GroupLog, ReadError, led_epoch};
use crate::replica::{self, Leadership, Replica};
use crate::replicas::Replicas;

/// Kafka's topic of committed offsets and groups.
pub const CONSUMER_OFFSETS_TOPIC: &str = "__consumer_offsets";

/// A partition of `__consumer_offsets` as its coordinator sees it.
#[derive(Clone)]
pub struct ReplicaLog(pub Arc<Replica>);

impl GroupLog for ReplicaLog {
    async fn append(
        &self,
        leader_epoch: LeaderEpoch,
        records: Bytes,
    ) -> Result<Offset, AppendError> {
        let leads = || led_epoch(&self.0.leadership().borrow()) == Some(leader_epoch);
        if !leads() {
            return Err(AppendError::NotLeader);
        }
        match self.0.append_internal(leader_epoch, records).await {
            Ok(offset) if leads() => Ok(offset),
            // It is in the log, but others may have written after it.
            Ok(_) => Err(AppendError::Unknown),
            Err(replica::AppendError::NotLeader { .. }) => Err(AppendError::NotLeader),
            Err(
                replica::AppendError::TimedOut
                | replica::AppendError::NotEnoughReplicasAfterAppend { .. }
                | replica::AppendError::Storage,
            ) => Err(AppendError::Unknown),
            // By the invariant of the replica's errors nothing was appended.
            Err(error) => Err(AppendError::Refused(error.to_string())),
        }
    }

    async fn read_committed(
        &self,
        from: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        let read = self.0.read_committed_from(from, max_bytes).await;
        read.map_err(|error| ReadError(error.to_string()))
    }

    fn log_start_offset(&self) -> Offset {
        self.0.log_start_offset()
    }

    fn high_watermark(&self) -> Offset {
        self.0.high_watermark()
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.0.leadership()
    }
}

/// Keeps the coordinators in step with the cluster image and the replicas that run here.
pub struct ConsumerGroups {
    coordinators: Coordinators,
    replicas: Replicas,
    image: Arc<ArcSwap<ClusterImage>>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    image: Arc<ClusterImage>,
    replicas: HashMap<RaftGroupId, Arc<Replica>>,
}

impl ConsumerGroups {
    /// Nothing runs before the first `refresh`.
    pub fn new(
        replicas: Replicas,
        image: Arc<ArcSwap<ClusterImage>>,
        config: GroupConfig,
        stop: CancellationToken,
    ) -> ConsumerGroups {
        let coordinators = Coordinators::new(config, stop);
        ConsumerGroups {
            coordinators,
            replicas,
            image,
            seen: Mutex::default(),
        }
    }

    /// For the gRPC service.
    pub fn coordinators(&self) -> &Coordinators {
        &self.coordinators
    }

    /// To be called, within the Tokio runtime, after the image changed and after replicas were
    /// opened or closed. Cheap where nothing changed.
    pub fn refresh(&self) {
        let image = self.image.load_full();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted: HashMap<RaftGroupId, Arc<Replica>> = offsets_partitions(&image)
            .filter_map(|group| Some((group, self.replicas.get(group)?)))
            .collect();
        self.coordinators
            .retain(|group| wanted.contains_key(&group));
        for (group, replica) in &wanted {
            let known = seen.replicas.get(group);
            if !known.is_some_and(|known| Arc::ptr_eq(known, replica)) {
                self.coordinators.start(*group, ReplicaLog(replica.clone()));
            }
        }
        seen.replicas = wanted;
        if !Arc::ptr_eq(&seen.image, &image) {
            let gone = topics_gone(&seen.image, &image);
            if !gone.is_empty() {
                self.coordinators.topics_removed(&gone);
            }
            seen.image = image;
        }
    }

    /// Stops all coordinators, and waits for their tasks.
    pub async fn shutdown(&self) {
        self.coordinators.shutdown().await;
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replicas
            .clear();
    }
}

/// The Raft groups of `__consumer_offsets`.
fn offsets_partitions(image: &ClusterImage) -> impl Iterator<Item = RaftGroupId> + '_ {
    let topic = image.topic_by_name(CONSUMER_OFFSETS_TOPIC);
    topic
        .into_iter()
        .flat_map(|topic| topic.partitions.iter().map(|p| p.raft_group_id))
}

/// Topics of `before` that `after` no longer has.
fn topics_gone(before: &ClusterImage, after: &ClusterImage) -> Vec<(uuid::Uuid, Arc<str>)> {
    before
        .topics
        .values()
        .filter(|topic| !after.topics.contains_key(&topic.topic_id))
        .map(|topic| (topic.topic_id.0, topic.name.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chronik_types::cluster_image::{Partition, Topic};
    use chronik_types::id::{PartitionIndex, TopicId};
    use uuid::Uuid;

    use super::*;

    fn topic(id: u128, name: &str, groups: &[u64]) -> Arc<Topic> {
        let partitions = (0..).zip(groups).map(|(index, group)| Partition {
            partition: PartitionIndex(index),
            raft_group_id: RaftGroupId(*group),
            replicas: Vec::new(),
            isr: Vec::new(),
            leader: None,
            leader_epoch: LeaderEpoch(0),
            partition_epoch: Default::default(),
            ..Partition::default()
        });
        Arc::new(Topic {
            topic_id: TopicId(Uuid::from_u128(id)),
            name: name.into(),
            configs: BTreeMap::new(),
            partitions: partitions.collect(),
        })
    }

    #[test]
    fn coordinators_belong_to_the_offsets_topic_alone() {
        let mut image = ClusterImage::default();
        assert_eq!(offsets_partitions(&image).count(), 0);
        image.put_topic(topic(1, "orders", &[1, 2]));
        image.put_topic(topic(2, CONSUMER_OFFSETS_TOPIC, &[7, 8]));
        let groups: Vec<_> = offsets_partitions(&image).collect();
        assert_eq!(groups, vec![RaftGroupId(7), RaftGroupId(8)]);
    }

    #[test]
    fn a_topic_that_was_made_again_is_gone_under_its_old_id() {
        let mut before = ClusterImage::default();
        before.put_topic(topic(1, "orders", &[1]));
        before.put_topic(topic(2, "kept", &[2]));
        let mut after = before.clone();
        after.remove_topic(TopicId(Uuid::from_u128(1)));
        after.put_topic(topic(3, "orders", &[3]));
        assert_eq!(
            topics_gone(&before, &after),
            vec![(Uuid::from_u128(1), "orders".into())]
        );
    }
}
