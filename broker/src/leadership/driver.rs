//! Carries out what `leadership` decides: one task for all groups of the broker, which sleeps while
//! nothing changes.
//!
//! Invariant: level-triggered. Whatever event comes, the group is looked at as it is now; an event
//! that is late or doubled does no harm.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use rand::Rng;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::campaigns::CampaignQueue;
use super::hand_back::{
    HAND_BACK_INTERVAL, HAND_BACK_TIMEOUT, HAND_BACKS_MAX, HandBack, HandBackView,
};
use super::hand_over::hand_back;
use super::{Assigned, CampaignTiming, GroupEvent, GroupView, LeaderStatus, Place, World};
use super::{campaign_delay, leader_status, reaches_majority};
use crate::controller_client::ClusterView;
use crate::metrics::BrokerMetrics;
use crate::peers::campaign::{elect, greet, held_vote, take_over};
use crate::peers::membership::{change_voters, has_voters};
use crate::peers::{LinkTable, Peers};
use crate::replica::{Leadership, Replica};
use crate::replicas::Replicas;

/// How long one campaign is waited for before the next attempt is considered.
const CAMPAIGN_TIMEOUT: Duration = Duration::from_millis(150);
/// Same, for a new group: the others may not have opened their replicas yet.
const NEW_TIMEOUT: Duration = Duration::from_millis(40);
/// Same, where a shorter log was in the way: the first attempt often meets a term that is taken.
const NUDGED_TIMEOUT: Duration = Duration::from_millis(20);
/// The second candidate of each partition waits longer the more partitions have no leader, since the
/// first one has as many campaigns to run. One that cannot win says so, and is not waited for.
const STAGGER_PER_GROUP: Duration = Duration::from_millis(1);
const STAGGER_EXTRA_MAX: Duration = Duration::from_secs(10);
/// A partition that was used so recently counts as in use.
const IN_USE: Duration = Duration::from_secs(10);
/// What happened to many partitions is told in one line per interval.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(1);
/// Voters of groups changed at the same time: a new replica copies its whole log.
const CHANGES_MAX: usize = 4;
const CHANGE_RETRY_DELAY: Duration = Duration::from_secs(2);

/// What the driver works with.
pub struct DriverOptions {
    pub broker_id: BrokerId,
    pub timing: CampaignTiming,
    /// None: leadership stays where it is.
    pub preferred_leader_delay: Option<Duration>,
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
}

struct Group {
    replica: Arc<Replica>,
    place: Place,
    replicas: Vec<ReplicaId>,
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
    changing_voters: bool,
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
    up_since: HashMap<BrokerId, Instant>,
    /// Groups of which no living leader is known.
    leaderless: u32,
    fenced: BTreeSet<BrokerId>,
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
        up_since: HashMap::new(),
        leaderless: 0,
        fenced: BTreeSet::new(),
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
                } = assigned;
                let stop_watching = self.options.stop.child_token();
                self.watch_leadership(group, &replica, stop_watching.clone());
                let state = Group {
                    leadership: *replica.leadership().borrow(),
                    replica,
                    place,
                    replicas,
                    status: LeaderStatus::None,
                    attempts: 0,
                    leader_gone: false,
                    due: None,
                    step_down_at: None,
                    missed: false,
                    campaigning: false,
                    running: false,
                    handing_back: false,
                    changing_voters: false,
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
                    self.check_voters(group);
                    self.evaluate(group);
                    self.plan_hand_back(HAND_BACK_INTERVAL);
                }
            }
            GroupEvent::Closed(group) => {
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
                    state.changing_voters = false;
                    self.check_voters(group);
                }
            }
        }
    }

    /// A leader whose group has other voters than its assignment changes them.
    fn check_voters(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        let wanted: BTreeSet<ReplicaId> = group.replicas.iter().copied().collect();
        if !group.leadership.is_leader
            || group.changing_voters
            || !wanted.contains(&group.replica.replica_id())
            || has_voters(&group.replica, &wanted)
        {
            return;
        }
        group.changing_voters = true;
        let (replica, events, changes) = (
            group.replica.clone(),
            self.events.clone(),
            self.changes.clone(),
        );
        let stop = group.stop_watching.clone();
        let change = async move {
            let _permit = changes.acquire_owned().await;
            info!(raft_group_id = id.0, "changes the voters of a partition");
            if let Err(error) = change_voters(&replica, &wanted).await {
                warn!(raft_group_id = id.0, %error, "the voters are not changed yet");
                tokio::time::sleep(CHANGE_RETRY_DELAY).await;
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
            self.plan_hand_back(self.options.preferred_leader_delay.unwrap_or_default());
            self.check_voters(group);
        }
        self.evaluate(group);
    }

    fn links_changed(&mut self, table: LinkTable) {
        let before = std::mem::replace(&mut self.links, table);
        let now = Instant::now();
        let mut came_up = Vec::new();
        for (broker, status) in &self.links.0 {
            let was = before.status(*broker);
            if was == *status {
                continue;
            }
            info!(peer = broker.0, state = ?status.state, "the link to a peer changed");
            if status.is_up() && (!was.is_up() || was.incarnation != status.incarnation) {
                self.up_since.insert(*broker, now);
                came_up.push(*broker);
            }
            if !status.is_up() {
                self.up_since.remove(broker);
            }
        }
        for broker in came_up {
            self.greet(broker);
        }
        let groups: Vec<RaftGroupId> = self.groups.keys().copied().collect();
        for group in groups {
            self.evaluate(group);
        }
        self.plan_hand_back(self.options.preferred_leader_delay.unwrap_or_default());
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
        let view = GroupView {
            me: group.replica.replica_id(),
            replicas: &group.replicas,
            leader: group.leadership.leader,
            is_leader: group.leadership.is_leader,
            term: vote.term,
            voted_for: vote.voted_for,
            attempts: group.attempts,
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
                .saturating_mul(self.leaderless)
                .min(STAGGER_EXTRA_MAX);
            timing.stagger = timing.stagger.saturating_add(extra);
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
        if group.due.is_some() && !changed {
            return;
        }
        // Jitter only where it matters: two replicas that failed against each other.
        let jitter = match group.attempts {
            0 => Duration::ZERO,
            _ => delay.mul_f64(rand::rng().random_range(0.0..0.5)),
        };
        let at = Instant::now() + delay + jitter;
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
                take_over(&replica, limit).await;
            } else {
                elect(&replica).await;
            }
            let decided = leadership.wait_for(|current| {
                current.leader.is_some() && current.leader_epoch > known.leader_epoch
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
        if self.options.preferred_leader_delay.is_some() && self.next_hand_back.is_none() {
            self.next_hand_back = Some(Instant::now() + delay);
        }
    }

    /// Gives partitions back to their preferred leaders, some at a time.
    fn hand_back(&mut self, now: Instant) {
        let Some(delay) = self.options.preferred_leader_delay else {
            return;
        };
        if *self.options.draining.borrow() {
            return;
        }
        let image = self.options.view.borrow().image.clone();
        let view = HandBackView {
            up_since: &self.up_since,
            fenced: &self.fenced,
            delay,
            now,
        };
        let mut count = 0usize;
        let mut later: Option<Instant> = None;
        let mut again_at = |at: Instant| later = Some(later.map_or(at, |later| later.min(at)));
        for (id, group) in &mut self.groups {
            let Some(preferred) = group.replicas.first().copied() else {
                continue;
            };
            let leads = group.leadership.is_leader && group.leadership.ready;
            if !leads || group.handing_back || preferred == group.replica.replica_id() {
                continue;
            }
            match view.decide(&group.replica, preferred, group.place.find(&image, *id)) {
                HandBack::No => continue,
                HandBack::Later(at) => {
                    again_at(at);
                    continue;
                }
                HandBack::Now if count == HAND_BACKS_MAX => {
                    again_at(now + HAND_BACK_INTERVAL);
                    break;
                }
                HandBack::Now => {}
            }
            let broker = preferred.broker_id;
            count = count.saturating_add(1);
            group.handing_back = true;
            let (replica, events, id) = (group.replica.clone(), self.events.clone(), *id);
            debug!(
                raft_group_id = id.0,
                to = broker.0,
                "gives a partition back"
            );
            self.tasks.spawn(async move {
                hand_back(&replica, preferred, HAND_BACK_TIMEOUT).await;
                events.send(TaskEvent::HandedBack(id)).ok();
            });
        }
        self.next_hand_back = later;
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
