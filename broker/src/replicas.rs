//! The registry of the replicas that run in this broker. Lookup only: `reconcile` is the only one
//! that adds and removes.
//!
//! Invariant: at most one replica per Raft group is registered at any time.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use chronik_types::id::RaftGroupId;

use crate::replica::Replica;

/// Cheap to clone; all clones see the same replicas.
#[derive(Clone, Default)]
pub struct Replicas {
    by_group: Arc<RwLock<HashMap<RaftGroupId, Arc<Replica>>>>,
}

impl Replicas {
    pub fn new() -> Self {
        Self::default()
    }

    /// The replica of that Raft group, if it runs here.
    pub fn get(&self, group: RaftGroupId) -> Option<Arc<Replica>> {
        self.by_group
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&group)
            .cloned()
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
