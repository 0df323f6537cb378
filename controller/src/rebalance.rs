//! Image -> what should be moved. Pure: what the rebalancer proposes, and what a dry run shows.
//!
//! Invariant: level-triggered. A plan asks only for what the image does not show yet, so that making
//! it again asks for nothing twice; and no plan takes a partition's last in-sync replica or puts two
//! replicas on one broker.

mod brokers;
mod leaders;

use chronik_types::cluster_image::{Broker, ClusterImage, Drain, Partition};
use chronik_types::id::{BrokerId, TopicId};

use crate::command::PartitionAt;

pub use brokers::{balance_moves, drain_moves};
pub use leaders::{preferred_leader, wanted_leaders};

/// All partitions with their topic's id, in an order that does not change by itself.
pub fn partitions(image: &ClusterImage) -> Vec<(TopicId, &Partition)> {
    let mut topics: Vec<_> = image.topics.values().collect();
    topics.sort_unstable_by_key(|topic| topic.topic_id);
    let of_topic = |topic| {
        let topic: &std::sync::Arc<chronik_types::cluster_image::Topic> = topic;
        let topic_id = topic.topic_id;
        topic.partitions.iter().map(move |p| (topic_id, p))
    };
    topics.into_iter().flat_map(of_topic).collect()
}

/// The partition as it is now.
pub fn at(topic_id: TopicId, partition: &Partition) -> PartitionAt {
    PartitionAt {
        topic_id,
        partition: partition.partition,
        partition_epoch: partition.partition_epoch,
    }
}

/// Moves whose turn it is: as many as may be active at the same time. One that waits for a broker
/// which is gone does not count, or it would hold up all others.
pub fn activations(image: &ClusterImage) -> Vec<PartitionAt> {
    let is_live = |id: &BrokerId| image.is_live(*id);
    let mut active = 0_usize;
    let mut waiting = Vec::new();
    for (topic_id, partition) in partitions(image) {
        match &partition.reassignment {
            Some(moving) if moving.active => {
                let can_go_on = moving.target.iter().all(is_live);
                active = active.saturating_add(usize::from(can_go_on));
            }
            Some(moving) if moving.target.iter().all(is_live) => {
                waiting.push((moving.cause as u8, at(topic_id, partition)));
            }
            _ => {}
        }
    }
    // What somebody asked for goes before what a loop wants. The sort is stable.
    waiting.sort_by_key(|(cause, _)| *cause);
    let max = usize::try_from(image.settings.reassignment_parallel_max).unwrap_or(usize::MAX);
    let free = max.max(1).saturating_sub(active);
    waiting.into_iter().take(free).map(|(_, at)| at).collect()
}

/// Whether new replicas may be put on the broker.
fn takes_replicas(broker: &Broker) -> bool {
    !broker.fenced && broker.drain == Drain::None
}

#[cfg(test)]
pub mod tests;
