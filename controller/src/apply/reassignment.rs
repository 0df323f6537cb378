//! Moves of replicas: asked for, activated, cancelled, completed; and leaders that shall hand over.
//!
//! Invariant: while a move is active, `replicas` holds its target, in order, and after it everybody
//! else who may still vote; so nobody deletes a log that counts for a majority. A replica that comes
//! in has the revision as its incarnation, one that stays keeps its own. A cancelled move ends like
//! any other: when the leader has reported that the voters are the original ones.

use std::collections::{BTreeMap, BTreeSet};

use chronik_types::cluster_image::{ClusterImage, ImageChange, Partition, Reassignment};
use chronik_types::id::{BrokerId, ReplicaId};

use super::brokers::following;
use crate::command::{
    Outcome, PartitionAt, PartitionKey, ReassignmentChange, ReassignmentRefusal, WantedLeader,
};
use crate::state::State;

/// Notes moves. They become active by `activate`; a new order of the same replicas takes effect at
/// once.
pub fn alter(state: &State, changes: Vec<ReassignmentChange>, change: &mut ImageChange) -> Outcome {
    let mut changed = Changed::default();
    let mut results = Vec::with_capacity(changes.len());
    for asked in changes {
        let key = (asked.topic_id, asked.partition);
        let Some(partition) = changed.partition(&state.image, key) else {
            results.push(Err(ReassignmentRefusal::UnknownPartition));
            continue;
        };
        let next = match &asked.target {
            None => cancelled(partition),
            Some(target) => check_target(&state.image, partition, target)
                .map(|()| retargeted(partition, target, &asked, change.revision)),
        };
        results.push(next.map(|next| changed.put(key, next)));
    }
    changed.finish(&state.image, change);
    Outcome::Reassigned(results)
}

/// Begins moves that still are as they were known.
pub fn activate(state: &State, partitions: &[PartitionAt], change: &mut ImageChange) -> Outcome {
    let mut changed = Changed::default();
    for at in partitions {
        let key = (at.topic_id, at.partition);
        let Some(partition) = changed.partition(&state.image, key) else {
            continue;
        };
        let Some(moving) = partition.reassignment.as_deref() else {
            continue;
        };
        if moving.active || partition.partition_epoch != at.partition_epoch {
            continue;
        }
        let mut next = partition.clone();
        next.replicas = merged(partition, &moving.target, change.revision);
        if let Some(moving) = &mut next.reassignment {
            moving.active = true;
        }
        changed.put(key, next);
    }
    changed.finish(&state.image, change);
    Outcome::Done
}

pub fn set_wanted_leaders(
    state: &State,
    leaders: &[WantedLeader],
    change: &mut ImageChange,
) -> Outcome {
    let mut changed = Changed::default();
    for wanted in leaders {
        let key = (wanted.at.topic_id, wanted.at.partition);
        let Some(partition) = changed.partition(&state.image, key) else {
            continue;
        };
        let can_lead = |id: &BrokerId| {
            partition.isr.contains(id)
                && partition.replica_on(*id).is_some()
                && partition.leader != Some(*id)
        };
        if partition.partition_epoch != wanted.at.partition_epoch
            || !wanted.leader.iter().all(can_lead)
        {
            continue;
        }
        let mut next = partition.clone();
        next.wanted_leader = wanted.leader;
        changed.put(key, next);
    }
    changed.finish(&state.image, change);
    Outcome::Done
}

/// What is left of an active move when exactly its target votes: None while some of the target that
/// could be in sync is not.
pub fn completed(
    partition: &Partition,
    voters: &[ReplicaId],
    is_live: impl Fn(BrokerId) -> bool,
) -> Option<Partition> {
    partition.active_reassignment()?;
    let target = partition.target_replicas();
    let wanted: BTreeSet<&ReplicaId> = target.iter().collect();
    let are_settled = wanted == voters.iter().collect();
    let is_led_from_within = target
        .iter()
        .any(|replica| Some(replica.broker_id) == partition.leader);
    let are_in_sync = target
        .iter()
        .all(|replica| partition.isr.contains(&replica.broker_id) || !is_live(replica.broker_id));
    if !are_settled || !is_led_from_within || !are_in_sync {
        return None;
    }
    let mut next = partition.clone();
    next.isr
        .retain(|id| target.iter().any(|r| r.broker_id == *id));
    next.replicas = target;
    next.reassignment = None;
    Some(next)
}

fn check_target(
    image: &ClusterImage,
    partition: &Partition,
    target: &[BrokerId],
) -> Result<(), ReassignmentRefusal> {
    let distinct: BTreeSet<&BrokerId> = target.iter().collect();
    if target.is_empty() || distinct.len() != target.len() {
        return Err(ReassignmentRefusal::InvalidTarget);
    }
    if let Some(unknown) = target.iter().find(|id| !image.brokers.contains_key(id)) {
        return Err(ReassignmentRefusal::UnknownBroker(*unknown));
    }
    // Its first voters may not all have begun: those that have not would never know that they are.
    if partition.leader_epoch.0 == 0 {
        return Err(ReassignmentRefusal::NeverLed);
    }
    Ok(())
}

fn retargeted(
    partition: &Partition,
    target: &[BrokerId],
    asked: &ReassignmentChange,
    revision: u64,
) -> Partition {
    let mut next = partition.clone();
    let cause = asked.cause;
    match partition.reassignment.as_deref() {
        Some(moving) if moving.active => {
            next.replicas = merged(partition, target, revision);
            next.reassignment = Some(Box::new(Reassignment {
                target: target.to_vec(),
                cause,
                ..moving.clone()
            }));
        }
        _ if same_brokers(partition, target) => {
            next.replicas = merged(partition, target, revision);
            next.reassignment = None;
        }
        _ => {
            next.reassignment = Some(Box::new(Reassignment {
                target: target.to_vec(),
                original: partition.brokers().collect(),
                active: false,
                cause,
            }));
        }
    }
    next
}

fn cancelled(partition: &Partition) -> Result<Partition, ReassignmentRefusal> {
    let moving = partition.reassignment.as_deref();
    let moving = moving.ok_or(ReassignmentRefusal::NoneInProgress)?;
    let mut next = partition.clone();
    if moving.active {
        // All of the original are still there, so no incarnation is given out.
        next.replicas = merged(partition, &moving.original, 0);
        next.reassignment = Some(Box::new(Reassignment {
            target: moving.original.clone(),
            ..moving.clone()
        }));
    } else {
        next.reassignment = None;
    }
    Ok(next)
}

/// The target in its order, then everybody else who is there.
fn merged(partition: &Partition, target: &[BrokerId], revision: u64) -> Vec<ReplicaId> {
    let staying_or_new = target.iter().map(|broker_id| {
        partition.replica_on(*broker_id).unwrap_or(ReplicaId {
            broker_id: *broker_id,
            incarnation: revision,
        })
    });
    let mut replicas: Vec<ReplicaId> = staying_or_new.collect();
    let others = partition.replicas.iter().copied();
    replicas.extend(others.filter(|replica| !target.contains(&replica.broker_id)));
    replicas
}

fn same_brokers(partition: &Partition, target: &[BrokerId]) -> bool {
    partition.brokers().collect::<BTreeSet<_>>() == target.iter().copied().collect()
}

/// Partitions that a command has changed so far: later parts of it see what earlier ones did.
#[derive(Default)]
struct Changed(BTreeMap<PartitionKey, Partition>);

impl Changed {
    fn partition<'a>(
        &'a self,
        image: &'a ClusterImage,
        (topic_id, index): PartitionKey,
    ) -> Option<&'a Partition> {
        let stored = image.topic(topic_id).and_then(|t| t.partition(index));
        self.0.get(&(topic_id, index)).or(stored)
    }

    fn put(&mut self, key: PartitionKey, partition: Partition) {
        self.0.insert(key, partition);
    }

    /// Each partition that is not as it was gets the next epoch.
    fn finish(self, image: &ClusterImage, change: &mut ImageChange) {
        for ((topic_id, index), mut next) in self.0 {
            let stored = image.topic(topic_id).and_then(|t| t.partition(index));
            if let Some(stored) = stored.filter(|stored| **stored != next) {
                next.partition_epoch = following(stored);
                change.partitions.push((topic_id, next));
            }
        }
    }
}
