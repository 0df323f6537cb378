//! How far an image may be acted on, and what is to be done then: pure, over values only.
//!
//! Invariant: nothing is deleted but on a fully trusted image, and nothing that the controllers may
//! have forgotten by a restore. A replica without a log is opened only on such an image too, and
//! never one from before a restore.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chronik_types::cluster_image::ClusterImage;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use uuid::Uuid;

use super::assignment::Wanted;
use crate::controller_client::ClusterView;

/// What is to be done. Closing and deleting comes first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Running replicas that are to stop and lose their log.
    pub remove: Vec<RaftGroupId>,
    /// Logs without a replica that are to go.
    pub delete: Vec<RaftGroupId>,
    /// Running replicas that are to stop and keep their log: the controllers have forgotten them.
    pub close: Vec<RaftGroupId>,
    /// Logs without a replica that nobody knows, where the controllers have forgotten something.
    pub unknown: Vec<RaftGroupId>,
    /// Replicas that should be here since before a restore, and whose log is not.
    pub lost: Vec<RaftGroupId>,
    pub open: Vec<RaftGroupId>,
}

/// How far an image may be acted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Not at all: the controllers' state is an older one than this broker's, and they have not heard
    /// yet what this broker holds.
    Not,
    /// What is on disk may be opened.
    Disk,
    /// It is certainly newer than all that this broker ever acted on: only then may what it does not
    /// name be deleted.
    Full,
}

pub fn trust(view: &ClusterView, broker_id: BrokerId, incarnation: Uuid) -> Trust {
    let registered = view.image.brokers.get(&broker_id);
    let is_older = |broker| view.image.is_from_before_restore(broker);
    if view.image.restored_at() > 0 && registered.is_none_or(is_older) {
        return Trust::Not;
    }
    let is_us = registered.is_some_and(|broker| broker.incarnation_id == incarnation);
    match view.live && is_us {
        true => Trust::Full,
        false => Trust::Disk,
    }
}

/// Compares what should run with what runs and what is on disk.
pub fn plan(
    image: &ClusterImage,
    wanted: &BTreeMap<RaftGroupId, Wanted>,
    running: &HashMap<RaftGroupId, ReplicaId>,
    on_disk: &BTreeSet<RaftGroupId>,
    trust: Trust,
) -> Plan {
    let mut plan = Plan::default();
    if trust == Trust::Not {
        return plan;
    }
    let trusted = trust == Trust::Full;
    if trusted {
        for (group, replica_id) in running {
            match wanted.get(group) {
                Some(wanted) if wanted.replica_id == *replica_id => {}
                None if image.is_forgotten(replica_id.incarnation) => plan.close.push(*group),
                Some(_) | None => plan.remove.push(*group),
            }
        }
        let unnamed = on_disk
            .iter()
            .filter(|group| !wanted.contains_key(*group) && !running.contains_key(*group));
        // As which replica they were held is not known, so neither is whether they are forgotten.
        match image.restores.is_empty() {
            true => plan.delete = unnamed.copied().collect(),
            false => plan.unknown = unnamed.copied().collect(),
        }
    }
    plan.remove.sort_unstable();
    plan.close.sort_unstable();
    for (group, wanted) in wanted {
        let is_replaced = plan.remove.binary_search(group).is_ok();
        if running.contains_key(group) && !is_replaced {
            continue;
        }
        // A replica without a log is opened only on the word of controllers that know this process and
        // its disk. An older image may name a replica whose log was lost with the disk: under its old
        // id it would vote a second time, with an empty log. So may a restored image.
        let is_new = wanted.replica_id.incarnation >= image.restored_at();
        if on_disk.contains(group) && !is_replaced || trusted && is_new {
            plan.open.push(*group);
        } else if trusted {
            plan.lost.push(*group);
        }
    }
    plan
}
