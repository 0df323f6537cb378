//! Which replicas should be on other brokers: to empty a broker, or to make loads equal.
//!
//! Invariant: a partition keeps its number of replicas, and stands on no fewer racks than before,
//! unless a broker is emptied and there is no other way. A partition that is being moved already is
//! left alone.

use std::collections::{BTreeMap, BTreeSet};

use chronik_types::cluster_image::{ClusterImage, Drain, Partition, ReassignmentCause};
use chronik_types::id::{BrokerId, TopicId};

use super::{partitions, takes_replicas};
use crate::command::ReassignmentChange;

/// Moves that take replicas off brokers that are being emptied; at most `max`.
pub fn drain_moves(image: &ClusterImage, max: usize) -> Vec<ReassignmentChange> {
    let drained: BTreeSet<BrokerId> = image
        .brokers
        .values()
        .filter(|broker| broker.drain == Drain::Replicas)
        .map(|broker| broker.broker_id)
        .collect();
    if drained.is_empty() {
        return Vec::new();
    }
    let mut loads = Loads::of(image);
    let mut moves = Vec::new();
    for (topic_id, partition) in partitions(image) {
        let is_touched = partition.brokers().any(|id| drained.contains(&id));
        if !is_touched || partition.reassignment.is_some() || partition.leader.is_none() {
            continue;
        }
        if moves.len() == max {
            break;
        }
        let mut target: Vec<BrokerId> = partition.brokers().collect();
        for place in 0..target.len() {
            let old = target[place];
            if drained.contains(&old)
                && let Some(new) = loads.best_replacement(&target, place)
            {
                target[place] = new;
                loads.moved(old, new);
            }
        }
        if partition.brokers().ne(target.iter().copied()) {
            moves.push(change(
                topic_id,
                partition,
                target,
                ReassignmentCause::Drain,
            ));
        }
    }
    moves
}

/// Moves that make the numbers of replicas, and then of preferred leaders, differ by at most one
/// between live brokers, where racks allow it. Only a change of order moves no data.
pub fn balance_moves(image: &ClusterImage) -> Vec<ReassignmentChange> {
    let movable: Vec<(TopicId, &Partition)> = partitions(image)
        .into_iter()
        .filter(|(_, partition)| partition.reassignment.is_none() && partition.leader_epoch.0 > 0)
        .collect();
    let mut targets: Vec<Vec<BrokerId>> = movable
        .iter()
        .map(|(_, partition)| partition.brokers().collect())
        .collect();
    let mut loads = Loads::of(image);
    even_replicas(&mut targets, &mut loads);
    even_leaders(&mut targets, &loads);
    movable
        .into_iter()
        .zip(targets)
        .filter(|((_, partition), target)| partition.brokers().ne(target.iter().copied()))
        .map(|((topic_id, partition), target)| {
            change(topic_id, partition, target, ReassignmentCause::Balance)
        })
        .collect()
}

fn change(
    topic_id: TopicId,
    partition: &Partition,
    target: Vec<BrokerId>,
    cause: ReassignmentCause,
) -> ReassignmentChange {
    ReassignmentChange {
        topic_id,
        partition: partition.partition,
        target: Some(target),
        cause,
    }
}

/// Takes replicas from the fullest brokers to the emptiest ones until nothing can be gained.
fn even_replicas(targets: &mut [Vec<BrokerId>], loads: &mut Loads) {
    let mut held: BTreeMap<BrokerId, Vec<usize>> = BTreeMap::new();
    for (index, target) in targets.iter().enumerate() {
        for id in target {
            held.entry(*id).or_default().push(index);
        }
    }
    while let Some((index, place, to)) = next_move(targets, &held, loads) {
        let from = std::mem::replace(&mut targets[index][place], to);
        loads.moved(from, to);
        if let Some(list) = held.get_mut(&from) {
            list.retain(|other| *other != index);
        }
        held.entry(to).or_default().push(index);
    }
}

/// The partition, the place in its assignment, and the broker that gets that replica.
fn next_move(
    targets: &[Vec<BrokerId>],
    held: &BTreeMap<BrokerId, Vec<usize>>,
    loads: &Loads,
) -> Option<(usize, usize, BrokerId)> {
    let by_load = loads.takers_by_load();
    for (from_count, from) in by_load.iter().rev() {
        for (to_count, to) in &by_load {
            if from_count.saturating_sub(*to_count) < 2 {
                break;
            }
            let candidates = held.get(from).into_iter().flatten();
            let fitting = candidates.filter_map(|&index| {
                let target = &targets[index];
                let place = target.iter().position(|id| id == from)?;
                let fits = !target.contains(to) && loads.keeps_racks(target, place, *to);
                // A follower goes rather than a preferred leader.
                fits.then_some((place == 0, index, place))
            });
            if let Some((_, index, place)) = fitting.min() {
                return Some((index, place, *to));
            }
        }
    }
    None
}

/// Puts other replicas first where a broker is the preferred leader of too many partitions.
fn even_leaders(targets: &mut [Vec<BrokerId>], loads: &Loads) {
    let mut leaders: BTreeMap<BrokerId, usize> = loads.takers.keys().map(|id| (*id, 0)).collect();
    for target in targets.iter() {
        if let Some(count) = target.first().and_then(|id| leaders.get_mut(id)) {
            *count += 1;
        }
    }
    // Each change makes two numbers more equal, so this ends.
    loop {
        let mut changed = false;
        for target in targets.iter_mut() {
            let Some(present) = target.first().copied() else {
                continue;
            };
            let count = |id: &BrokerId| leaders.get(id).copied();
            let best = (1..target.len())
                .filter_map(|place| Some((count(&target[place])?, place)))
                .min();
            if let (Some((fewest, place)), Some(many)) = (best, count(&present))
                && many > fewest.saturating_add(1)
            {
                let next = target.remove(place);
                target.insert(0, next);
                leaders.entry(present).and_modify(|count| *count -= 1);
                leaders.entry(next).and_modify(|count| *count += 1);
                changed = true;
            }
        }
        if !changed {
            return;
        }
    }
}

/// Replicas that each broker has, or will have when what is planned is done.
struct Loads {
    counts: BTreeMap<BrokerId, usize>,
    /// Brokers that may get replicas, and their racks.
    takers: BTreeMap<BrokerId, Option<String>>,
    racks: BTreeMap<BrokerId, Option<String>>,
}

impl Loads {
    fn of(image: &ClusterImage) -> Self {
        let mut counts: BTreeMap<BrokerId, usize> =
            image.brokers.keys().map(|id| (*id, 0)).collect();
        for partition in image.topics.values().flat_map(|topic| &topic.partitions) {
            let target = partition.reassignment.as_deref().map(|m| m.target.clone());
            for id in target.unwrap_or_else(|| partition.brokers().collect()) {
                *counts.entry(id).or_default() += 1;
            }
        }
        let brokers = image.brokers.values();
        let takers = brokers.clone().filter(|broker| takes_replicas(broker));
        Self {
            counts,
            takers: takers.map(|b| (b.broker_id, b.rack.clone())).collect(),
            racks: brokers.map(|b| (b.broker_id, b.rack.clone())).collect(),
        }
    }

    fn moved(&mut self, from: BrokerId, to: BrokerId) {
        let count = self.counts.entry(from).or_default();
        *count = count.saturating_sub(1);
        *self.counts.entry(to).or_default() += 1;
    }

    fn count(&self, id: BrokerId) -> usize {
        self.counts.get(&id).copied().unwrap_or_default()
    }

    fn takers_by_load(&self) -> Vec<(usize, BrokerId)> {
        let takers = self.takers.keys().map(|id| (self.count(*id), *id));
        let mut sorted: Vec<_> = takers.collect();
        sorted.sort_unstable();
        sorted
    }

    fn rack(&self, id: BrokerId) -> Option<&str> {
        self.racks.get(&id)?.as_deref()
    }

    /// Whether the replica at `place` may go to `to` without standing on fewer racks.
    fn keeps_racks(&self, target: &[BrokerId], place: usize, to: BrokerId) -> bool {
        let rack_count = |brokers: &[BrokerId]| {
            let racks = brokers.iter().filter_map(|id| self.rack(*id));
            racks.collect::<BTreeSet<_>>().len()
        };
        let mut after = target.to_vec();
        after[place] = to;
        rack_count(&after) >= rack_count(target)
    }

    /// Who should hold the replica at `place` instead: on another rack than the rest if possible,
    /// then the emptiest.
    fn best_replacement(&self, target: &[BrokerId], place: usize) -> Option<BrokerId> {
        let others = || {
            let all = target.iter().enumerate();
            all.filter(|(index, _)| *index != place).map(|(_, id)| *id)
        };
        let candidates = self.takers.keys().copied();
        candidates
            .filter(|id| !target.contains(id))
            .min_by_key(|id| {
                let rack = self.rack(*id);
                let rack_mates =
                    others().filter(|other| rack.is_some() && self.rack(*other) == rack);
                (rack_mates.count(), self.count(*id), *id)
            })
    }
}
