//! Which partitions should be led by another broker.
//!
//! Invariant: only an in-sync replica on a live broker that is not being drained is ever wanted. A
//! partition whose replicas are being moved is left alone: its leader hands over as part of the move.

use chronik_types::cluster_image::{ClusterImage, Drain, Partition};
use chronik_types::id::BrokerId;

use super::{at, partitions};
use crate::command::WantedLeader;

/// The broker that should lead by the order of the assignment.
pub fn preferred_leader(partition: &Partition) -> Option<BrokerId> {
    match partition.active_reassignment() {
        Some(moving) => moving.target.first().copied(),
        None => partition.brokers().next(),
    }
}

/// Leaders to ask for. `is_settled` says whether a broker has been live for long enough, and is not
/// behind with others, to get partitions back.
pub fn wanted_leaders(
    image: &ClusterImage,
    is_settled: impl Fn(BrokerId) -> bool,
) -> Vec<WantedLeader> {
    let mut wanted = Vec::new();
    for (topic_id, partition) in partitions(image) {
        if partition.wanted_leader.is_none()
            && let Some(leader) = better_leader(image, partition, &is_settled)
        {
            wanted.push(WantedLeader {
                at: at(topic_id, partition),
                leader: Some(leader),
            });
        }
    }
    wanted
}

fn better_leader(
    image: &ClusterImage,
    partition: &Partition,
    is_settled: &impl Fn(BrokerId) -> bool,
) -> Option<BrokerId> {
    let leader = partition.leader?;
    if partition.active_reassignment().is_some() {
        return None;
    }
    let is_drained = |id: BrokerId| {
        let broker = image.brokers.get(&id);
        broker.is_some_and(|broker| broker.drain != Drain::None)
    };
    let can_lead = |id: &BrokerId| {
        image.is_live(*id) && partition.isr.contains(id) && !is_drained(*id) && *id != leader
    };
    if is_drained(leader) {
        return partition.brokers().find(can_lead);
    }
    if !image.settings.leader_balance_enable {
        return None;
    }
    preferred_leader(partition).filter(|id| can_lead(id) && is_settled(*id))
}
