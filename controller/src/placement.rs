//! Brokers and a request -> assignment. Pure: the leader passes in the random start.
//!
//! Invariant: the replicas of a partition are on different brokers, and on as many racks as there
//! are. New leaders differ by at most one between live brokers that could all lead. What a
//! broker leads has its second replicas on all the others, which share it when the broker dies. Fenced
//! brokers and those being drained are taken only where the others do not suffice, and never preferred as
//! leaders.

use std::collections::BTreeMap;

use chronik_types::cluster_image::{ClusterImage, Drain};
use chronik_types::id::BrokerId;

/// A broker that replicas may be put on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub broker_id: BrokerId,
    pub rack: Option<String>,
    pub fenced: bool,
    /// An operator wants it free of leaders or replicas.
    pub drained: bool,
    /// What it has already.
    pub leader_count: usize,
    pub replica_count: usize,
    /// Of how many partitions it is the second replica, by the first: the one to take over.
    pub successor_counts: BTreeMap<BrokerId, usize>,
}

/// Why there is no assignment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    #[error(
        "replication factor {replication_factor} is larger than the {registered} registered brokers"
    )]
    TooFewBrokers {
        replication_factor: usize,
        registered: usize,
    },
    #[error(
        "only {live} brokers are live: a majority of {replication_factor} replicas could not start"
    )]
    TooFewLive {
        replication_factor: usize,
        live: usize,
    },
}

/// All registered brokers with their present load.
pub fn candidates(image: &ClusterImage) -> Vec<Candidate> {
    let mut load: BTreeMap<BrokerId, (usize, usize)> = BTreeMap::new();
    let mut successors: BTreeMap<BrokerId, BTreeMap<BrokerId, usize>> = BTreeMap::new();
    for partition in image.topics.values().flat_map(|topic| &topic.partitions) {
        if let [first, second, ..] = partition.replicas[..] {
            let of_second = successors.entry(second.broker_id).or_default();
            *of_second.entry(first.broker_id).or_default() += 1;
        }
        for (place, replica) in partition.replicas.iter().enumerate() {
            let (leaders, replicas) = load.entry(replica.broker_id).or_default();
            *leaders += usize::from(place == 0);
            *replicas += 1;
        }
    }
    image
        .brokers
        .values()
        .map(|broker| {
            let (leader_count, replica_count) =
                load.get(&broker.broker_id).copied().unwrap_or_default();
            Candidate {
                broker_id: broker.broker_id,
                rack: broker.rack.clone(),
                fenced: broker.fenced,
                drained: broker.drain != Drain::None,
                leader_count,
                replica_count,
                successor_counts: successors.remove(&broker.broker_id).unwrap_or_default(),
            }
        })
        .collect()
}

/// Assigns `partition_count` new partitions: brokers of each, preferred leader first. The load of
/// what is placed is added to the candidates. `start` breaks ties, so that many small topics do
/// not all begin at the same broker.
pub fn place(
    candidates: &mut [Candidate],
    partition_count: usize,
    replication_factor: usize,
    start: usize,
) -> Result<Vec<Vec<BrokerId>>, PlacementError> {
    let registered = candidates.len();
    if replication_factor > registered {
        return Err(PlacementError::TooFewBrokers {
            replication_factor,
            registered,
        });
    }
    let live = candidates
        .iter()
        .filter(|candidate| !candidate.fenced)
        .count();
    if live == 0 || live < replication_factor / 2 + 1 {
        return Err(PlacementError::TooFewLive {
            replication_factor,
            live,
        });
    }
    // Load of this request alone: it is balanced in itself before it evens out the past.
    let mut placed = vec![(0_usize, 0_usize); registered];
    let mut assignments = Vec::with_capacity(partition_count);
    for partition in 0..partition_count {
        let turn = start.wrapping_add(partition) % registered;
        let order = |index: usize| (index + registered - turn) % registered;
        let leader = (0..registered).min_by_key(|&index| {
            let candidate = &candidates[index];
            let (leaders, replicas) = placed[index];
            (
                (candidate.fenced, candidate.drained),
                leaders,
                candidate.leader_count,
                replicas,
                order(index),
            )
        });
        let mut chosen: Vec<usize> = leader.into_iter().collect();
        while chosen.len() < replication_factor {
            let next = (0..registered)
                .filter(|index| !chosen.contains(index))
                .min_by_key(|&index| {
                    let candidate = &candidates[index];
                    let rack = candidate.rack.as_deref();
                    let rack_mates = chosen
                        .iter()
                        .filter(|&&other| candidates[other].rack.as_deref() == rack);
                    let rack_mates = if rack.is_some() {
                        rack_mates.count()
                    } else {
                        0
                    };
                    let replicas = (placed[index].1, candidate.replica_count);
                    let avoided = (candidate.fenced, candidate.drained);
                    let successor_count = match chosen[..] {
                        [leader] => candidate
                            .successor_counts
                            .get(&candidates[leader].broker_id),
                        _ => None,
                    };
                    (
                        avoided,
                        rack_mates,
                        replicas,
                        successor_count.copied().unwrap_or_default(),
                        order(index),
                    )
                });
            let Some(next) = next else { break };
            chosen.push(next);
        }
        for (place, &index) in chosen.iter().enumerate() {
            placed[index].0 += usize::from(place == 0);
            placed[index].1 += 1;
            candidates[index].leader_count += usize::from(place == 0);
            candidates[index].replica_count += 1;
        }
        if let [first, second, ..] = chosen[..] {
            let leader = candidates[first].broker_id;
            let counts = &mut candidates[second].successor_counts;
            *counts.entry(leader).or_default() += 1;
        }
        assignments.push(
            chosen
                .into_iter()
                .map(|index| candidates[index].broker_id)
                .collect(),
        );
    }
    Ok(assignments)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn brokers(count: usize, racks: usize) -> Vec<Candidate> {
        (0..count)
            .map(|index| Candidate {
                broker_id: BrokerId(i32::try_from(index).unwrap()),
                rack: (racks > 0).then(|| format!("rack{}", index % racks)),
                fenced: false,
                drained: false,
                leader_count: 0,
                replica_count: 0,
                successor_counts: BTreeMap::new(),
            })
            .collect()
    }

    fn spread(counts: impl Iterator<Item = usize> + Clone) -> usize {
        counts.clone().max().unwrap() - counts.min().unwrap()
    }

    proptest! {
        #[test]
        fn assignments_are_balanced_and_rack_aware(
            count in 1_usize..12,
            racks in 0_usize..5,
            replication_factor in 1_usize..6,
            partition_count in 1_usize..60,
            start: usize,
        ) {
            let replication_factor = replication_factor.min(count);
            let mut candidates = brokers(count, racks);
            let assignments =
                place(&mut candidates, partition_count, replication_factor, start).unwrap();
            prop_assert_eq!(assignments.len(), partition_count);
            let rack_of = |id: &BrokerId| candidates[usize::try_from(id.0).unwrap()].rack.clone();
            for assignment in &assignments {
                let distinct: BTreeSet<_> = assignment.iter().collect();
                prop_assert_eq!(distinct.len(), replication_factor);
                if racks > 0 {
                    let used: BTreeSet<_> = assignment.iter().map(rack_of).collect();
                    prop_assert_eq!(used.len(), replication_factor.min(racks).min(count));
                }
            }
            prop_assert!(spread(candidates.iter().map(|c| c.leader_count)) <= 1);
            if racks == 0 {
                prop_assert!(spread(candidates.iter().map(|c| c.replica_count)) <= 2);
            }
        }

        #[test]
        fn many_small_topics_even_out(start in proptest::collection::vec(any::<usize>(), 30)) {
            let mut candidates = brokers(3, 0);
            for start in start {
                place(&mut candidates, 1, 1, start).unwrap();
            }
            prop_assert!(candidates.iter().all(|c| c.leader_count == 10));
        }
    }

    #[test]
    fn all_others_share_what_a_dead_broker_led() {
        let mut candidates = brokers(3, 0);
        let mut successors: BTreeMap<(i32, i32), usize> = BTreeMap::new();
        for start in 0..20 {
            for assignment in place(&mut candidates, 10, 3, start * 7).unwrap() {
                let pair = (assignment[0].0, assignment[1].0);
                *successors.entry(pair).or_default() += 1;
            }
        }
        assert_eq!(successors.len(), 6);
        assert!(spread(successors.values().copied()) <= 2, "{successors:?}");
    }

    #[test]
    fn fenced_brokers_come_last_and_never_lead() {
        let mut candidates = brokers(3, 0);
        candidates[0].fenced = true;
        let assignments = place(&mut candidates, 6, 2, 0).unwrap();
        assert!(assignments.iter().flatten().all(|id| id.0 != 0));
        let assignments = place(&mut candidates, 6, 3, 0).unwrap();
        assert!(assignments.iter().all(|assignment| assignment[2].0 == 0));
        candidates[1].fenced = true;
        assert_eq!(
            place(&mut candidates, 1, 3, 0),
            Err(PlacementError::TooFewLive {
                replication_factor: 3,
                live: 1
            })
        );
        assert_eq!(
            place(&mut candidates, 1, 4, 0),
            Err(PlacementError::TooFewBrokers {
                replication_factor: 4,
                registered: 3
            })
        );
        assert!(place(&mut [], 1, 1, 0).is_err());
    }
}
