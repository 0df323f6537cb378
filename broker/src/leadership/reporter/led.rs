//! The partitions led here, and which of them need a look.
//!
//! Invariant: a partition is looked at when something that concerns it has changed (its leadership, its
//! place in the image, a link, the end of its log), and again with each scan until it is settled. One at
//! rest is not looked at.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_types::cluster_image::{ClusterImage, Partition};
use chronik_types::epoch::PartitionEpoch;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::report::{differs, move_progress, report};
use crate::leadership::driver::LedEvent;
use crate::leadership::progress::Reach;
use crate::leadership::{FollowerState, Followers, Place};
use crate::peers::membership::Members;
use crate::peers::{LinkState, LinkTable};
use crate::replica::{Leadership, Replica};

/// The same report is sent again after this, doubled each time.
const RESEND_MIN: Duration = Duration::from_millis(300);
const RESEND_MAX: Duration = Duration::from_secs(10);

struct Led {
    replica: Arc<Replica>,
    leadership: Leadership,
    place: Place,
    /// Made when the partition is found in the image.
    followers: Option<(Vec<ReplicaId>, Followers)>,
    states: BTreeMap<BrokerId, FollowerState>,
    /// The voters are those that this epoch of the partition wants.
    settled_at: Option<PartitionEpoch>,
    /// When a report is due; None: the image says what is so.
    due_at: Option<Instant>,
    sent: Option<Sent>,
}

struct Sent {
    report: v1::PartitionReport,
    wait: Duration,
}

/// All of a broker.
pub struct LedTable {
    broker_id: BrokerId,
    lag_max: Duration,
    growth: mpsc::UnboundedSender<RaftGroupId>,
    image: Arc<ClusterImage>,
    fenced: BTreeSet<BrokerId>,
    links: LinkTable,
    led: HashMap<RaftGroupId, Led>,
    /// Something has changed since they were looked at.
    stale: HashSet<RaftGroupId>,
    /// They change with time, or by entries that are on their way.
    unsettled: HashSet<RaftGroupId>,
    /// Partitions whose replicas are being moved.
    moving: BTreeSet<RaftGroupId>,
    /// Reports to be sent, by when.
    due: BTreeSet<(Instant, RaftGroupId)>,
}

impl LedTable {
    /// `growth` is told of groups whose log grows after it was settled: to be given to `grew`.
    pub fn new(
        broker_id: BrokerId,
        lag_max: Duration,
        growth: mpsc::UnboundedSender<RaftGroupId>,
    ) -> LedTable {
        LedTable {
            broker_id,
            lag_max,
            growth,
            image: Arc::default(),
            fenced: BTreeSet::new(),
            links: LinkTable::default(),
            led: HashMap::new(),
            stale: HashSet::new(),
            unsettled: HashSet::new(),
            moving: BTreeSet::new(),
            due: BTreeSet::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.led.len()
    }

    pub fn is_stale(&self) -> bool {
        !self.stale.is_empty()
    }

    pub fn is_settled(&self) -> bool {
        self.unsettled.is_empty() && self.moving.is_empty()
    }

    pub fn is_moving(&self) -> bool {
        !self.moving.is_empty()
    }

    /// When the next report is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    pub fn take_event(&mut self, event: LedEvent) {
        match event {
            LedEvent::Follows(group) => self.remove(group),
            LedEvent::Settled(group, epoch) => {
                if let Some(led) = self.led.get_mut(&group) {
                    led.settled_at = Some(epoch);
                    self.stale.insert(group);
                }
            }
            LedEvent::Leads(group, place, replica, leadership) => {
                let before = self.led.get(&group).map(|led| led.leadership.leader_epoch);
                if before == Some(leadership.leader_epoch) {
                    return;
                }
                self.remove(group);
                let led = Led {
                    replica,
                    leadership,
                    place,
                    followers: None,
                    states: BTreeMap::new(),
                    settled_at: None,
                    due_at: None,
                    sent: None,
                };
                self.led.insert(group, led);
                self.stale.insert(group);
            }
        }
    }

    fn remove(&mut self, group: RaftGroupId) {
        let Some(led) = self.led.remove(&group) else {
            return;
        };
        self.stale.remove(&group);
        self.unsettled.remove(&group);
        self.moving.remove(&group);
        if let Some(at) = led.due_at {
            self.due.remove(&(at, group));
        }
    }

    pub fn links_changed(&mut self, links: LinkTable) {
        self.links = links;
        self.stale.extend(self.led.keys());
    }

    pub fn image_changed(&mut self, image: Arc<ClusterImage>) {
        let brokers = image.brokers.values();
        let fenced = brokers.filter(|b| b.fenced).map(|b| b.broker_id).collect();
        if fenced != self.fenced {
            self.fenced = fenced;
            self.stale.extend(self.led.keys());
        }
        let before = std::mem::replace(&mut self.image, image);
        for (id, topic) in &self.image.topics {
            let old = before.topics.get(id);
            if old.is_some_and(|old| Arc::ptr_eq(old, topic)) {
                continue;
            }
            for (place, partition) in topic.partitions.iter().enumerate() {
                let group = partition.raft_group_id;
                let same = old.and_then(|old| old.partitions.get(place)) == Some(partition);
                if !same && self.led.contains_key(&group) {
                    self.stale.insert(group);
                }
            }
        }
    }

    /// The group's log has grown since it was settled.
    pub fn grew(&mut self, group: RaftGroupId) {
        if self.led.contains_key(&group) {
            self.unsettled.insert(group);
        }
    }

    /// Looks at what has changed.
    pub fn look(&mut self, now: Instant) {
        for group in std::mem::take(&mut self.stale) {
            self.observe(group, now);
        }
    }

    /// Looks at what is not settled.
    pub fn scan(&mut self, now: Instant) {
        for group in std::mem::take(&mut self.unsettled) {
            self.observe(group, now);
        }
    }

    /// Looks at one partition as it is now.
    fn observe(&mut self, group: RaftGroupId, now: Instant) {
        let Some(led) = self.led.get_mut(&group) else {
            return;
        };
        // In this order: what the log gets later is told, and what it has got already shows in its end, which
        // Raft may publish a moment later.
        led.replica.watch_growth(&self.growth);
        let end = led.replica.log().last_entry_id().map(|(index, _)| index);
        let partition = led.place.find(&self.image, group);
        let (Some(partition), Some(progress)) = (partition, led.replica.progress()) else {
            self.unsettled.insert(group);
            return;
        };
        let assigned = led.followers.as_ref().map(|(replicas, _)| replicas);
        if assigned != Some(&partition.replicas) {
            let me = led.replica.replica_id();
            let others = partition.replicas.iter().copied();
            let others: Vec<ReplicaId> = others.filter(|replica| *replica != me).collect();
            let followers = Followers::new(&others, &partition.isr, self.lag_max, now);
            led.followers = Some((partition.replicas.clone(), followers));
        }
        let Some((_, followers)) = &mut led.followers else {
            return;
        };
        let mut states = followers.observe(&progress, |broker| reach(&self.links, broker), now);
        let is_settled = followers.is_settled() && progress.last_index == end;
        let voters = Members::of(&led.replica).map(|members| members.all_voters());
        let voters = voters.unwrap_or_default();
        // One that only learns is not in sync yet.
        let mut all_vote = true;
        for replica in partition.replicas.iter().filter(|id| !voters.contains(id)) {
            all_vote = false;
            let state = states.entry(replica.broker_id);
            state.and_modify(|state| *state = (*state).max(FollowerState::Lagging));
        }
        states.insert(self.broker_id, FollowerState::CaughtUp);
        led.states = states;
        if !is_settled || !all_vote {
            self.unsettled.insert(group);
        } else {
            self.unsettled.remove(&group);
        }
        match partition.active_reassignment() {
            Some(_) => self.moving.insert(group),
            None => self.moving.remove(&group),
        };
        let due_at = due_at(partition, led, self.broker_id, &self.fenced, now);
        let before = std::mem::replace(&mut led.due_at, due_at);
        if due_at != before {
            if let Some(at) = before {
                self.due.remove(&(at, group));
            }
            if let Some(at) = due_at {
                self.due.insert((at, group));
            }
        }
    }

    /// Up to `count` reports that are to be sent now. What differs still when they were decided is sent
    /// again, after a while.
    pub fn take_due(&mut self, now: Instant, count: usize) -> Vec<v1::PartitionReport> {
        let mut reports = Vec::new();
        while let Some((at, group)) = self.due.first().copied()
            && at <= now
            && reports.len() < count
        {
            self.due.pop_first();
            let Some(led) = self.led.get_mut(&group) else {
                continue;
            };
            led.due_at = None;
            let Some(partition) = led.place.find(&self.image, group) else {
                continue;
            };
            let report = whole_report(partition, led, &self.fenced);
            let again = led.sent.take().filter(|sent| sent.report == report);
            let wait = again.map_or(RESEND_MIN, |sent| (sent.wait * 2).min(RESEND_MAX));
            led.due_at = Some(now + wait);
            self.due.insert((now + wait, group));
            let sent = report.clone();
            led.sent = Some(Sent { report: sent, wait });
            reports.push(report);
        }
        reports
    }

    /// How far the replicas are that are being filled, of all partitions that are being moved.
    pub fn move_progress(&self) -> Vec<v1::MoveProgress> {
        let of = |group: &RaftGroupId| {
            let led = self.led.get(group)?;
            let partition = led.place.find(&self.image, *group)?;
            let progress = led.replica.progress()?;
            Some(move_progress(partition, led.leadership, &progress))
        };
        self.moving.iter().filter_map(of).collect()
    }
}

fn reach(links: &LinkTable, broker: BrokerId) -> Reach {
    match links.status(broker).state {
        LinkState::Refused => Reach::Dead,
        LinkState::Unreachable => Reach::Unreachable,
        LinkState::Connecting | LinkState::Up | LinkState::OneWay | LinkState::Silent => {
            Reach::Reachable
        }
    }
}

/// When the partition's report is due, if anything is to be told.
fn due_at(
    partition: &Partition,
    led: &mut Led,
    broker_id: BrokerId,
    fenced: &BTreeSet<BrokerId>,
    now: Instant,
) -> Option<Instant> {
    let differs = differs(partition, broker_id, led.leadership, &led.states, fenced);
    if !differs && !completes_move(partition, led, fenced) {
        led.sent = None;
        return None;
    }
    let report = whole_report(partition, led, fenced);
    let is_same = led.sent.as_ref().is_some_and(|sent| sent.report == report);
    match led.due_at {
        Some(at) if is_same => Some(at),
        _ => Some(now),
    }
}

/// Whether the move of the partition's replicas is done: exactly the target votes, in this very
/// epoch of the partition, and is in sync as far as it is alive.
fn completes_move(partition: &Partition, led: &Led, fenced: &BTreeSet<BrokerId>) -> bool {
    let is_in_sync = |broker: BrokerId| {
        fenced.contains(&broker) || led.states.get(&broker) == Some(&FollowerState::CaughtUp)
    };
    partition.active_reassignment().is_some()
        && led.settled_at == Some(partition.partition_epoch)
        && partition
            .target_replicas()
            .iter()
            .all(|replica| is_in_sync(replica.broker_id))
}

fn whole_report(
    partition: &Partition,
    led: &Led,
    fenced: &BTreeSet<BrokerId>,
) -> v1::PartitionReport {
    let mut report = report(partition, led.leadership, &led.states);
    if completes_move(partition, led, fenced) {
        let voters = partition.target_replicas();
        report.voters = voters.into_iter().map(Into::into).collect();
    }
    report
}
