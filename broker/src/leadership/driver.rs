//! Carries out what `leadership` decides: one task for all groups of the broker, which sleeps while
//! nothing changes.
//!
//! Invariant: level-triggered. Whatever event comes, the group is looked at as it is now; an event
//! that is late or doubled does no harm.

#[cfg(test)]
mod driver_test;
mod elections;
mod hand_back;
mod summary;
mod voters;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chronik_types::epoch::PartitionEpoch;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use futures::StreamExt;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use self::hand_back::HAND_BACK_INTERVAL;
use self::summary::Summary;
use super::campaigns::CampaignQueue;
use super::{Assigned, CampaignTiming, GroupEvent, LeaderStatus, Moving, Place};
use crate::controller_client::ClusterView;
use crate::metrics::BrokerMetrics;
use crate::peers::campaign::greet;
use crate::peers::{LinkTable, Nudge, Peers};
use crate::replica::{Leadership, Replica};
use crate::replicas::Replicas;

/// Voters of groups changed at the same time: a new replica copies its whole log.
const CHANGES_MAX: usize = 8;

/// Leaders that speak to a follower's broker at the same time, when it comes back.
const GREETINGS_MAX: usize = 64;

/// What the driver works with.
pub struct DriverOptions {
    pub broker_id: BrokerId,
    pub timing: CampaignTiming,
    /// A leader that reaches no majority for this long leads no more.
    pub step_down_after: Duration,
    pub peers: Peers,
    /// Tells which partitions clients ask for.
    pub replicas: Replicas,
    pub view: watch::Receiver<ClusterView>,
    pub groups: mpsc::UnboundedReceiver<GroupEvent>,
    pub nudges: mpsc::Receiver<Nudge>,
    /// Tells `reporter` which groups this broker leads.
    pub led: mpsc::UnboundedSender<LedEvent>,
    pub metrics: BrokerMetrics,
    /// Set when the broker hands its leadership over in order to stop.
    pub draining: watch::Receiver<bool>,
    pub stop: CancellationToken,
}

/// A change of what this broker leads.
pub enum LedEvent {
    Leads(RaftGroupId, Place, Arc<Replica>, Leadership),
    Follows(RaftGroupId),
    /// The voters are those that this epoch of the partition wants, and stay so until the image
    /// shows a later one.
    Settled(RaftGroupId, PartitionEpoch),
}

struct Group {
    replica: Arc<Replica>,
    place: Place,
    replicas: Vec<ReplicaId>,
    /// Who shall vote, preferred leader first.
    voters: Vec<ReplicaId>,
    moving: Option<Moving>,
    leadership: Leadership,
    status: LeaderStatus,
    attempts: u32,
    /// The last leader is certainly gone, so leases need not be waited for.
    leader_gone: bool,
    due: Option<Instant>,
    /// Since when this leader reaches no majority, and when that is too long.
    step_down_at: Option<Instant>,
    /// A client asked for a leader since there is none.
    missed: bool,
    /// In the queue, or running.
    campaigning: bool,
    /// The campaign that runs; cancelled when it cannot be won.
    running: Option<CancellationToken>,
    /// The term of a candidate with a shorter log, which the next campaign goes above.
    rival_term: Option<u64>,
    handing_back: bool,
    /// It has handed over, and leaves the election to its successor until then.
    yields_until: Option<Instant>,
    /// A change of voters is under way; cancelled when something else is wanted.
    changing_voters: Option<CancellationToken>,
    stop_watching: CancellationToken,
}

/// What tasks tell the driver.
enum TaskEvent {
    Leadership(RaftGroupId),
    Campaigned(RaftGroupId),
    HandedBack(RaftGroupId),
    VotersChanged(RaftGroupId),
}

struct Driver {
    options: DriverOptions,
    groups: HashMap<RaftGroupId, Group>,
    due: BinaryHeap<Reverse<(Instant, RaftGroupId)>>,
    links: LinkTable,
    /// Groups of which no living leader is known.
    leaderless: u32,
    /// Those that are about to be found so.
    leaderless_soon: u32,
    /// How many of them second candidates wait for.
    staggered_for: u32,
    fenced: BTreeSet<BrokerId>,
    /// Groups led here whose voters are not as they should be.
    unsettled: BTreeSet<RaftGroupId>,
    next_hand_back: Option<Instant>,
    events: mpsc::UnboundedSender<TaskEvent>,
    campaigns: CampaignQueue,
    summary: Summary,
    changes: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// Runs until the token is cancelled.
pub async fn run(options: DriverOptions) {
    let mut links = options.peers.links();
    let mut view = options.view.clone();
    let stop = options.stop.clone();
    let replicas = options.replicas.clone();
    let (mut driver, mut task_events) = Driver::new(options);
    driver.links_changed(links.borrow_and_update().clone());
    driver.view_changed(&view.borrow_and_update().clone());
    loop {
        let wake_at = driver.wake_at();
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            changed = links.changed() => {
                if changed.is_err() {
                    break;
                }
                let table = links.borrow_and_update().clone();
                driver.links_changed(table);
            }
            Some(event) = driver.options.groups.recv() => driver.group_event(event),
            Some(event) = task_events.recv() => driver.task_event(event),
            Some(nudge) = driver.options.nudges.recv() => driver.nudged(nudge),
            missed = replicas.missed() => missed.into_iter().for_each(|group| driver.missed(group)),
            changed = view.changed() => {
                if changed.is_err() {
                    break;
                }
                let view = view.borrow_and_update().clone();
                driver.view_changed(&view);
            }
            () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {
                driver.timers(Instant::now());
            }
        }
        driver.wait_less();
    }
    for group in driver.groups.values() {
        group.stop_watching.cancel();
    }
    driver.tasks.close();
    driver.tasks.wait().await;
}

impl Driver {
    /// And what its tasks tell it.
    fn new(options: DriverOptions) -> (Driver, mpsc::UnboundedReceiver<TaskEvent>) {
        let (events, task_events) = mpsc::unbounded_channel();
        let driver = Driver {
            options,
            groups: HashMap::new(),
            due: BinaryHeap::new(),
            links: LinkTable::default(),
            leaderless: 0,
            leaderless_soon: 0,
            staggered_for: 0,
            fenced: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            next_hand_back: None,
            events,
            campaigns: CampaignQueue::default(),
            summary: Summary::default(),
            changes: Arc::new(Semaphore::new(CHANGES_MAX)),
            tasks: TaskTracker::new(),
        };
        (driver, task_events)
    }

    fn wake_at(&self) -> Option<Instant> {
        let due = self.due.peek().map(|Reverse((at, _))| *at);
        [due, self.next_hand_back, self.summary.at]
            .into_iter()
            .flatten()
            .min()
    }

    fn group_event(&mut self, event: GroupEvent) {
        match event {
            GroupEvent::Opened(assigned, replica) => {
                let Assigned {
                    group,
                    place,
                    replicas,
                    voters,
                    moving,
                } = assigned;
                let stop_watching = self.options.stop.child_token();
                self.watch_leadership(group, &replica, stop_watching.clone());
                let state = Group {
                    leadership: *replica.leadership().borrow(),
                    replica,
                    place,
                    replicas,
                    voters,
                    moving,
                    status: LeaderStatus::None,
                    attempts: 0,
                    leader_gone: false,
                    due: None,
                    step_down_at: None,
                    missed: false,
                    campaigning: false,
                    running: None,
                    rival_term: None,
                    handing_back: false,
                    yields_until: None,
                    changing_voters: None,
                    stop_watching,
                };
                self.leaderless = self.leaderless.saturating_add(1);
                if let Some(before) = self.groups.insert(group, state) {
                    self.forget(&before);
                }
                self.leadership_changed(group);
            }
            GroupEvent::Assigned(assigned) => {
                let group = assigned.group;
                if let Some(state) = self.groups.get_mut(&group) {
                    state.replicas = assigned.replicas;
                    state.moving = assigned.moving;
                    if state.voters != assigned.voters {
                        state.voters = assigned.voters;
                        if let Some(change) = &state.changing_voters {
                            change.cancel();
                        }
                    }
                    self.check_voters(group);
                    self.evaluate(group);
                    self.plan_hand_back(HAND_BACK_INTERVAL);
                }
            }
            GroupEvent::Closed(group) => {
                self.unsettled.remove(&group);
                if let Some(state) = self.groups.remove(&group) {
                    self.forget(&state);
                    self.options.led.send(LedEvent::Follows(group)).ok();
                }
            }
        }
    }

    fn forget(&mut self, state: &Group) {
        state.stop_watching.cancel();
        if !has_leader(state.status) {
            self.leaderless = self.leaderless.saturating_sub(1);
        }
    }

    fn watch_leadership(&self, group: RaftGroupId, replica: &Replica, stop: CancellationToken) {
        let mut leadership = replica.leadership();
        let events = self.events.clone();
        self.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = leadership.changed() => if changed.is_err() {
                        return;
                    },
                }
                leadership.borrow_and_update();
                if events.send(TaskEvent::Leadership(group)).is_err() {
                    return;
                }
            }
        });
    }

    fn task_event(&mut self, event: TaskEvent) {
        match event {
            TaskEvent::Leadership(group) => self.leadership_changed(group),
            TaskEvent::Campaigned(group) => {
                self.campaigns.ended();
                if let Some(state) = self.groups.get_mut(&group) {
                    debug!(
                        raft_group_id = group.0,
                        attempts = state.attempts,
                        leader = ?state.leadership.leader,
                        "a campaign has ended"
                    );
                    state.campaigning = false;
                    state.running = None;
                    state.attempts = state.attempts.saturating_add(1);
                    state.due = None;
                    self.evaluate(group);
                    self.go_ahead(group);
                }
                self.start_campaigns();
            }
            TaskEvent::HandedBack(group) => {
                if let Some(state) = self.groups.get_mut(&group) {
                    state.handing_back = false;
                }
            }
            TaskEvent::VotersChanged(group) => {
                if let Some(state) = self.groups.get_mut(&group) {
                    state.changing_voters = None;
                    self.check_voters(group);
                }
            }
        }
    }

    fn leadership_changed(&mut self, group: RaftGroupId) {
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        let before = state.leadership;
        let now = *state.replica.leadership().borrow();
        state.leadership = now;
        if before.is_leader != now.is_leader || before.leader_epoch != now.leader_epoch {
            if now.is_leader {
                debug!(
                    raft_group_id = group.0,
                    leader_epoch = now.leader_epoch.0,
                    "leads a partition"
                );
                self.options.metrics.leaders_elected.inc();
                self.summary.gained();
            } else if before.is_leader {
                debug!(raft_group_id = group.0, "leads a partition no more");
                self.summary.lost();
            }
        }
        let event = match now.is_leader {
            true => LedEvent::Leads(group, state.place, state.replica.clone(), now),
            false => LedEvent::Follows(group),
        };
        self.options.led.send(event).ok();
        if now.is_leader {
            self.plan_hand_back(HAND_BACK_INTERVAL);
            self.check_voters(group);
        }
        self.evaluate(group);
    }

    /// A peer can be reached again: it learns who leads, and what it missed is sent at once.
    fn greet(&self, broker: BrokerId) {
        let led: Vec<(Arc<Replica>, ReplicaId)> = self
            .groups
            .values()
            // As it is now: what it became a moment ago has not been told yet.
            .filter(|group| group.replica.leadership().borrow().is_leader)
            .filter_map(|group| {
                let there = group
                    .replicas
                    .iter()
                    .find(|replica| replica.broker_id == broker)?;
                Some((group.replica.clone(), *there))
            })
            .collect();
        if !led.is_empty() {
            let peers = self.options.peers.clone();
            self.tasks.spawn(async move {
                let greetings = futures::stream::iter(led);
                let greetings = greetings.for_each_concurrent(GREETINGS_MAX, |greeted| {
                    let peers = &peers;
                    async move {
                        greet(peers, &greeted.0, greeted.1).await;
                    }
                });
                greetings.await;
            });
        }
    }

    fn view_changed(&mut self, view: &ClusterView) {
        let fenced: BTreeSet<BrokerId> = if view.connected {
            let brokers = view.image.brokers.values();
            brokers
                .filter(|broker| broker.fenced)
                .map(|broker| broker.broker_id)
                .collect()
        } else {
            BTreeSet::new()
        };
        if fenced != self.fenced {
            self.fenced = fenced;
            self.evaluate_all();
        }
        self.check_unsettled();
        self.plan_hand_back(HAND_BACK_INTERVAL);
    }
}

fn has_leader(status: LeaderStatus) -> bool {
    matches!(status, LeaderStatus::Me | LeaderStatus::Live)
}
