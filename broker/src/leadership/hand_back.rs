//! Leaders go back to the preferred replicas of their partitions, some at a time.
//!
//! Invariant: a partition is only given to a replica that is in sync, connected for a while, and
//! nearly at the end of the log, so that giving it back costs a moment and no election by force.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use chronik_types::cluster_image::Partition;
use chronik_types::id::{BrokerId, ReplicaId};
use tokio::time::Instant;

use crate::replica::Replica;

/// Leaders given back in one pass, and the time between passes.
pub const HAND_BACKS_MAX: usize = 96;
pub const HAND_BACK_INTERVAL: Duration = Duration::from_millis(300);
pub const HAND_BACK_TIMEOUT: Duration = Duration::from_secs(5);
/// Entries that a preferred leader may be behind when it gets its partition back.
const LAG_MAX: u64 = 64;

/// Whether one partition is to be given back now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandBack {
    /// Not before something changes that is told.
    No,
    Later(Instant),
    Now,
}

/// What a decision needs to know beside the group itself.
pub struct HandBackView<'a> {
    pub up_since: &'a HashMap<BrokerId, Instant>,
    pub fenced: &'a BTreeSet<BrokerId>,
    pub delay: Duration,
    pub now: Instant,
}

impl HandBackView<'_> {
    /// `partition`: as the image has it.
    pub fn decide(
        &self,
        replica: &Replica,
        preferred: ReplicaId,
        partition: Option<&Partition>,
    ) -> HandBack {
        let broker = preferred.broker_id;
        let Some(up_since) = self.up_since.get(&broker) else {
            return HandBack::No;
        };
        if self.now < *up_since + self.delay {
            return HandBack::Later(*up_since + self.delay);
        }
        let in_sync = partition.is_some_and(|partition| partition.isr.contains(&broker));
        if !in_sync || self.fenced.contains(&broker) {
            // The image changes when that does.
            return HandBack::No;
        }
        match is_caught_up(replica, preferred) {
            true => HandBack::Now,
            false => HandBack::Later(self.now + HAND_BACK_INTERVAL),
        }
    }
}

fn is_caught_up(replica: &Replica, follower: ReplicaId) -> bool {
    let Some(progress) = replica.progress() else {
        return false;
    };
    let matched = progress
        .followers
        .iter()
        .find(|other| other.replica == follower);
    let Some(matched) = matched.and_then(|other| other.matched) else {
        return false;
    };
    progress
        .last_index
        .is_none_or(|last| last.saturating_sub(matched) <= LAG_MAX)
}
