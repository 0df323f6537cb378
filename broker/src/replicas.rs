//! The registry of the replicas that run in this broker. Lookup only: `reconcile` is the only one
//! that adds and removes.
//!
//! Invariant: at most one replica per Raft group is registered at any time.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use chronik_types::id::RaftGroupId;
use tokio::sync::Notify;

use crate::replica::Replica;

type ByGroup = RwLock<HashMap<RaftGroupId, Arc<Replica>>>;

/// Cheap to clone; all clones see the same replicas.
#[derive(Clone, Default)]
pub struct Replicas {
    by_group: Arc<ByGroup>,
    missed: Arc<Missed>,
}

/// Groups whose leader somebody asked for in vain.
#[derive(Default)]
struct Missed {
    groups: Mutex<BTreeSet<RaftGroupId>>,
    more: Notify,
}

/// The registry for those that its replicas hold themselves: keeps nothing alive.
#[derive(Clone)]
pub struct WeakReplicas {
    by_group: Weak<ByGroup>,
}

impl WeakReplicas {
    /// The replica of that Raft group, if it runs here.
    pub fn get(&self, group: RaftGroupId) -> Option<Arc<Replica>> {
        find(&*self.by_group.upgrade()?, group)
    }

    /// Every replica that runs here, in no order.
    pub fn all(&self) -> Vec<Arc<Replica>> {
        let Some(by_group) = self.by_group.upgrade() else {
            return Vec::new();
        };
        let map = by_group.read().unwrap_or_else(PoisonError::into_inner);
        map.values().cloned().collect()
    }
}

impl Replicas {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn downgrade(&self) -> WeakReplicas {
        WeakReplicas {
            by_group: Arc::downgrade(&self.by_group),
        }
    }

    /// The replica of that Raft group, if it runs here.
    pub fn get(&self, group: RaftGroupId) -> Option<Arc<Replica>> {
        find(&self.by_group, group)
    }

    /// A client wants to use a partition of which no leader is known here: its election goes first.
    /// Bounded by the number of replicas.
    pub fn miss_leader(&self, group: RaftGroupId) {
        let mut groups = self.missed.lock();
        if groups.insert(group) {
            drop(groups);
            self.missed.more.notify_one();
        }
    }

    /// The groups that were missed since the last call; waits until there is one. For the one
    /// driver of elections.
    pub async fn missed(&self) -> BTreeSet<RaftGroupId> {
        loop {
            let more = self.missed.more.notified();
            let groups = std::mem::take(&mut *self.missed.lock());
            if !groups.is_empty() {
                return groups;
            }
            more.await;
        }
    }

    /// Every replica that runs here, in no order.
    pub fn all(&self) -> Vec<(RaftGroupId, Arc<Replica>)> {
        let map = self.by_group.read().unwrap_or_else(PoisonError::into_inner);
        map.iter()
            .map(|(group, replica)| (*group, replica.clone()))
            .collect()
    }

    pub fn count(&self) -> usize {
        self.by_group
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// For `reconcile`: adds a replica, and returns the one that it replaces.
    pub fn insert(&self, group: RaftGroupId, replica: Arc<Replica>) -> Option<Arc<Replica>> {
        self.by_group
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(group, replica)
    }

    /// For `reconcile`: takes a replica out; requests that hold it finish on their own.
    pub fn remove(&self, group: RaftGroupId) -> Option<Arc<Replica>> {
        self.by_group
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&group)
    }
}

impl Missed {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<RaftGroupId>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(by_group: &ByGroup, group: RaftGroupId) -> Option<Arc<Replica>> {
    by_group
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .get(&group)
        .cloned()
}
