//! Brings the replicas that run here in line with what the cluster image assigns to this broker.
//! The only creator and remover of replicas.
//!
//! Invariant: level-triggered, safe to run twice. A log is deleted only on the word of an image that
//! is certainly newer than everything this broker acted on before: one that a controller sent and
//! that contains this very process as registered.

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
        if change.moved || !change.updated.is_empty() {
            let replicas = self.wanted.values().flat_map(|wanted| &wanted.replicas);
            self.peers = replicas.map(|replica| replica.broker_id).collect();
            self.peers.remove(&self.broker_id);
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

/// Whether the image is certainly newer than all that this broker ever acted on: only then may
/// what it does not name be deleted.
pub fn is_trusted(view: &ClusterView, broker_id: BrokerId, incarnation: Uuid) -> bool {
    let registered = view.image.brokers.get(&broker_id);
    view.live && registered.is_some_and(|broker| broker.incarnation_id == incarnation)
}

/// Compares what should run with what runs and what is on disk.
pub fn plan(
    wanted: &BTreeMap<RaftGroupId, Wanted>,
    running: &HashMap<RaftGroupId, ReplicaId>,
    on_disk: &BTreeSet<RaftGroupId>,
    trusted: bool,
) -> Plan {
    let mut plan = Plan::default();
    if trusted {
        for (group, replica_id) in running {
            if wanted
                .get(group)
                .is_none_or(|wanted| wanted.replica_id != *replica_id)
            {
                plan.remove.push(*group);
            }
        }
        plan.delete = on_disk
            .iter()
            .filter(|group| !wanted.contains_key(*group) && !running.contains_key(*group))
            .copied()
            .collect();
    }
    plan.remove.sort_unstable();
    // A replica without a log is opened only on the word of controllers that know this process and
    // its disk. An older image may name a replica whose log was lost with the disk: under its old id
    // it would vote a second time, with an empty log.
    let opens = wanted
        .keys()
        .filter(|group| !running.contains_key(*group) || plan.remove.binary_search(group).is_ok())
        .filter(|group| trusted || on_disk.contains(*group));
    plan.open = opens.copied().collect();
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
    /// The last pass did all that was to be done, and whether its image was trusted.
    done: Option<bool>,
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
        let trusted = is_trusted(view, options.broker_id, options.incarnation);
        let change = self.assignment.take_in(&view.image);
        options
            .peers
            .set_addresses(&self.assignment.peer_addresses(&view.image));
        self.update(&change.updated);
        if !change.moved && self.done == Some(trusted) {
            self.options.client.acted_on(view.image.revision);
            return true;
        }
        self.done = None;
        let running = self
            .running
            .iter()
            .map(|(group, running)| (*group, running.replica_id));
        let wanted = self.assignment.wanted();
        let plan = plan(wanted, &running.collect(), &self.on_disk, trusted);
        let mut complete = self.remove(&plan).await;
        complete &= self.open(&plan).await;
        let missing = self.assignment.wanted().keys();
        let missing = missing.filter(|group| !self.running.contains_key(group));
        self.options.missing.send_replace(missing.count());
        if complete {
            self.done = Some(trusted);
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

/// Stops the replica, if it runs, and deletes its log.
async fn remove_one(options: &ReconcileOptions, group: RaftGroupId) -> Option<RaftGroupId> {
    if let Some(replica) = options.replicas.remove(group) {
        options.groups.send(GroupEvent::Closed(group)).ok();
        replica.shutdown().await;
    }
    options.peers.heard().forget(group);
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
mod tests {
    use super::*;
    use chronik_types::cluster_image::{Broker, Drain, Partition};
    use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
    use chronik_types::id::PartitionIndex;

    fn replica(broker: i32, incarnation: u64) -> ReplicaId {
        ReplicaId {
            broker_id: BrokerId(broker),
            incarnation,
        }
    }

    fn image(groups: &[(u64, &[ReplicaId])]) -> ClusterImage {
        let partitions = (0..)
            .zip(groups)
            .map(|(index, (group, replicas))| Partition {
                partition: PartitionIndex(index),
                raft_group_id: RaftGroupId(*group),
                replicas: replicas.to_vec(),
                isr: Vec::new(),
                leader: None,
                leader_epoch: LeaderEpoch(0),
                partition_epoch: PartitionEpoch(0),
                ..Partition::default()
            })
            .collect();
        let mut image = ClusterImage {
            revision: 1,
            ..Default::default()
        };
        image.put_topic(Arc::new(Topic {
            topic_id: TopicId(Uuid::from_u128(1)),
            name: "t".into(),
            configs: BTreeMap::new(),
            partitions,
        }));
        image
    }

    fn wanted(image: &ClusterImage, broker_id: BrokerId) -> BTreeMap<RaftGroupId, Wanted> {
        let mut assignment = Assignment::new(broker_id);
        assignment.take_in(image);
        assignment.wanted
    }

    fn check(
        image: &ClusterImage,
        running: &[(u64, ReplicaId)],
        on_disk: &[u64],
        trusted: bool,
    ) -> Plan {
        let running = running
            .iter()
            .map(|(group, id)| (RaftGroupId(*group), *id))
            .collect();
        let on_disk = on_disk.iter().copied().map(RaftGroupId).collect();
        plan(&wanted(image, BrokerId(1)), &running, &on_disk, trusted)
    }

    fn groups(ids: &[u64]) -> Vec<RaftGroupId> {
        ids.iter().copied().map(RaftGroupId).collect()
    }

    #[test]
    fn assigned_replicas_are_opened_once() {
        let both = [replica(1, 5), replica(2, 5)];
        let image = image(&[(7, &both), (8, &both[1..])]);
        let first = check(&image, &[], &[7], true);
        assert_eq!(
            first,
            Plan {
                open: groups(&[7]),
                ..Plan::default()
            }
        );
        assert_eq!(check(&image, &[(7, both[0])], &[7], true), Plan::default());
        assert_eq!(check(&image, &[], &[7], false), first);
    }

    #[test]
    fn a_replica_that_lost_its_log_is_not_opened_under_its_old_id() {
        let image = image(&[(7, &[replica(1, 5), replica(2, 5)])]);
        assert_eq!(check(&image, &[], &[], false), Plan::default());
        let opened = Plan {
            open: groups(&[7]),
            ..Plan::default()
        };
        assert_eq!(check(&image, &[], &[], true), opened);
    }

    #[test]
    fn what_is_not_assigned_goes_only_on_a_trusted_image() {
        let image = image(&[]);
        let running = [(7, replica(1, 5))];
        assert_eq!(check(&image, &running, &[7, 9], false), Plan::default());
        let gone = Plan {
            remove: groups(&[7]),
            delete: groups(&[9]),
            open: Vec::new(),
        };
        assert_eq!(check(&image, &running, &[7, 9], true), gone);
    }

    #[test]
    fn a_new_incarnation_replaces_the_old_replica() {
        let image = image(&[(7, &[replica(1, 9), replica(2, 5)])]);
        let running = [(7, replica(1, 5))];
        let replaced = Plan {
            remove: groups(&[7]),
            delete: Vec::new(),
            open: groups(&[7]),
        };
        assert_eq!(check(&image, &running, &[7], true), replaced);
        assert_eq!(check(&image, &running, &[7], false), Plan::default());
        // It is not a first voter: the others have been running the group since revision 5.
        assert!(!wanted(&image, BrokerId(1))[&RaftGroupId(7)].is_founder());
        assert!(!wanted(&image, BrokerId(2))[&RaftGroupId(7)].is_founder());
    }

    #[test]
    fn an_image_is_trusted_once_it_knows_this_process() {
        let mut image = image(&[]);
        let broker = |incarnation_id| Broker {
            broker_id: BrokerId(1),
            incarnation_id,
            broker_epoch: BrokerEpoch(1),
            rpc_address: "a:1".to_owned(),
            rack: None,
            fenced: false,
            drain: Drain::None,
        };
        let us = Uuid::from_u128(5);
        let view = |image: &ClusterImage, live| ClusterView {
            image: Arc::new(image.clone()),
            live,
            connected: live,
        };
        assert!(!is_trusted(&view(&image, true), BrokerId(1), us));
        image
            .brokers
            .insert(BrokerId(1), broker(Uuid::from_u128(4)));
        assert!(!is_trusted(&view(&image, true), BrokerId(1), us));
        image.brokers.insert(BrokerId(1), broker(us));
        assert!(is_trusted(&view(&image, true), BrokerId(1), us));
        assert!(!is_trusted(&view(&image, false), BrokerId(1), us));
    }

    #[test]
    fn only_brokers_that_share_a_partition_are_peers() {
        let mut image = image(&[(7, &[replica(1, 5), replica(2, 5)]), (8, &[replica(3, 5)])]);
        for id in 1..=3 {
            let broker = Broker {
                broker_id: BrokerId(id),
                incarnation_id: Uuid::nil(),
                broker_epoch: BrokerEpoch(1),
                rpc_address: format!("b:{id}"),
                rack: None,
                fenced: false,
                drain: Drain::None,
            };
            image.brokers.insert(BrokerId(id), broker);
        }
        let mut assignment = Assignment::new(BrokerId(1));
        assignment.take_in(&image);
        let peers = assignment.peer_addresses(&image);
        assert_eq!(peers, BTreeMap::from([(BrokerId(2), "b:2".to_owned())]));
    }
    #[test]
    fn only_what_an_image_changes_is_looked_at() {
        let both = [replica(1, 5), replica(2, 5)];
        let mut now = image(&[(7, &both), (8, &both), (9, &both[1..])]);
        let mut assignment = Assignment::new(BrokerId(1));
        let first = assignment.take_in(&now);
        assert_eq!((first.moved, first.updated.len()), (true, 0));
        assert_eq!(assignment.take_in(&now), AssignmentChange::default());
        // A leader's report.
        let topic_id = TopicId(Uuid::from_u128(1));
        let change = |now: &mut ClusterImage, index: usize, change: &dyn Fn(&mut Partition)| {
            let topic = now.topics.get_mut(&topic_id).unwrap();
            change(&mut Arc::make_mut(topic).partitions[index]);
        };
        change(&mut now, 1, &|partition| partition.isr = vec![BrokerId(1)]);
        let reported = assignment.take_in(&now);
        assert_eq!((reported.moved, reported.updated), (false, groups(&[8])));
        assert_eq!(assignment.wanted[&RaftGroupId(8)].state.isr, [BrokerId(1)]);
        // One that is of no interest here, and one that becomes of interest.
        change(&mut now, 2, &|partition| partition.isr = vec![BrokerId(2)]);
        assert_eq!(assignment.take_in(&now), AssignmentChange::default());
        change(&mut now, 2, &|partition| partition.replicas = both.to_vec());
        assert!(assignment.take_in(&now).moved);
        change(&mut now, 0, &|partition| {
            partition.replicas = both[1..].to_vec()
        });
        assert!(assignment.take_in(&now).moved);
        let left: Vec<_> = assignment.wanted.keys().copied().collect();
        assert_eq!(left, groups(&[8, 9]));
        now.remove_topic(topic_id);
        assert!(assignment.take_in(&now).moved);
        assert!(assignment.wanted.is_empty() && assignment.peers.is_empty());
    }
}
