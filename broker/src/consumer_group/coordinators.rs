//! The registry of the coordinators that run in this broker.
//!
//! Invariant: at most one coordinator per partition is registered; one that is replaced or removed
//! stops.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chronik_types::id::RaftGroupId;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::config::GroupConfig;
use super::coordinator::Coordinator;
use super::log::GroupLog;

/// The coordinators that run in this broker, by their partition. Cheap to clone.
#[derive(Clone)]
pub struct Coordinators {
    inner: Arc<CoordinatorsInner>,
}

struct CoordinatorsInner {
    config: Arc<GroupConfig>,
    by_group: Mutex<HashMap<RaftGroupId, Arc<Coordinator>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Coordinators {
    pub fn new(config: GroupConfig, stop: CancellationToken) -> Coordinators {
        Coordinators {
            inner: Arc::new(CoordinatorsInner {
                config: Arc::new(config),
                by_group: Mutex::default(),
                tasks: TaskTracker::new(),
                stop,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RaftGroupId, Arc<Coordinator>>> {
        self.inner
            .by_group
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, group: RaftGroupId) -> Option<Arc<Coordinator>> {
        self.lock().get(&group).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Coordinator>> {
        self.lock().values().cloned().collect()
    }

    /// Starts a coordinator over a partition's log; replaces the one that was there. Must be called
    /// within a Tokio runtime.
    pub fn start<L: GroupLog>(&self, group: RaftGroupId, log: L) {
        let stop = self.inner.stop.child_token();
        let config = self.inner.config.clone();
        let coordinator = Coordinator::start(group, log, config, &self.inner.tasks, stop);
        if let Some(replaced) = self.lock().insert(group, Arc::new(coordinator)) {
            replaced.stop();
        }
    }

    /// Stops the coordinators whose partition `keep` does not want.
    pub fn retain(&self, keep: impl Fn(RaftGroupId) -> bool) {
        self.lock().retain(|group, coordinator| {
            let keep = keep(*group);
            if !keep {
                coordinator.stop();
            }
            keep
        });
    }

    /// Topics are gone from the cluster: so are the offsets committed for them.
    pub fn topics_removed(&self, topics: &[(Uuid, Arc<str>)]) {
        for coordinator in self.all() {
            coordinator.topics_removed(topics);
        }
    }

    /// Stops all, and waits for their tasks.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.lock().clear();
    }
}
