//! Registration and fencing of brokers, and what they do to the partitions.
//!
//! Invariant: no fenced broker leads a partition in the image, and none is in an ISR unless it is
//! the last one there.

use std::collections::BTreeSet;
use std::sync::Arc;

use chronik_types::cluster_image::{Broker, ClusterImage, Drain, ImageChange, Partition};
use chronik_types::epoch::{BrokerEpoch, PartitionEpoch};
use chronik_types::id::BrokerId;

use super::restore;
use crate::command::{BrokerRefusal, BrokerSession, Outcome, RegisterBroker};
use crate::state::State;

/// Begins a session. The broker epoch is the revision, so it is higher than any before.
pub fn register(state: &mut State, command: RegisterBroker, change: &mut ImageChange) -> Outcome {
    let broker_id = command.broker_id;
    let present = state.image.brokers.get(&broker_id);
    let known_storage_id = state.storage_ids.get(&broker_id).copied();
    if let Some(present) = present
        && present.incarnation_id == command.incarnation_id
        && known_storage_id == Some(command.storage_id)
        && !present.fenced
        && present.rpc_address == command.rpc_address
        && present.rack == command.rack
    {
        // The same process asks again because an answer was lost.
        return Outcome::BrokerRegistered(present.broker_epoch);
    }
    if let Some(present) = present
        && !present.fenced
        && present.incarnation_id != command.incarnation_id
        && known_storage_id != Some(command.storage_id)
    {
        return Outcome::BrokerIdInUse;
    }
    let drain = present.map_or(Drain::None, |present| present.drain);
    // Whoever opened the same data folder holds its lock, so the process before it is gone.
    let disk_replaced = known_storage_id.is_some_and(|known| known != command.storage_id);
    let replaced = BTreeSet::from([broker_id]);
    let revision = change.revision;
    // The first time since a restore that this broker says what it holds.
    let held = present
        .filter(|present| state.image.is_from_before_restore(present))
        .and(command.held.as_deref())
        .map(restore::by_group);
    let incarnation = |partition: &Partition| match &held {
        _ if disk_replaced => Some(revision),
        Some(held) => restore::incarnation_of_held(held, partition, revision),
        None => None,
    };
    take_out_of_service(&state.image, &replaced, incarnation, change);
    let broker_epoch = BrokerEpoch(change.revision);
    change.brokers.push(Broker {
        broker_id,
        incarnation_id: command.incarnation_id,
        broker_epoch,
        rpc_address: command.rpc_address,
        rack: command.rack,
        fenced: false,
        drain,
    });
    state.storage_ids.insert(broker_id, command.storage_id);
    Outcome::BrokerRegistered(broker_epoch)
}

/// Fences the brokers that still are in the named session.
pub fn fence(state: &State, sessions: &[BrokerSession], change: &mut ImageChange) -> Outcome {
    let mut fenced = BTreeSet::new();
    for session in sessions {
        let Some(broker) = state.image.brokers.get(&session.broker_id) else {
            continue;
        };
        if !broker.fenced
            && broker.broker_epoch == session.broker_epoch
            && fenced.insert(session.broker_id)
        {
            change.brokers.push(Broker {
                fenced: true,
                ..broker.clone()
            });
        }
    }
    if !fenced.is_empty() {
        take_out_of_service(&state.image, &fenced, |_| None, change);
    }
    Outcome::Done
}

pub fn set_drain(
    state: &State,
    broker_id: BrokerId,
    drain: Drain,
    change: &mut ImageChange,
) -> Outcome {
    let Some(broker) = state.image.brokers.get(&broker_id) else {
        return Outcome::Broker(Err(BrokerRefusal::Unknown(broker_id)));
    };
    if broker.drain != drain {
        change.brokers.push(Broker {
            drain,
            ..broker.clone()
        });
    }
    Outcome::Broker(Ok(()))
}

/// Forgets a broker that is fenced and is in no assignment.
pub fn unregister(state: &mut State, broker_id: BrokerId, change: &mut ImageChange) -> Outcome {
    let Some(broker) = state.image.brokers.get(&broker_id) else {
        return Outcome::Broker(Err(BrokerRefusal::Unknown(broker_id)));
    };
    if !broker.fenced {
        return Outcome::Broker(Err(BrokerRefusal::Active(broker_id)));
    }
    let partitions = state.image.topics.values().flat_map(|t| &t.partitions);
    let is_there = |partition: &&Partition| {
        let moving = partition.reassignment.as_deref();
        partition.replica_on(broker_id).is_some()
            || moving.is_some_and(|moving| moving.target.contains(&broker_id))
    };
    let replica_count = partitions.filter(is_there).count();
    if replica_count > 0 {
        return Outcome::Broker(Err(BrokerRefusal::HoldsReplicas {
            broker_id,
            replica_count,
        }));
    }
    state.storage_ids.remove(&broker_id);
    change.removed_brokers.push(broker_id);
    Outcome::Broker(Ok(()))
}

/// Removes brokers from leadership and ISRs. Where `incarnation` names one, their replica becomes that
/// one, because their disk is another: an empty replica under an old Raft id could vote twice. (The
/// partition's leader then takes the new replica into the Raft group in place of the old one.)
fn take_out_of_service(
    image: &ClusterImage,
    brokers: &BTreeSet<BrokerId>,
    incarnation: impl Fn(&Partition) -> Option<u64>,
    change: &mut ImageChange,
) {
    let mut topics: Vec<&Arc<_>> = image.topics.values().collect();
    topics.sort_unstable_by_key(|topic| topic.topic_id);
    for topic in topics {
        for partition in &topic.partitions {
            let mut next = partition.clone();
            if next.leader.is_some_and(|leader| brokers.contains(&leader)) {
                next.leader = None;
            }
            if next
                .wanted_leader
                .is_some_and(|wanted| brokers.contains(&wanted))
            {
                next.wanted_leader = None;
            }
            for broker_id in brokers {
                if next.isr.len() > 1 {
                    next.isr.retain(|id| id != broker_id);
                }
            }
            if let Some(incarnation) = incarnation(partition) {
                for replica in &mut next.replicas {
                    if brokers.contains(&replica.broker_id) {
                        replica.incarnation = incarnation;
                    }
                }
            }
            if next != *partition {
                next.partition_epoch = following(partition);
                change.partitions.push((topic.topic_id, next));
            }
        }
    }
}

/// The partition epoch after the present one.
pub fn following(partition: &Partition) -> PartitionEpoch {
    PartitionEpoch(partition.partition_epoch.0.saturating_add(1))
}
