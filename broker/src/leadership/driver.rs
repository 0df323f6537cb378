//! Carries out what `leadership` decides: one task for all groups of the broker, which sleeps while
//! nothing changes.
//!
//! Invariant: level-triggered. Whatever event comes, the group is looked at as it is now; an event
//! that is late or doubled does no harm.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chronik_types::epoch::PartitionEpoch;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use rand::Rng;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::campaigns::CampaignQueue;
use super::hand_over::{hand_over_to, is_caught_up};
use super::{Assigned, CampaignTiming, GroupEvent, GroupView, LeaderStatus, Moving, Place, World};
use super::{campaign_delay, leader_status, reaches_majority};
use crate::controller_client::ClusterView;
use crate::metrics::BrokerMetrics;
use crate::peers::campaign::{elect, greet, held_vote, take_over};
use crate::peers::membership::{Members, MembershipError, change_voters};
use crate::peers::{LinkTable, Peers};
use crate::replica::{Leadership, Replica};
use crate::replicas::Replicas;

/// How long one campaign is waited for before the next attempt is considered.
const CAMPAIGN_TIMEOUT: Duration = Duration::from_millis(150);
const CAMPAIGN_TIMEOUT_MAX: Duration = Duration::from_secs(1);
/// Same, for a new group: the others may not have opened their replicas yet.
const NEW_TIMEOUT: Duration = Duration::from_millis(40);
/// Same, where a shorter log was in the way: the first attempt often meets a term that is taken.
const NUDGED_TIMEOUT: Duration = Duration::from_millis(20);
/// The second candidate of each partition waits longer the more partitions have no leader, since the
/// first one has as many campaigns to run. One that cannot win says so, and is not waited for.
const STAGGER_PER_GROUP: Duration = Duration::from_millis(3);
const STAGGER_EXTRA_MAX: Duration = Duration::from_secs(20);
/// A campaign is waited for longer the more of them run.
const TIMEOUT_PER_CAMPAIGN: Duration = Duration::from_millis(10);
/// A partition that was used so recently counts as in use.
const IN_USE: Duration = Duration::from_secs(10);
/// What happened to many partitions is told in one line per interval.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(1);
/// Leaders handed over on the controllers' wish in one pass, and the time between passes.
const HAND_BACKS_MAX: usize = 96;
const HAND_BACK_INTERVAL: Duration = Duration::from_millis(300);
/// How long who has handed over does not campaign: its successor is at it.
const YIELD_TIME: Duration = Duration::from_secs(1);
const HAND_BACK_TIMEOUT: Duration = Duration::from_secs(5);
/// Voters of groups changed at the same time: a new replica copies its whole log.
const CHANGES_MAX: usize = 8;
const CHANGE_RETRY_DELAY: Duration = Duration::from_secs(2);

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
    pub nudges: mpsc::Receiver<RaftGroupId>,
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
    running: bool,
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
    let (events, mut task_events) = mpsc::unbounded_channel();
    let mut links = options.peers.links();
    let mut view = options.view.clone();
    let stop = options.stop.clone();
    let replicas = options.replicas.clone();
    let mut driver = Driver {
        options,
        groups: HashMap::new(),
        due: BinaryHeap::new(),
        links: LinkTable::default(),
        leaderless: 0,
        leaderless_soon: 0,
        fenced: BTreeSet::new(),
        unsettled: BTreeSet::new(),
        next_hand_back: None,
        events,
        campaigns: CampaignQueue::default(),
        summary: Summary::default(),
        changes: Arc::new(Semaphore::new(CHANGES_MAX)),
        tasks: TaskTracker::new(),
    };
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
            Some(group) = driver.options.nudges.recv() => driver.nudged(group),
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
    }
    for group in driver.groups.values() {
        group.stop_watching.cancel();
    }
    driver.tasks.close();
    driver.tasks.wait().await;
}

impl Driver {
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
                    running: false,
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
                    state.running = false;
                    state.attempts = state.attempts.saturating_add(1);
                    state.due = None;
                    self.evaluate(group);
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

    /// A leader whose group has other voters than its assignment wants changes them. While replicas
    /// are being moved, only once the image shows it as the leader: so an image that is older than
    /// what the leader before it has completed can never be acted on.
    fn check_voters(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        let leads = group.leadership.is_leader && group.leadership.ready;
        let is_known = group.moving.is_none_or(|moving| {
            moving.leader == Some(self.options.broker_id)
                && moving.leader_epoch == group.leadership.leader_epoch
        });
        if !leads || group.changing_voters.is_some() || !is_known {
            self.unsettled.remove(&id);
            return;
        }
        let wanted: BTreeSet<ReplicaId> = group.voters.iter().copied().collect();
        let Some(members) = Members::of(&group.replica) else {
            return;
        };
        if members.are(&wanted) {
            self.unsettled.remove(&id);
            if let Some(moving) = group.moving {
                let event = LedEvent::Settled(id, moving.partition_epoch);
                self.options.led.send(event).ok();
            }
            return;
        }
        self.unsettled.insert(id);
        let mut new = wanted.difference(&members.nodes);
        if new.any(|replica| !self.links.status(replica.broker_id).is_up()) {
            // It is looked at again when the links or the image change.
            return;
        }
        if !wanted.contains(&group.replica.replica_id()) {
            // It will hand over in the end, and must not take back what it gave.
            group.yields_until = Some(Instant::now() + CHANGE_RETRY_DELAY + YIELD_TIME);
        }
        let abandoned = group.stop_watching.child_token();
        group.changing_voters = Some(abandoned.clone());
        let (replica, events, changes) = (
            group.replica.clone(),
            self.events.clone(),
            self.changes.clone(),
        );
        let (voters, stop) = (group.voters.clone(), group.stop_watching.clone());
        let change = async move {
            if let Err(error) = settle_voters(&replica, &voters, &changes, &abandoned).await {
                info!(raft_group_id = id.0, %error, "the voters are not changed yet");
                let retry = tokio::time::sleep(CHANGE_RETRY_DELAY);
                tokio::select! {
                    () = retry => {}
                    () = abandoned.cancelled() => {}
                }
            }
            events.send(TaskEvent::VotersChanged(id)).ok();
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = change => {}
            }
        });
    }

    fn check_unsettled(&mut self) {
        for group in std::mem::take(&mut self.unsettled) {
            self.check_voters(group);
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

    fn links_changed(&mut self, table: LinkTable) {
        let before = std::mem::replace(&mut self.links, table);
        let mut came_up = Vec::new();
        for (broker, status) in &self.links.0 {
            let was = before.status(*broker);
            if was == *status {
                continue;
            }
            info!(peer = broker.0, state = ?status.state, "the link to a peer changed");
            if status.is_up() && (!was.is_up() || was.incarnation != status.incarnation) {
                came_up.push(*broker);
            }
        }
        for broker in came_up {
            self.greet(broker);
        }
        // The first of them to be looked at shall wait for their turn as the last.
        self.leaderless_soon = self.about_to_lose_leader();
        let groups: Vec<RaftGroupId> = self.groups.keys().copied().collect();
        for group in groups {
            self.evaluate(group);
        }
        self.leaderless_soon = 0;
        self.check_unsettled();
    }

    /// How many groups lose their leader with the links as they are now.
    fn about_to_lose_leader(&self) -> u32 {
        let loses = |group: &&Group| {
            let leader = group.leadership.leader;
            let is_gone = leader.is_some_and(|l| !self.links.status(l.broker_id).is_up());
            group.status == LeaderStatus::Live && is_gone
        };
        let count = self.groups.values().filter(loses).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// A peer can be reached again: it learns who leads, and what it missed is sent at once.
    fn greet(&self, broker: BrokerId) {
        let led: Vec<(Arc<Replica>, ReplicaId)> = self
            .groups
            .values()
            .filter(|group| group.leadership.is_leader)
            .filter_map(|group| {
                let there = group
                    .replicas
                    .iter()
                    .find(|replica| replica.broker_id == broker)?;
                Some((group.replica.clone(), *there))
            })
            .collect();
        if !led.is_empty() {
            self.tasks.spawn(async move {
                for (replica, follower) in led {
                    greet(&replica, follower).await;
                }
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
            let groups: Vec<RaftGroupId> = self.groups.keys().copied().collect();
            for group in groups {
                self.evaluate(group);
            }
        }
        self.check_unsettled();
        self.plan_hand_back(HAND_BACK_INTERVAL);
    }

    /// Another replica with a shorter log tries to take over and cannot win: go ahead of it.
    fn nudged(&mut self, group: RaftGroupId) {
        let now = Instant::now();
        if let Some(state) = self.groups.get_mut(&group)
            && !state.leadership.is_leader
            && !state.campaigning
            && !*self.options.draining.borrow()
        {
            state.leader_gone = true;
            state.campaigning = true;
            self.campaign(group, NUDGED_TIMEOUT, now);
        }
    }

    /// A client asks for a partition that has no leader here: it does not wait behind others.
    fn missed(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        if has_leader(group.status) || std::mem::replace(&mut group.missed, true) {
            return;
        }
        if group.campaigning {
            self.campaigns.push(id, true);
            self.start_campaigns();
        } else {
            group.due = None;
            self.evaluate(id);
        }
    }

    /// Looks at one group as it is now, and sets when it is to campaign.
    fn evaluate(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        let vote = held_vote(&group.replica);
        // Where nothing is moved, all of the assignment votes.
        let voters = match group.moving {
            Some(_) => electorate(group),
            None => group.replicas.clone(),
        };
        let view = GroupView {
            me: group.replica.replica_id(),
            replicas: &voters,
            leader: group.leadership.leader,
            is_leader: group.leadership.is_leader,
            term: vote.term,
            voted_for: vote.voted_for,
            attempts: group.attempts,
            is_damaged: group.replica.log().is_damaged(),
        };
        let heard = self.options.peers.heard().leader(id);
        let world = World {
            links: &self.links,
            fenced: &self.fenced,
            heard,
        };
        let status = leader_status(&view, &world);
        let mut timing = self.options.timing;
        if !group.missed {
            let extra = STAGGER_PER_GROUP
                .saturating_mul(self.leaderless.max(self.leaderless_soon))
                .min(STAGGER_EXTRA_MAX);
            timing.extra = extra;
        }
        let delay = campaign_delay(&view, &world, status, &timing);
        let before = std::mem::replace(&mut group.status, status);
        let changed = status != before;
        match (has_leader(before), has_leader(status)) {
            (true, false) => self.leaderless = self.leaderless.saturating_add(1),
            (false, true) => self.leaderless = self.leaderless.saturating_sub(1),
            _ => {}
        }
        if has_leader(status) {
            group.attempts = 0;
            group.leader_gone = false;
            group.missed = false;
        }
        let cut_off = status == LeaderStatus::Me && !reaches_majority(&view, &self.links);
        match group.step_down_at {
            None if cut_off => {
                let at = Instant::now() + self.options.step_down_after;
                group.step_down_at = Some(at);
                self.due.push(Reverse((at, id)));
            }
            Some(_) if !cut_off => group.step_down_at = None,
            _ => {}
        }
        group.leader_gone |= status.is_certainly_gone();
        let Some(delay) = delay.filter(|_| !group.campaigning && !*self.options.draining.borrow())
        else {
            group.due = None;
            return;
        };
        let yields = group
            .yields_until
            .map(|until| until.saturating_duration_since(Instant::now()));
        let delay = delay.max(yields.unwrap_or_default());
        // Jitter only where it matters: two replicas that failed against each other.
        let jitter = match group.attempts {
            0 => Duration::ZERO,
            _ => delay.mul_f64(rand::rng().random_range(0.0..0.5)),
        };
        let at = Instant::now() + delay + jitter;
        if !changed && group.due.is_some_and(|due| due <= at) {
            return;
        }
        group.due = Some(at);
        self.due.push(Reverse((at, id)));
    }

    fn timers(&mut self, now: Instant) {
        while let Some(Reverse((at, id))) = self.due.peek().copied()
            && at <= now
        {
            self.due.pop();
            let Some(group) = self.groups.get(&id) else {
                continue;
            };
            if group.step_down_at == Some(at) {
                self.step_down(id);
            } else if group.due == Some(at) {
                // It may have become unnecessary without an event, as when a leader spoke.
                let before = group.status;
                self.evaluate(id);
                if let Some(group) = self.groups.get_mut(&id)
                    && group.due == Some(at)
                    && group.status == before
                {
                    group.due = None;
                    group.campaigning = true;
                    let in_use = group.missed || group.replica.engine().idle_for() < IN_USE;
                    self.campaigns.push(id, in_use);
                }
            }
        }
        self.start_campaigns();
        if self.next_hand_back.is_some_and(|at| at <= now) {
            self.next_hand_back = None;
            self.hand_back(now);
        }
        self.summary.tell(now);
    }

    /// Starts as many campaigns as may run, each only if it is still needed.
    fn start_campaigns(&mut self) {
        while let Some(id) = self.campaigns.pop() {
            // It may have been asked for twice, and run already.
            let waits = |group: &Group| group.campaigning && !group.running;
            if !self.groups.get(&id).is_some_and(waits) {
                continue;
            }
            self.evaluate(id);
            let draining = *self.options.draining.borrow();
            let Some(group) = self.groups.get_mut(&id) else {
                continue;
            };
            if has_leader(group.status) || draining {
                group.campaigning = false;
                continue;
            }
            let limit = match held_vote(&group.replica).term {
                0 => NEW_TIMEOUT,
                _ => CAMPAIGN_TIMEOUT,
            };
            let limit = limit + TIMEOUT_PER_CAMPAIGN.saturating_mul(self.campaigns.running());
            // One that was too short, on a busy machine, is not too short for ever: the next attempt
            // takes a new term, and would undo what this one is about to win.
            let limit = limit
                .saturating_mul(1 << group.attempts.min(3))
                .min(CAMPAIGN_TIMEOUT_MAX);
            self.campaign(id, limit, Instant::now());
        }
    }

    /// Of a group that is marked as campaigning.
    fn campaign(&mut self, id: RaftGroupId, limit: Duration, now: Instant) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        group.running = true;
        group.due = None;
        self.campaigns.started();
        let (replica, by_force) = (group.replica.clone(), group.leader_gone);
        debug!(raft_group_id = id.0, status = ?group.status, by_force, "campaigns for a partition");
        self.options.metrics.campaigns.inc();
        let events = self.events.clone();
        let metrics = self.options.metrics.clone();
        self.tasks.spawn(async move {
            let mut leadership = replica.leadership();
            let known = *leadership.borrow_and_update();
            if by_force {
                take_over(&replica, limit.min(CAMPAIGN_TIMEOUT)).await;
            } else {
                // One that never voted can disturb nobody: there is no need to ask first.
                let ask_first = held_vote(&replica).term > 0;
                elect(&replica, ask_first).await;
            }
            let mut own_epoch = known.leader_epoch;
            let decided = leadership.wait_for(|current| {
                // After its own, any other term is one that a rival has taken: try again with the next.
                let is_lost = own_epoch > known.leader_epoch && current.leader_epoch > own_epoch;
                own_epoch = own_epoch.max(current.leader_epoch);
                is_lost || (current.leader.is_some() && current.leader_epoch > known.leader_epoch)
            });
            if let Ok(Ok(current)) = timeout(limit, decided).await
                && current.is_leader
            {
                metrics
                    .election_seconds
                    .observe(now.elapsed().as_secs_f64());
            }
            events.send(TaskEvent::Campaigned(id)).ok();
        });
    }

    /// A leader that no majority hears refuses what it cannot commit, and lets the others be.
    fn step_down(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        group.step_down_at = None;
        self.evaluate(id);
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        if group.step_down_at.take().is_none() {
            return;
        }
        self.summary.stepped_down();
        let replica = group.replica.clone();
        self.tasks.spawn(async move { replica.step_down().await });
    }

    fn plan_hand_back(&mut self, delay: Duration) {
        if self.next_hand_back.is_none() {
            self.next_hand_back = Some(Instant::now() + delay);
        }
    }

    /// Hands partitions over to the leaders that the controllers ask for, some at a time. Nobody
    /// here decides by himself that another broker should lead.
    fn hand_back(&mut self, now: Instant) {
        if *self.options.draining.borrow() {
            return;
        }
        let image = self.options.view.borrow().image.clone();
        let mut count = 0usize;
        for partition in image.topics.values().flat_map(|topic| &topic.partitions) {
            let Some(wanted) = partition.wanted_leader else {
                continue;
            };
            let id = partition.raft_group_id;
            let Some(group) = self.groups.get_mut(&id) else {
                continue;
            };
            let leads = group.leadership.is_leader && group.leadership.ready;
            let members = Members::of(&group.replica);
            let voters = members.map(|members| members.all_voters());
            let successor = voters
                .unwrap_or_default()
                .into_iter()
                .find(|id| id.broker_id == wanted);
            let Some(successor) = successor.filter(|_| leads) else {
                continue;
            };
            let me = group.replica.replica_id();
            if group.handing_back || group.changing_voters.is_some() || successor == me {
                continue;
            }
            let is_up = self.links.status(wanted).is_up() && !self.fenced.contains(&wanted);
            let is_sound = !group.replica.is_rebuilding(wanted);
            let is_ready = is_up && is_sound && is_caught_up(&group.replica, successor);
            if count == HAND_BACKS_MAX || !is_ready {
                self.next_hand_back = Some(now + HAND_BACK_INTERVAL);
                continue;
            }
            count = count.saturating_add(1);
            group.handing_back = true;
            group.yields_until = Some(now + YIELD_TIME);
            let (replica, events) = (group.replica.clone(), self.events.clone());
            info!(
                raft_group_id = id.0,
                to = wanted.0,
                "hands a partition over as the controllers ask"
            );
            self.tasks.spawn(async move {
                hand_over_to(&replica, &[successor], HAND_BACK_TIMEOUT).await;
                events.send(TaskEvent::HandedBack(id)).ok();
            });
        }
    }
}

fn has_leader(status: LeaderStatus) -> bool {
    matches!(status, LeaderStatus::Me | LeaderStatus::Live)
}

/// Counts what happens to partitions, and tells it in one line.
#[derive(Default)]
struct Summary {
    gained: u64,
    lost: u64,
    stepped_down: u64,
    at: Option<Instant>,
}

impl Summary {
    fn gained(&mut self) {
        self.gained = self.gained.saturating_add(1);
        self.plan();
    }

    fn lost(&mut self) {
        self.lost = self.lost.saturating_add(1);
        self.plan();
    }

    fn stepped_down(&mut self) {
        self.stepped_down = self.stepped_down.saturating_add(1);
        self.plan();
    }

    fn plan(&mut self) {
        self.at
            .get_or_insert_with(|| Instant::now() + SUMMARY_INTERVAL);
    }

    fn tell(&mut self, now: Instant) {
        if self.at.is_none_or(|at| at > now) {
            return;
        }
        let Summary {
            gained,
            lost,
            stepped_down,
            ..
        } = std::mem::take(self);
        if stepped_down > 0 {
            warn!(
                partitions = stepped_down,
                "reaches no majority of the replicas of some partitions: leads them no more"
            );
        }
        info!(gained, lost, "the partitions led here changed");
    }
}

/// Who votes in the group's elections, as far as this replica knows, preferred leader first. A new
/// replica knows nothing yet, and goes by its assignment.
fn electorate(group: &Group) -> Vec<ReplicaId> {
    let members = Members::of(&group.replica);
    let voting = members
        .map(|members| members.all_voters())
        .unwrap_or_default();
    if voting.is_empty() {
        return group.replicas.clone();
    }
    let assigned = group.replicas.iter().copied();
    let mut voters: Vec<ReplicaId> = assigned.filter(|id| voting.contains(id)).collect();
    let others = voting.iter().copied();
    voters.extend(others.filter(|id| !group.replicas.contains(id)));
    voters
}

/// Makes the voters what they should be; a leader that shall not vote any more hands over.
async fn settle_voters(
    replica: &Replica,
    voters: &[ReplicaId],
    changes: &Semaphore,
    abandoned: &CancellationToken,
) -> Result<(), MembershipError> {
    let permit = tokio::select! {
        permit = changes.acquire() => permit,
        () = abandoned.cancelled() => return Err(MembershipError::Abandoned),
    };
    // The semaphore is never closed.
    let _permit = permit.ok();
    let group_id = replica.group_id().0;
    info!(raft_group_id = group_id, wanted = ?voters, "changes the voters of a partition");
    let wanted: BTreeSet<ReplicaId> = voters.iter().copied().collect();
    change_voters(replica, &wanted, abandoned).await?;
    if !wanted.contains(&replica.replica_id()) && !abandoned.is_cancelled() {
        info!(
            raft_group_id = group_id,
            "hands a partition over to those that stay"
        );
        hand_over_to(replica, voters, HAND_BACK_TIMEOUT).await;
    }
    Ok(())
}
