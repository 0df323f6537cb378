//! Brings the replicas that run here in line with what the cluster image assigns to this broker.
//! The only creator and remover of replicas.
//!
//! Invariant: level-triggered, safe to run twice. A log is deleted only on the word of an image that
//! is certainly newer than everything this broker acted on before: one that a controller sent and
//! that contains this very process as registered. What the controllers have forgotten, because their
//! state was restored from a backup, is never deleted.

mod assignment;
mod open;
mod plan;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chronik_storage::Storage;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use futures::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use self::assignment::Assignment;
use self::open::{close_one, open_logs, open_one, remove_one};
use self::plan::{Plan, Trust, plan, trust};
use crate::controller_client::{ClusterView, ControllerClient};
use crate::leadership::{Assigned, GroupEvent};
use crate::peers::Peers;
use crate::replica::{PartitionState, Upkeep};
use crate::replicas::Replicas;

/// Replicas opened or closed at the same time.
const PARALLEL_MAX: usize = 64;
/// Logs opened in one go, which may read the disk.
const OPEN_CHUNK: usize = 256;
/// Before a replica that could not be opened is tried again.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// What the reconciler works with.
pub struct ReconcileOptions {
    pub broker_id: BrokerId,
    pub incarnation: Uuid,
    pub storage: Storage,
    pub replicas: Replicas,
    pub peers: Peers,
    pub raft_config: Arc<openraft::Config>,
    pub client: ControllerClient,
    pub groups: mpsc::UnboundedSender<GroupEvent>,
    pub upkeep: Upkeep,
    /// The number of replicas that should run here but do not.
    pub missing: watch::Sender<usize>,
    pub stop: CancellationToken,
}

struct Running {
    replica_id: ReplicaId,
    assigned: Assigned,
    state: watch::Sender<PartitionState>,
}

/// The worker. Owns what runs.
pub struct Reconciler {
    options: ReconcileOptions,
    running: HashMap<RaftGroupId, Running>,
    on_disk: BTreeSet<RaftGroupId>,
    /// Logs that must be deleted before anything may be opened under their name.
    doomed: BTreeSet<RaftGroupId>,
    assignment: Assignment,
    /// The last pass did all that was to be done, and how far its image was trusted.
    done: Option<Trust>,
    /// What was logged about logs that a restore has left without a place.
    told: BTreeSet<RaftGroupId>,
}

impl Reconciler {
    pub fn new(options: ReconcileOptions) -> Self {
        let on_disk = options.storage.group_ids().into_iter().collect();
        Self {
            assignment: Assignment::new(options.broker_id),
            options,
            running: HashMap::new(),
            on_disk,
            doomed: BTreeSet::new(),
            done: None,
            told: BTreeSet::new(),
        }
    }

    /// Follows the image until the token is cancelled.
    pub async fn run(mut self, mut view: watch::Receiver<ClusterView>) {
        let stop = self.options.stop.clone();
        loop {
            let now = view.borrow_and_update().clone();
            let complete = self.reconcile(&now).await;
            let retry = async {
                match complete {
                    true => std::future::pending().await,
                    false => tokio::time::sleep(RETRY_DELAY).await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                changed = view.changed() => if changed.is_err() {
                    return;
                },
                () = retry => {}
            }
        }
    }

    /// One pass. False: something could not be done and is to be tried again.
    pub async fn reconcile(&mut self, view: &ClusterView) -> bool {
        let options = &self.options;
        let trust = trust(view, options.broker_id, options.incarnation);
        let change = self.assignment.take_in(&view.image);
        options
            .peers
            .set_addresses(&self.assignment.peer_addresses(&view.image));
        self.update(&change.updated);
        if !change.moved && self.done == Some(trust) {
            self.options.client.acted_on(view.image.revision);
            return true;
        }
        self.done = None;
        let running = self
            .running
            .iter()
            .map(|(group, running)| (*group, running.replica_id));
        let wanted = self.assignment.wanted();
        let running = running.collect();
        let plan = plan(&view.image, wanted, &running, &self.on_disk, trust);
        self.tell(&plan);
        self.close(&plan).await;
        let mut complete = self.remove(&plan).await;
        complete &= self.open(&plan).await;
        let missing = self.assignment.wanted().keys();
        let missing =
            missing.filter(|group| !self.running.contains_key(group) && !plan.lost.contains(group));
        self.options.missing.send_replace(missing.count());
        if complete {
            self.done = Some(trust);
            self.options.client.acted_on(view.image.revision);
        }
        complete
    }

    /// Publishes what changed about replicas that go on running.
    fn update(&mut self, groups: &[RaftGroupId]) {
        for group in groups {
            let (Some(running), Some(wanted)) = (
                self.running.get_mut(group),
                self.assignment.wanted().get(group),
            ) else {
                continue;
            };
            let log_config = running.state.borrow().log;
            running.state.send_if_modified(|state| {
                let changed = *state != wanted.state;
                if changed {
                    state.clone_from(&wanted.state);
                }
                changed
            });
            if log_config != wanted.state.log
                && let Some(replica) = self.options.replicas.get(*group)
            {
                replica.ask_upkeep();
            }
            let assigned = wanted.assigned(*group);
            if running.assigned != assigned {
                running.assigned.clone_from(&assigned);
                self.options
                    .groups
                    .send(GroupEvent::Assigned(assigned))
                    .ok();
            }
        }
    }

    /// Says, once, what a restore has left without a place.
    fn tell(&mut self, plan: &Plan) {
        let told = &mut self.told;
        let mut news = |groups: &[RaftGroupId]| -> Vec<u64> {
            let news = groups.iter().filter(|group| told.insert(**group));
            news.map(|group| group.0).collect()
        };
        let kept = news(&[&plan.close[..], &plan.unknown].concat());
        if !kept.is_empty() {
            warn!(
                raft_group_ids = ?kept,
                "the controllers were restored from a backup that does not know these logs; they are \
                 kept on disk and serve nobody"
            );
        }
        let lost = news(&plan.lost);
        if !lost.is_empty() {
            warn!(
                raft_group_ids = ?lost,
                "the controllers were restored from a backup by which these replicas are here, but \
                 their logs are not: they are not opened"
            );
        }
    }

    /// Stops replicas whose logs stay.
    async fn close(&mut self, plan: &Plan) {
        for group in &plan.close {
            self.running.remove(group);
            close_one(&self.options, *group).await;
        }
    }

    async fn remove(&mut self, plan: &Plan) -> bool {
        for group in &plan.remove {
            self.running.remove(group);
        }
        self.doomed.extend(plan.remove.iter().chain(&plan.delete));
        let options = &self.options;
        let gone: Vec<RaftGroupId> = futures::stream::iter(self.doomed.clone())
            .map(|group| remove_one(options, group))
            .buffer_unordered(PARALLEL_MAX)
            .filter_map(std::future::ready)
            .collect()
            .await;
        for group in &gone {
            self.doomed.remove(group);
            self.on_disk.remove(group);
        }
        self.doomed.is_empty()
    }

    async fn open(&mut self, plan: &Plan) -> bool {
        let mut count = 0usize;
        for groups in plan.open.chunks(OPEN_CHUNK) {
            count = count.saturating_add(self.open_chunk(groups).await);
        }
        if count > 0 {
            info!(
                opened = count,
                running = self.running.len(),
                "replicas opened"
            );
        }
        count == plan.open.len()
    }

    /// Returns how many were opened.
    async fn open_chunk(&mut self, groups: &[RaftGroupId]) -> usize {
        let groups: Vec<RaftGroupId> = groups
            .iter()
            .copied()
            .filter(|group| !self.doomed.contains(group))
            .collect();
        let logs = open_logs(&self.options.storage, groups).await;
        let mut to_open = Vec::with_capacity(logs.len());
        for (group, log) in logs {
            if let Some(wanted) = self.assignment.wanted().get(&group) {
                to_open.push((group, wanted.clone(), log));
            }
        }
        let options = &self.options;
        let mut opened = futures::stream::iter(to_open)
            .map(|(group, wanted, log)| async move {
                let result = open_one(options, group, &wanted, log).await;
                (group, wanted, result)
            })
            .buffer_unordered(PARALLEL_MAX);
        let mut count = 0usize;
        while let Some((group, wanted, result)) = opened.next().await {
            match result {
                Ok(state) => {
                    count = count.saturating_add(1);
                    self.on_disk.insert(group);
                    let running = Running {
                        replica_id: wanted.replica_id,
                        assigned: wanted.assigned(group),
                        state,
                    };
                    self.running.insert(group, running);
                }
                Err(error) => error!(
                    raft_group_id = group.0,
                    error = &error as &dyn std::error::Error,
                    "a replica cannot be opened; it is tried again"
                ),
            }
        }
        count
    }
}

#[cfg(test)]
#[path = "reconcile_test.rs"]
mod tests;
