//! A state that was restored from a backup is older than what brokers, gateways and clients have seen.
//!
//! Invariant: no number that was given out between the backup and the restore is given out again, and
//! nobody takes a message from that time for one about the present. What replicas there are is then
//! told by the brokers that hold them.

use std::collections::BTreeMap;
use std::sync::Arc;

use chronik_types::cluster_image::{ImageChange, Partition, Restore, Topic};
use chronik_types::epoch::PartitionEpoch;
use chronik_types::id::RaftGroupId;

use crate::command::{HeldReplica, Outcome};
use crate::state::State;

/// Numbers rise by at least this, should the clock that chose the floor be wrong.
const STEP_MIN: u64 = 1 << 32;
/// More changes than a partition goes through between a backup and its restore.
const PARTITION_EPOCH_STEP: i32 = 1 << 20;

/// Begins anew, once; every broker has to register again.
pub fn begin(state: &mut State, floor: u64, change: &mut ImageChange) -> Outcome {
    let Some(pending) = state.pending_restore.take() else {
        return Outcome::Done;
    };
    let above = |number: u64| number.saturating_add(STEP_MIN).max(floor);
    change.revision = above(state.image.revision);
    state.next_raft_group_id = above(state.next_raft_group_id);
    let producer_id = u64::try_from(state.next_producer_id).unwrap_or(0);
    state.next_producer_id = i64::try_from(above(producer_id)).unwrap_or(i64::MAX);
    let image = Arc::make_mut(&mut state.image);
    image.restores.push(Restore {
        backup_revision: pending.backup_revision,
        revision: change.revision,
    });
    change.brokers = image.brokers.values().cloned().collect();
    for broker in &mut change.brokers {
        broker.fenced = true;
    }
    // Takes a revision also where there is nothing else.
    change.settings = Some(image.settings.clone());
    change.removed_gateways = image.gateways.keys().cloned().collect();
    change.topics = image.topics.values().map(|topic| renewed(topic)).collect();
    change.topics.sort_unstable_by_key(|topic| topic.topic_id);
    Outcome::Done
}

/// The topic as nobody has seen it: led by nobody yet, in epochs that no old report can name.
fn renewed(topic: &Topic) -> Arc<Topic> {
    let mut topic = topic.clone();
    for partition in &mut topic.partitions {
        partition.leader = None;
        partition.wanted_leader = None;
        partition.isr.truncate(1);
        let epoch = partition.partition_epoch.0;
        partition.partition_epoch = PartitionEpoch(epoch.saturating_add(PARTITION_EPOCH_STEP));
    }
    Arc::new(topic)
}

/// Incarnations of the replicas that a broker holds.
pub fn by_group(held: &[HeldReplica]) -> BTreeMap<RaftGroupId, u64> {
    let pairs = held.iter().map(|one| (one.raft_group_id, one.incarnation));
    pairs.collect()
}

/// The incarnation of a broker's replica, where it is another than the restored state says. A replica
/// that was replaced after the backup is what the broker holds. One that it does not hold becomes a
/// new one, which the partition's leader fills; but not the only one: it would begin empty.
pub fn incarnation_of_held(
    held: &BTreeMap<RaftGroupId, u64>,
    partition: &Partition,
    revision: u64,
) -> Option<u64> {
    match held.get(&partition.raft_group_id) {
        // Not known as which it was held: as the one that is assigned, as far as anybody knows.
        Some(0) => None,
        Some(incarnation) => Some(*incarnation),
        None => (partition.replicas.len() > 1).then_some(revision),
    }
}

#[cfg(test)]
#[path = "restore_test.rs"]
mod tests;
