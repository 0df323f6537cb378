//! Tells the controllers who leads and how the followers are, until the image says the same.
//!
//! Invariant: level-triggered: a report is sent while image and reality differ, never because of
//! how they came to differ; so a lost answer or a refused compare-and-set needs no special care. A
//! resting partition costs one comparison per scan and no message.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_types::cluster_image::{ClusterImage, Partition};
use chronik_types::epoch::PartitionEpoch;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Place;
use super::driver::LedEvent;
use super::progress::{FollowerState, Followers, Reach};
use crate::controller_client::{ClusterView, ControllerClient, ReportError};
use crate::metrics::BrokerMetrics;
use crate::peers::membership::Members;
use crate::peers::{LinkState, LinkTable};
use crate::replica::{Leadership, Replica};

/// How often the progress of followers that are not settled is looked at.
const SCAN_INTERVAL: Duration = Duration::from_millis(250);
/// After a look at all partitions nothing is looked at for so many times as long as it took, but no longer
/// than a scan may be away: changes come one by one when thousands of partitions are made.
const PAUSE_FACTOR: u32 = 4;
/// How often the progress of moves is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Reports in one call.
const REPORTS_MAX: usize = 1_000;
/// The same report is sent again after this, doubled each time.
const RESEND_MIN: Duration = Duration::from_millis(300);
const RESEND_MAX: Duration = Duration::from_secs(10);

/// What the reporter works with.
pub struct ReporterOptions {
    pub broker_id: BrokerId,
    pub lag_max: Duration,
    pub client: ControllerClient,
    pub view: watch::Receiver<ClusterView>,
    pub links: watch::Receiver<LinkTable>,
    pub led: mpsc::UnboundedReceiver<LedEvent>,
    pub metrics: BrokerMetrics,
    pub stop: CancellationToken,
}

struct Led {
    replica: Arc<Replica>,
    leadership: Leadership,
    place: Place,
    /// Made when the partition is found in the image.
    followers: Option<(Vec<ReplicaId>, Followers)>,
    states: BTreeMap<BrokerId, FollowerState>,
    /// Every replica of the assignment votes; one that only learns is not in sync yet.
    all_vote: bool,
    /// The voters are those that this epoch of the partition wants.
    settled_at: Option<PartitionEpoch>,
    sent: Option<Sent>,
}

struct Sent {
    report: v1::PartitionReport,
    again_at: Instant,
    wait: Duration,
}

type Sending = BoxFuture<'static, Result<Vec<v1::PartitionReportResult>, ReportError>>;

/// Runs until the token is cancelled.
pub async fn run(mut options: ReporterOptions) {
    let stop = options.stop.clone();
    let mut led: HashMap<RaftGroupId, Led> = HashMap::new();
    let mut sending: Option<Sending> = None;
    let mut scan_at: Option<Instant> = None;
    // Something has changed since all partitions were looked at.
    let mut is_stale = false;
    let mut look_at = Instant::now();
    let mut send_at: Option<Instant> = None;
    let mut progress_at = Instant::now();
    let mut moving: BTreeSet<RaftGroupId> = BTreeSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            result = async { sending.as_mut().expect("guarded below").await },
                if sending.is_some() =>
            {
                sending = None;
                if let Err(error) = result {
                    debug!(%error, "a report was not decided");
                    send_at = Some(Instant::now() + RESEND_MIN);
                    continue;
                }
            }
            Some(event) = options.led.recv() => {
                take_event(&mut led, event);
                while let Ok(event) = options.led.try_recv() {
                    take_event(&mut led, event);
                }
                is_stale = true;
            }
            changed = options.links.changed() => {
                if changed.is_err() {
                    return;
                }
                is_stale = true;
            }
            changed = options.view.changed() => {
                if changed.is_err() {
                    return;
                }
                is_stale = true;
            }
            () = sleep_until(look_at), if is_stale => {}
            () = sleep_until(scan_at.unwrap_or_else(Instant::now)), if scan_at.is_some() => {
                scan_at = None;
                let tells_progress = !moving.is_empty() && Instant::now() >= progress_at;
                if !observe(&mut led, &options, false) && send_at.is_none() && !tells_progress {
                    scan_at = Some(Instant::now() + SCAN_INTERVAL);
                    continue;
                }
            }
            () = sleep_until(send_at.unwrap_or_else(Instant::now)),
                if send_at.is_some() && sending.is_none() => send_at = None,
        }
        if is_stale {
            let began = Instant::now();
            if began < look_at {
                continue;
            }
            is_stale = false;
            observe(&mut led, &options, true);
            moving = moving_groups(&led, &options.view.borrow().image);
            let pause = began.elapsed().saturating_mul(PAUSE_FACTOR);
            look_at = Instant::now() + pause.min(SCAN_INTERVAL);
        }
        if sending.is_none() {
            let now = Instant::now();
            let (reports, next) = due_reports(&mut led, &options, now);
            let mut progress = Vec::new();
            if !moving.is_empty() && now >= progress_at {
                progress_at = now + PROGRESS_INTERVAL;
                let image = options.view.borrow().image.clone();
                progress = move_progress(&led, &image, &moving);
            }
            if reports.is_empty() && progress.is_empty() {
                send_at = next;
            } else {
                options.metrics.reports.inc_by(reports.len() as u64);
                let client = options.client.clone();
                sending = Some(Box::pin(
                    async move { client.report(reports, progress).await },
                ));
            }
        }
        if scan_at.is_none() && !led.is_empty() {
            scan_at = Some(Instant::now() + SCAN_INTERVAL);
        }
        options
            .metrics
            .partitions_led
            .set(i64::try_from(led.len()).unwrap_or(i64::MAX));
    }
}

fn take_event(led: &mut HashMap<RaftGroupId, Led>, event: LedEvent) {
    match event {
        LedEvent::Follows(group) => {
            led.remove(&group);
        }
        LedEvent::Settled(group, epoch) => {
            if let Some(led) = led.get_mut(&group) {
                led.settled_at = Some(epoch);
            }
        }
        LedEvent::Leads(group, place, replica, leadership) => {
            let same = led
                .get(&group)
                .is_some_and(|led| led.leadership.leader_epoch == leadership.leader_epoch);
            if !same {
                let states = BTreeMap::new();
                let new = Led {
                    replica,
                    leadership,
                    place,
                    followers: None,
                    states,
                    all_vote: false,
                    settled_at: None,
                    sent: None,
                };
                led.insert(group, new);
            }
        }
    }
}

/// Looks at every partition led here, or only at those that are not settled. True: a follower's
/// state has changed.
fn observe(led: &mut HashMap<RaftGroupId, Led>, options: &ReporterOptions, all: bool) -> bool {
    let image = options.view.borrow().image.clone();
    let links = options.links.borrow().clone();
    let reach = |broker: BrokerId| match links.status(broker).state {
        LinkState::Refused => Reach::Dead,
        LinkState::Unreachable => Reach::Unreachable,
        LinkState::Connecting | LinkState::Up | LinkState::OneWay | LinkState::Silent => {
            Reach::Reachable
        }
    };
    let now = Instant::now();
    let mut changed = false;
    for (group, led) in led {
        let log_end = led.replica.log().last_entry_id().map(|(index, _)| index);
        if let Some((_, followers)) = &led.followers
            && !all
            && led.all_vote
            && followers.is_settled(log_end)
        {
            continue;
        }
        let Some(progress) = led.replica.progress() else {
            continue;
        };
        let Some(partition) = led.place.find(&image, *group) else {
            continue;
        };
        let assigned = led.followers.as_ref().map(|(replicas, _)| replicas);
        if assigned != Some(&partition.replicas) {
            let me = led.replica.replica_id();
            let others: Vec<ReplicaId> = partition
                .replicas
                .iter()
                .copied()
                .filter(|replica| *replica != me)
                .collect();
            let followers = Followers::new(&others, &partition.isr, options.lag_max, now);
            led.followers = Some((partition.replicas.clone(), followers));
        }
        if let Some((_, followers)) = &mut led.followers {
            let mut states = followers.observe(&progress, reach, now);
            let members = Members::of(&led.replica);
            let voters = members
                .map(|members| members.all_voters())
                .unwrap_or_default();
            led.all_vote = true;
            for replica in partition.replicas.iter().filter(|id| !voters.contains(id)) {
                led.all_vote = false;
                let state = states.entry(replica.broker_id);
                state.and_modify(|state| *state = (*state).max(FollowerState::Lagging));
            }
            states.insert(options.broker_id, FollowerState::CaughtUp);
            if states != led.states {
                led.states = states;
                changed = true;
            }
        }
    }
    changed
}

/// Reports that are to be sent now, and when the next one is if there are none.
fn due_reports(
    led: &mut HashMap<RaftGroupId, Led>,
    options: &ReporterOptions,
    now: Instant,
) -> (Vec<v1::PartitionReport>, Option<Instant>) {
    let image = options.view.borrow().image.clone();
    let fenced: BTreeSet<BrokerId> = image
        .brokers
        .values()
        .filter(|b| b.fenced)
        .map(|b| b.broker_id)
        .collect();
    let mut reports = Vec::new();
    let mut next: Option<Instant> = None;
    for (group, led) in led {
        let Some(partition) = led.place.find(&image, *group) else {
            continue;
        };
        let is_complete = completes_move(partition, led, &fenced);
        let differs = differs(
            partition,
            options.broker_id,
            led.leadership,
            &led.states,
            &fenced,
        );
        if !differs && !is_complete {
            led.sent = None;
            continue;
        }
        let mut report = report(partition, led.leadership, &led.states);
        if is_complete {
            let voters = partition.target_replicas();
            report.voters = voters.into_iter().map(Into::into).collect();
        }
        let mut wait = RESEND_MIN;
        if let Some(sent) = &led.sent
            && sent.report == report
        {
            if now < sent.again_at {
                next = Some(next.map_or(sent.again_at, |at| at.min(sent.again_at)));
                continue;
            }
            wait = (sent.wait * 2).min(RESEND_MAX);
        }
        if reports.len() == REPORTS_MAX {
            next = Some(now);
            break;
        }
        led.sent = Some(Sent {
            report: report.clone(),
            again_at: now + wait,
            wait,
        });
        reports.push(report);
    }
    (reports, next)
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

/// How far the replicas are that are being filled, of all partitions that are being moved.
fn move_progress(
    led: &HashMap<RaftGroupId, Led>,
    image: &ClusterImage,
    moving: &BTreeSet<RaftGroupId>,
) -> Vec<v1::MoveProgress> {
    let mut all = Vec::with_capacity(moving.len());
    for group in moving {
        let Some(led) = led.get(group) else {
            continue;
        };
        let partition = led.place.find(image, *group);
        let (Some(partition), Some(progress)) = (partition, led.replica.progress()) else {
            continue;
        };
        let entries = |index: Option<u64>| index.map_or(0, |index| index.saturating_add(1));
        let log_entries = entries(progress.last_index);
        let replicas = partition.adding().into_iter().map(|broker| {
            let mut followers = progress.followers.iter();
            let known = followers.find(|follower| follower.replica.broker_id == broker);
            let matched = known.filter(|follower| follower.matched.is_some());
            v1::move_progress::Replica {
                broker_id: broker.0,
                lag_entries: matched.map(|f| log_entries.saturating_sub(entries(f.matched))),
            }
        });
        all.push(v1::MoveProgress {
            raft_group_id: group.0,
            leader_epoch: led.leadership.leader_epoch.0,
            log_entries,
            replicas: replicas.collect(),
        });
    }
    all
}

/// Groups led here whose replicas are being moved.
fn moving_groups(led: &HashMap<RaftGroupId, Led>, image: &ClusterImage) -> BTreeSet<RaftGroupId> {
    let is_moving = |(group, led): &(&RaftGroupId, &Led)| {
        let partition = led.place.find(image, **group);
        partition.is_some_and(|partition| partition.active_reassignment().is_some())
    };
    led.iter()
        .filter(is_moving)
        .map(|(group, _)| *group)
        .collect()
}

/// Whether the image says something else than what this leader knows.
fn differs(
    partition: &Partition,
    broker_id: BrokerId,
    leadership: Leadership,
    states: &BTreeMap<BrokerId, FollowerState>,
    fenced: &BTreeSet<BrokerId>,
) -> bool {
    if states.is_empty() || partition.leader_epoch > leadership.leader_epoch {
        // Not looked at yet; or another leader has reported, and Raft will tell us too.
        return false;
    }
    if partition.leader != Some(broker_id) || partition.leader_epoch < leadership.leader_epoch {
        return true;
    }
    let in_sync: BTreeSet<BrokerId> = states
        .iter()
        .filter(|(broker, state)| {
            **broker == broker_id
                || (**state == FollowerState::CaughtUp && !fenced.contains(broker))
        })
        .map(|(broker, _)| *broker)
        .collect();
    partition.isr.iter().copied().collect::<BTreeSet<_>>() != in_sync
}

fn report(
    partition: &Partition,
    leadership: Leadership,
    states: &BTreeMap<BrokerId, FollowerState>,
) -> v1::PartitionReport {
    use v1::replica_progress::State;
    let replicas = states.iter().map(|(broker, state)| {
        let state = match state {
            FollowerState::CaughtUp => State::CaughtUp,
            FollowerState::Lagging => State::Lagging,
            FollowerState::Unreachable => State::Unreachable,
        };
        v1::ReplicaProgress {
            broker_id: broker.0,
            state: state.into(),
        }
    });
    v1::PartitionReport {
        raft_group_id: partition.raft_group_id.0,
        leader_epoch: leadership.leader_epoch.0,
        partition_epoch: partition.partition_epoch.0,
        replicas: replicas.collect(),
        voters: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use chronik_types::epoch::{LeaderEpoch, PartitionEpoch};
    use chronik_types::id::PartitionIndex;

    use super::*;
    use FollowerState::{CaughtUp, Unreachable};

    fn partition(leader: i32, epoch: i32, isr: &[i32]) -> Partition {
        Partition {
            partition: PartitionIndex(0),
            raft_group_id: RaftGroupId(1),
            replicas: Vec::new(),
            isr: isr.iter().copied().map(BrokerId).collect(),
            leader: Some(BrokerId(leader)),
            leader_epoch: LeaderEpoch(epoch),
            partition_epoch: PartitionEpoch(3),
            ..Partition::default()
        }
    }

    fn check(partition: &Partition, states: &[(i32, FollowerState)], fenced: &[i32]) -> bool {
        let leadership = Leadership {
            leader_epoch: LeaderEpoch(5),
            is_leader: true,
            ..Default::default()
        };
        let states = states
            .iter()
            .map(|(broker, state)| (BrokerId(*broker), *state))
            .collect();
        let fenced = fenced.iter().copied().map(BrokerId).collect();
        differs(partition, BrokerId(1), leadership, &states, &fenced)
    }

    #[test]
    fn a_report_is_due_while_image_and_reality_differ() {
        let all = [(1, CaughtUp), (2, CaughtUp), (3, CaughtUp)];
        let one_gone = [(1, CaughtUp), (2, CaughtUp), (3, Unreachable)];
        assert!(!check(&partition(1, 5, &[3, 1, 2]), &all, &[]));
        assert!(
            check(&partition(1, 4, &[1, 2, 3]), &all, &[]),
            "a new leader epoch"
        );
        assert!(
            check(&partition(2, 5, &[1, 2, 3]), &all, &[]),
            "another leader"
        );
        assert!(
            !check(&partition(2, 6, &[1, 2, 3]), &all, &[]),
            "a newer leader has reported"
        );
        assert!(
            check(&partition(1, 5, &[1, 2, 3]), &one_gone, &[]),
            "the ISR shrinks"
        );
        assert!(check(&partition(1, 5, &[1, 2]), &all, &[]), "the ISR grows");
        assert!(
            !check(&partition(1, 5, &[1, 2]), &all, &[3]),
            "but not by a fenced broker"
        );
    }
}
