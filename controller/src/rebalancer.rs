//! The leader's loop over placement: begins moves whose turn it is, empties brokers, and is the only
//! one who decides by itself that a partition should have another leader. Brokers carry out.
//!
//! Invariant: it holds nothing that a new leader of the controllers could not work out from the
//! image again, but for how long each broker has been live or behind, and partitions without a leader; and it
//! sleeps while nothing changes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use chronik_types::cluster_image::{ClusterImage, Partition, ReassignmentCause};
use chronik_types::epoch::BrokerEpoch;
use chronik_types::id::{BrokerId, RaftGroupId};

use crate::command::Command;
use crate::controller::Controller;
use crate::raft::ProposeError;
use crate::rebalance::{activations, drain_moves, wanted_leaders};

/// Between two looks at an image that keeps changing.
const INTERVAL: Duration = Duration::from_millis(100);
/// Before a command that no majority took is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Moves of a drain that may be asked for and not done.
const DRAIN_MOVES_MAX: usize = 1_000;
/// How long a broker that is behind with some replicas is spared the others' leadership, and how long
/// all wait for partitions without a leader, at a time.
const RECOVERY_MAX: Duration = Duration::from_secs(600);
/// How long one partition that could have a leader and has none is waited for.
const ELECTION_MAX: Duration = Duration::from_secs(60);
/// Leaders asked for in one command.
const LEADERS_MAX: usize = 1_000;

/// Runs while this controller leads, until dropped.
pub async fn run(controller: &Controller) {
    let delay = controller.config().leader_balance_delay();
    let mut images = controller.feed().subscribe();
    let mut settling = Settling::default();
    loop {
        images.borrow_and_update();
        let image = controller.image();
        let now = Instant::now();
        settling.observe(&image, now);
        controller.moves().retain_moving(&image);
        let is_settled = |id| settling.is_settled(id, delay, now);
        let mut again_at = settling.next(delay, now);
        if let Err(error) = step(controller, &image, is_settled).await {
            tracing::warn!(%error, "what should be moved could not be noted yet");
            again_at = Some(Instant::now() + RETRY);
        }
        tokio::time::sleep(INTERVAL).await;
        let wake = async {
            match again_at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = images.changed() => if changed.is_err() { return },
            () = wake => {}
        }
    }
}

async fn step(
    controller: &Controller,
    image: &ClusterImage,
    is_settled: impl Fn(BrokerId) -> bool,
) -> Result<(), ProposeError> {
    let partitions = activations(image);
    if !partitions.is_empty() {
        let command = Command::ActivateReassignments { partitions };
        controller.propose(command).await?;
    }
    let all = image.topics.values().flat_map(|topic| &topic.partitions);
    let under_way = all
        .filter_map(|partition| partition.reassignment.as_deref())
        .filter(|moving| moving.cause == ReassignmentCause::Drain)
        .count();
    let changes = drain_moves(image, DRAIN_MOVES_MAX.saturating_sub(under_way));
    if !changes.is_empty() {
        tracing::info!(
            partitions = changes.len(),
            "moves replicas off drained brokers"
        );
        controller
            .propose(Command::AlterReassignments { changes })
            .await?;
    }
    let mut leaders = wanted_leaders(image, is_settled);
    leaders.truncate(LEADERS_MAX);
    if !leaders.is_empty() {
        tracing::info!(partitions = leaders.len(), "asks for other leaders");
        controller
            .propose(Command::SetWantedLeaders { leaders })
            .await?;
    }
    Ok(())
}

/// Since when each broker has been live, as far as this leader knows, and which of them are behind.
#[derive(Default)]
struct Settling {
    live_since: BTreeMap<BrokerId, (BrokerEpoch, Instant)>,
    /// Since when they have replicas outside the ISR: their disks are busy with what they missed.
    behind_since: BTreeMap<BrokerId, Instant>,
    /// Partitions that could have a leader, and since when they have none. To hand over others
    /// meanwhile would take the brokers' time from their elections.
    leaderless: HashMap<RaftGroupId, Instant>,
    /// Since when there are any that are waited for.
    electing_since: Option<Instant>,
}

impl Settling {
    fn observe(&mut self, image: &ClusterImage, now: Instant) {
        self.live_since.retain(|id, _| image.is_live(*id));
        for broker in image.brokers.values().filter(|broker| !broker.fenced) {
            let since = self.live_since.entry(broker.broker_id);
            let since = since.or_insert((broker.broker_epoch, now));
            if since.0 != broker.broker_epoch {
                *since = (broker.broker_epoch, now);
            }
        }
        let partitions = || image.topics.values().flat_map(|topic| &topic.partitions);
        // Replicas that are being moved are behind until they are there, and without a leader nobody
        // catches up.
        let settled = partitions().filter(|p| p.leader.is_some() && p.reassignment.is_none());
        let behind: BTreeSet<BrokerId> = settled
            .flat_map(|partition| {
                let brokers = partition.brokers();
                brokers.filter(|id| !partition.isr.contains(id))
            })
            .collect();
        self.behind_since.retain(|id, _| behind.contains(id));
        for id in behind {
            self.behind_since.entry(id).or_insert(now);
        }
        let leaderless = partitions().filter(|p| awaits_leader(image, p));
        let leaderless: HashSet<RaftGroupId> = leaderless.map(|p| p.raft_group_id).collect();
        self.leaderless
            .retain(|group, _| leaderless.contains(group));
        for group in leaderless {
            self.leaderless.entry(group).or_insert(now);
        }
        let is_electing = self.leaderless.values().max() > now.checked_sub(ELECTION_MAX).as_ref();
        self.electing_since = is_electing.then(|| self.electing_since.unwrap_or(now));
    }

    fn is_settled(&self, id: BrokerId, delay: Duration, now: Instant) -> bool {
        self.settles_at(id, delay).is_some_and(|at| at <= now)
    }

    fn settles_at(&self, id: BrokerId, delay: Duration) -> Option<Instant> {
        let (_, since) = self.live_since.get(&id)?;
        let caught_up_at = self
            .behind_since
            .get(&id)
            .map(|since| *since + RECOVERY_MAX);
        let elected_at = self.electing_since.map(|since| since + RECOVERY_MAX);
        let latest = self.leaderless.values().max();
        let elected_at = elected_at.min(latest.map(|since| *since + ELECTION_MAX));
        Some((*since + delay).max(caught_up_at.max(elected_at).unwrap_or(*since)))
    }

    /// When the next broker will have settled.
    fn next(&self, delay: Duration, now: Instant) -> Option<Instant> {
        let brokers = self.live_since.keys();
        let ends = brokers.filter_map(|id| self.settles_at(*id, delay));
        ends.filter(|end| *end > now).min()
    }
}

/// Whether it has no leader although a majority of its replicas is on live brokers.
fn awaits_leader(image: &ClusterImage, partition: &Partition) -> bool {
    if partition.leader.is_some() {
        return false;
    }
    let adding = partition.adding();
    let voters = partition.brokers().filter(|id| !adding.contains(id));
    let voters: Vec<BrokerId> = voters.collect();
    let live = voters.iter().filter(|id| image.is_live(**id)).count();
    live > voters.len() / 2
}

#[cfg(test)]
mod tests {
    use chronik_types::cluster_image::Broker;
    use uuid::Uuid;

    use super::*;
    use crate::rebalance::tests::{change_partition, image};

    #[test]
    fn a_broker_settles_anew_after_each_registration() {
        let (id, delay, start) = (BrokerId(1), Duration::from_secs(3), Instant::now());
        let image = |epoch: u64, fenced: bool| {
            let mut image = ClusterImage::default();
            let broker = Broker {
                broker_id: id,
                incarnation_id: Uuid::nil(),
                broker_epoch: BrokerEpoch(epoch),
                rpc_address: String::new(),
                rack: None,
                fenced,
                drain: Default::default(),
            };
            image.brokers.insert(id, broker);
            image
        };
        let mut settling = Settling::default();
        settling.observe(&image(1, false), start);
        assert!(!settling.is_settled(id, delay, start));
        assert_eq!(settling.next(delay, start), Some(start + delay));
        let later = start + delay;
        settling.observe(&image(1, false), later);
        assert!(settling.is_settled(id, delay, later));
        assert_eq!(settling.next(delay, later), None);
        settling.observe(&image(2, false), later);
        assert!(!settling.is_settled(id, delay, later));
        settling.observe(&image(2, true), later + delay);
        assert!(!settling.is_settled(id, delay, later + delay));
    }

    #[test]
    fn a_broker_that_is_behind_gets_no_leadership_until_it_is_not_or_for_long() {
        let (delay, start) = (Duration::from_secs(3), Instant::now());
        let mut image = image(2, &[&[1, 2], &[2, 1]]);
        let mut settling = Settling::default();
        settling.observe(&image, start);
        let later = start + delay;
        assert!(settling.is_settled(BrokerId(1), delay, later));

        change_partition(&mut image, 1, |p| p.isr = vec![BrokerId(2)]);
        settling.observe(&image, later);
        assert!(!settling.is_settled(BrokerId(1), delay, later));
        assert!(settling.is_settled(BrokerId(2), delay, later));
        assert_eq!(settling.next(delay, later), Some(later + RECOVERY_MAX));
        assert!(settling.is_settled(BrokerId(1), delay, later + RECOVERY_MAX));
        let broker_2 = image.brokers.get_mut(&BrokerId(2)).unwrap();
        broker_2.fenced = true;
        change_partition(&mut image, 1, |p| p.leader = None);
        settling.observe(&image, later);
        assert!(
            settling.is_settled(BrokerId(1), delay, later),
            "nobody to follow"
        );
        image.brokers.get_mut(&BrokerId(2)).unwrap().fenced = false;
        change_partition(&mut image, 1, |p| {
            p.leader = Some(BrokerId(2));
            p.isr.push(BrokerId(1));
        });
        settling.observe(&image, later);
        assert!(settling.is_settled(BrokerId(1), delay, later));
    }

    #[test]
    fn nobody_gets_leadership_back_while_others_could_have_a_leader_and_have_none() {
        let (delay, start) = (Duration::from_secs(3), Instant::now());
        let mut image = image(2, &[&[1, 2], &[2, 1]]);
        let mut settling = Settling::default();
        change_partition(&mut image, 1, |p| p.leader = None);
        settling.observe(&image, start);
        let later = start + delay;
        settling.observe(&image, later);
        assert!(!settling.is_settled(BrokerId(1), delay, later));
        let given_up = start + ELECTION_MAX;
        assert_eq!(settling.next(delay, later), Some(given_up));
        settling.observe(&image, given_up);
        assert!(settling.is_settled(BrokerId(1), delay, given_up));
        // It holds up nobody any more, but the next one does.
        change_partition(&mut image, 0, |p| p.leader = None);
        settling.observe(&image, given_up);
        assert!(!settling.is_settled(BrokerId(1), delay, given_up));
        change_partition(&mut image, 0, |p| p.leader = Some(BrokerId(1)));
        settling.observe(&image, given_up);
        assert!(settling.is_settled(BrokerId(1), delay, given_up));

        image.brokers.get_mut(&BrokerId(2)).unwrap().fenced = true;
        settling.observe(&image, later);
        assert!(
            settling.is_settled(BrokerId(1), delay, later),
            "it can have none"
        );
        image.brokers.get_mut(&BrokerId(2)).unwrap().fenced = false;
        change_partition(&mut image, 1, |p| p.leader = Some(BrokerId(2)));
        settling.observe(&image, later);
        assert!(settling.is_settled(BrokerId(1), delay, later));
    }
}
