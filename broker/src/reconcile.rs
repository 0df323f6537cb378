//! Brings the replicas that run here in line with what the cluster image assigns to this broker.
//! The only creator and remover of replicas.
//!
//! Invariant: level-triggered, safe to run twice. A log is deleted only on the word of an image that
//! is certainly newer than everything this broker acted on before: one that a controller sent and
//! that contains this very process as registered. What the controllers have forgotten, because their
//! state was restored from a backup, is never deleted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chronik_storage::{PartitionLog, Storage, StorageError};
use chronik_types::cluster_image::{ClusterImage, Topic};
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId, TopicId};
use futures::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::controller_client::{ClusterView, ControllerClient};
use crate::leadership::{Assigned, GroupEvent, Moving, Place};
use crate::peers::Peers;
use crate::replica::{OpenError, PartitionState, Replica, ReplicaOptions, Upkeep};
use crate::replicas::Replicas;

/// Replicas opened or closed at the same time.
const PARALLEL_MAX: usize = 64;
/// Logs opened in one go, which may read the disk.
const OPEN_CHUNK: usize = 256;
/// Before a replica that could not be opened is tried again.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// One replica that the image assigns to this broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub replica_id: ReplicaId,
    pub place: Place,
    /// Preferred leader first.
    pub replicas: Vec<ReplicaId>,
    /// Those that shall vote in the end.
    pub voters: Vec<ReplicaId>,
    pub moving: Option<Moving>,
    pub state: PartitionState,
}

impl Wanted {
    fn assigned(&self, group: RaftGroupId) -> Assigned {
        Assigned {
            group,
            place: self.place,
            replicas: self.replicas.clone(),
            voters: self.voters.clone(),
            moving: self.moving,
        }
    }

    /// Whether all replicas were assigned together, so that they are the group's first voters. A
    /// replica that came later waits for its leader instead.
    pub fn is_founder(&self) -> bool {
        self.replicas
            .iter()
            .all(|replica| replica.incarnation == self.replica_id.incarnation)
    }
}

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

/// What the image assigns to this broker, kept up to date from one image to the next: a change costs
/// what it touches, not what there is.
#[derive(Debug)]
pub struct Assignment {
    broker_id: BrokerId,
    topics: HashMap<TopicId, Arc<Topic>>,
    wanted: BTreeMap<RaftGroupId, Wanted>,
    /// Brokers that share a partition with this one.
    peers: BTreeSet<BrokerId>,
}

/// What a new image changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct AssignmentChange {
    /// Groups that are wanted and were not, or as another replica, or the other way round.
    pub moved: bool,
    /// Other replicas of groups that stay wanted.
    pub placed: bool,
    /// Groups that stay wanted, whose partition changed.
    pub updated: Vec<RaftGroupId>,
}

impl Assignment {
    pub fn new(broker_id: BrokerId) -> Self {
        Self {
            broker_id,
            topics: HashMap::new(),
            wanted: BTreeMap::new(),
            peers: BTreeSet::new(),
        }
    }

    pub fn wanted(&self) -> &BTreeMap<RaftGroupId, Wanted> {
        &self.wanted
    }

    /// Peers that share a partition with this broker, and where they are.
    pub fn peer_addresses(&self, image: &ClusterImage) -> BTreeMap<BrokerId, String> {
        let address = |peer: &BrokerId| Some((*peer, image.brokers.get(peer)?.rpc_address.clone()));
        self.peers.iter().filter_map(address).collect()
    }

    /// Takes in an image. Topics that it shares with the one before are not looked at.
    pub fn take_in(&mut self, image: &ClusterImage) -> AssignmentChange {
        let mut change = AssignmentChange::default();
        for (topic_id, topic) in &image.topics {
            let before = self.topics.get(topic_id).cloned();
            if before
                .as_ref()
                .is_some_and(|before| Arc::ptr_eq(before, topic))
            {
                continue;
            }
            self.take_in_topic(before.as_deref(), topic, &mut change);
            self.topics.insert(*topic_id, topic.clone());
        }
        if self.topics.len() > image.topics.len() {
            let wanted = &mut self.wanted;
            self.topics.retain(|topic_id, topic| {
                let stays = image.topics.contains_key(topic_id);
                if !stays {
                    for partition in &topic.partitions {
                        change.moved |= wanted.remove(&partition.raft_group_id).is_some();
                    }
                }
                stays
            });
        }
        if change.moved || change.placed {
            let replicas = self.wanted.values().flat_map(|wanted| &wanted.replicas);
            let mut peers = BTreeSet::new();
            for replica in replicas {
                if !peers.contains(&replica.broker_id) {
                    peers.insert(replica.broker_id);
                }
            }
            peers.remove(&self.broker_id);
            self.peers = peers;
        }
        change
    }

    fn take_in_topic(
        &mut self,
        before: Option<&Topic>,
        topic: &Topic,
        change: &mut AssignmentChange,
    ) {
        let same_configs = before.is_some_and(|before| before.configs == topic.configs);
        let mut old = before
            .map(|before| before.partitions.as_slice())
            .unwrap_or_default()
            .iter();
        for partition in &topic.partitions {
            let old = old.next();
            if same_configs && old == Some(partition) {
                continue;
            }
            if let Some(old) = old
                && old.raft_group_id != partition.raft_group_id
            {
                change.moved |= self.wanted.remove(&old.raft_group_id).is_some();
            }
            let group = partition.raft_group_id;
            let Some(replica_id) = partition.replica_on(self.broker_id) else {
                change.moved |= self.wanted.remove(&group).is_some();
                continue;
            };
            let wanted = Wanted {
                replica_id,
                place: Place {
                    topic_id: topic.topic_id,
                    partition: partition.partition,
                },
                replicas: partition.replicas.clone(),
                voters: partition.target_replicas(),
                moving: partition.active_reassignment().map(|_| Moving {
                    partition_epoch: partition.partition_epoch,
                    leader: partition.leader,
                    leader_epoch: partition.leader_epoch,
                }),
                state: PartitionState::new(topic, partition),
            };
            match self.wanted.get_mut(&group) {
                Some(known) if *known == wanted => {}
                Some(known) => {
                    change.moved |= known.replica_id != replica_id;
                    change.placed |= known.replicas != wanted.replicas;
                    change.updated.push(group);
                    *known = wanted;
                }
                None => {
                    change.moved = true;
                    self.wanted.insert(group, wanted);
                }
            }
        }
        // Topics do not lose partitions.
        for gone in old {
            change.moved |= self.wanted.remove(&gone.raft_group_id).is_some();
        }
    }
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
    let restored_at = view.image.restored_at();
    if restored_at > 0 && registered.is_none_or(|broker| broker.broker_epoch.0 < restored_at) {
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

/// Stops the replica, if it runs.
async fn close_one(options: &ReconcileOptions, group: RaftGroupId) {
    if let Some(replica) = options.replicas.remove(group) {
        options.groups.send(GroupEvent::Closed(group)).ok();
        replica.shutdown().await;
    }
    options.peers.heard().forget(group);
}

/// Stops the replica, if it runs, and deletes its log.
async fn remove_one(options: &ReconcileOptions, group: RaftGroupId) -> Option<RaftGroupId> {
    close_one(options, group).await;
    let storage = options.storage.clone();
    let deleted = tokio::task::spawn_blocking(move || storage.delete_log(group)).await;
    match deleted {
        Ok(Ok(())) => {
            info!(
                raft_group_id = group.0,
                "the log of a partition that is gone is deleted"
            );
            Some(group)
        }
        Ok(Err(error)) => {
            warn!(raft_group_id = group.0, %error, "a log cannot be deleted; tried again");
            None
        }
        Err(_) => None,
    }
}

type OpenedLog = Result<PartitionLog, StorageError>;

async fn open_logs(storage: &Storage, groups: Vec<RaftGroupId>) -> Vec<(RaftGroupId, OpenedLog)> {
    let storage = storage.clone();
    let open = move || {
        let open = |group: RaftGroupId| (group, storage.open_log(group));
        groups.into_iter().map(open).collect()
    };
    // It fails only where the runtime is shutting down.
    tokio::task::spawn_blocking(open).await.unwrap_or_default()
}

async fn open_one(
    options: &ReconcileOptions,
    group: RaftGroupId,
    wanted: &Wanted,
    log: OpenedLog,
) -> Result<watch::Sender<PartitionState>, OpenError> {
    let log = log?;
    let state = watch::Sender::new(wanted.state.clone());
    let is_new = log.last_entry_id().is_none();
    let replica: Arc<Replica> = Replica::open_at_rest(ReplicaOptions {
        replica_id: wanted.replica_id,
        log,
        network: options.peers.network(group, wanted.replica_id),
        raft_config: options.raft_config.clone(),
        state: state.subscribe(),
        upkeep: options.upkeep.clone(),
    })?;
    // One that has a log has its first membership too, and opens when it is needed.
    if is_new
        && wanted.is_founder()
        && let Err(error) = replica
            .initialize(wanted.replicas.iter().copied().collect())
            .await
    {
        replica.shutdown().await;
        return Err(error);
    }
    options.replicas.insert(group, replica.clone());
    let assigned = wanted.assigned(group);
    options
        .groups
        .send(GroupEvent::Opened(assigned, replica))
        .ok();
    Ok(state)
}

#[cfg(test)]
#[path = "reconcile_test.rs"]
mod tests;
