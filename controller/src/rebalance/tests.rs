//! The plans: what they ask for, and that they come to an end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chronik_types::cluster_image::{Partition, Reassignment, ReassignmentCause, Topic};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch};
use chronik_types::id::{PartitionIndex, RaftGroupId, ReplicaId};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::command::ReassignmentChange;

fn broker(id: i32, rack: Option<&str>) -> Broker {
    Broker {
        broker_id: BrokerId(id),
        incarnation_id: Uuid::nil(),
        broker_epoch: BrokerEpoch(1),
        rpc_address: String::new(),
        rack: rack.map(str::to_owned),
        fenced: false,
        drain: Drain::None,
    }
}

/// Partitions on the given brokers, each led by its first and all in sync.
pub fn image(broker_count: i32, assignments: &[&[i32]]) -> ClusterImage {
    let mut image = ClusterImage::default();
    for id in 1..=broker_count {
        image.brokers.insert(BrokerId(id), broker(id, None));
    }
    let partitions = (0..).zip(assignments).map(|(index, ids)| Partition {
        partition: PartitionIndex(index),
        raft_group_id: RaftGroupId(u64::try_from(index).unwrap()),
        replicas: ids
            .iter()
            .map(|id| ReplicaId {
                broker_id: BrokerId(*id),
                incarnation: 1,
            })
            .collect(),
        isr: ids.iter().copied().map(BrokerId).collect(),
        leader: ids.first().copied().map(BrokerId),
        leader_epoch: LeaderEpoch(1),
        ..Partition::default()
    });
    image.put_topic(Arc::new(Topic {
        topic_id: TopicId(Uuid::from_u128(1)),
        name: "t".into(),
        configs: BTreeMap::new(),
        partitions: partitions.collect(),
    }));
    image
}

pub fn change_partition(
    image: &mut ClusterImage,
    index: usize,
    change: impl FnOnce(&mut Partition),
) {
    let topic = image.topics.values_mut().next().unwrap();
    change(&mut Arc::make_mut(topic).partitions[index]);
}

fn targets(moves: &[ReassignmentChange]) -> Vec<(i32, Vec<i32>)> {
    let ids = |target: &[BrokerId]| target.iter().map(|id| id.0).collect();
    let row = |m: &ReassignmentChange| (m.partition.0, ids(m.target.as_deref().unwrap()));
    moves.iter().map(row).collect()
}

#[test]
fn moves_are_begun_up_to_the_limit_and_one_that_cannot_go_on_does_not_count() {
    let mut image = image(4, &[&[1], &[1], &[1], &[1]]);
    image.settings.reassignment_parallel_max = 2;
    for index in 0..4 {
        change_partition(&mut image, index, |partition| {
            partition.reassignment = Some(Box::new(Reassignment {
                target: vec![BrokerId(if index == 0 { 4 } else { 2 })],
                original: vec![BrokerId(1)],
                active: index < 2,
                cause: ReassignmentCause::Request,
            }));
        });
    }
    assert_eq!(activations(&image), []);
    image.brokers.get_mut(&BrokerId(4)).unwrap().fenced = true;
    let begun: Vec<i32> = activations(&image)
        .iter()
        .map(|at| at.partition.0)
        .collect();
    assert_eq!(begun, [2]);
}

#[test]
fn leadership_goes_back_to_settled_preferred_leaders_and_away_from_drained_brokers() {
    let mut image = image(3, &[&[1, 2, 3], &[2, 3, 1], &[3, 1, 2]]);
    let wanted = |image: &ClusterImage, settled: bool| -> Vec<(i32, Option<i32>)> {
        let wanted = wanted_leaders(image, |_| settled).into_iter();
        let row = |w: crate::command::WantedLeader| (w.at.partition.0, w.leader.map(|id| id.0));
        wanted.map(row).collect()
    };
    assert_eq!(wanted(&image, true), []);
    change_partition(&mut image, 0, |p| p.leader = Some(BrokerId(2)));
    assert_eq!(wanted(&image, false), []);
    assert_eq!(wanted(&image, true), [(0, Some(1))]);
    change_partition(&mut image, 0, |p| p.isr = vec![BrokerId(2), BrokerId(3)]);
    assert_eq!(wanted(&image, true), [], "it is not in sync");
    image.brokers.get_mut(&BrokerId(2)).unwrap().drain = Drain::Leaders;
    assert_eq!(wanted(&image, false), [(0, Some(3)), (1, Some(3))]);
    change_partition(&mut image, 1, |p| p.wanted_leader = Some(BrokerId(3)));
    assert_eq!(wanted(&image, false), [(0, Some(3))], "asked for once");
    change_partition(&mut image, 0, |p| p.isr = vec![BrokerId(2)]);
    assert_eq!(wanted(&image, false), [], "nobody else could lead");
    image.settings.leader_balance_enable = false;
    image.brokers.get_mut(&BrokerId(2)).unwrap().drain = Drain::None;
    assert_eq!(wanted(&image, true), []);
}

#[test]
fn a_drained_broker_is_emptied_onto_the_emptiest_of_another_rack() {
    let mut image = image(5, &[&[1, 2, 3], &[2, 3, 4], &[1, 3, 4]]);
    for (id, rack) in [(1, "a"), (2, "b"), (3, "c"), (4, "a"), (5, "b")] {
        image.brokers.get_mut(&BrokerId(id)).unwrap().rack = Some(rack.to_owned());
    }
    assert!(drain_moves(&image, 100).is_empty());
    image.brokers.get_mut(&BrokerId(1)).unwrap().drain = Drain::Replicas;
    let moves = drain_moves(&image, 100);
    // Rack b is taken by 2, so 4 of rack a; then a stands twice, so 5 of rack b.
    assert_eq!(
        targets(&moves),
        [(0, vec![4, 2, 3]), (2, vec![5, 3, 4])],
        "{moves:?}"
    );
    assert_eq!(drain_moves(&image, 1).len(), 1);
    image.brokers.get_mut(&BrokerId(4)).unwrap().fenced = true;
    image.brokers.get_mut(&BrokerId(5)).unwrap().fenced = true;
    assert!(
        targets(&drain_moves(&image, 100))
            .iter()
            .all(|(p, _)| *p == 2),
        "partition 0 has nowhere to go"
    );
}

#[test]
fn a_new_broker_gets_its_share_with_few_moves() {
    let rows: [&[i32]; 12] = [&[1, 2, 3]; 12];
    let image = image(4, &rows);
    let moves = balance_moves(&image);
    // 36 replicas on 4 brokers: 9 each, so 9 have to move; more partitions only change order.
    let moved = targets(&moves)
        .iter()
        .filter(|(_, t)| t.contains(&4))
        .count();
    assert_eq!(moved, 9);
    let after = applied(&image, &moves);
    assert_eq!(balance_moves(&after), []);
}

/// The image after the moves were made.
fn applied(image: &ClusterImage, moves: &[ReassignmentChange]) -> ClusterImage {
    let mut image = image.clone();
    for one in moves {
        let target = one.target.clone().unwrap();
        change_partition(&mut image, usize::try_from(one.partition.0).unwrap(), |p| {
            p.replicas = target
                .iter()
                .map(|id| ReplicaId {
                    broker_id: *id,
                    incarnation: 2,
                })
                .collect();
        });
    }
    image
}

proptest! {
    #[test]
    fn any_image_is_balanced_in_one_go(
        seeds in proptest::collection::vec(proptest::sample::subsequence(vec![1, 2, 3, 4, 5], 1..=3), 1..30),
        rack_count in 0..4_usize,
    ) {
        let rows: Vec<&[i32]> = seeds.iter().map(Vec::as_slice).collect();
        let mut image = image(5, &rows);
        for broker in image.brokers.values_mut() {
            let number = usize::try_from(broker.broker_id.0).unwrap();
            broker.rack = number.checked_rem(rack_count).map(|rack| rack.to_string());
        }
        let racks_of = |image: &ClusterImage, partition: &Partition| {
            let racks = partition.brokers().filter_map(|id| image.brokers[&id].rack.clone());
            racks.collect::<BTreeSet<_>>().len()
        };
        let moves = balance_moves(&image);
        let after = applied(&image, &moves);
        let pairs = partitions(&image).into_iter().zip(partitions(&after));
        for ((_, before), (_, after_move)) in pairs {
            let distinct: BTreeSet<_> = after_move.brokers().collect();
            prop_assert_eq!(distinct.len(), before.replicas.len());
            prop_assert!(racks_of(&after, after_move) >= racks_of(&image, before));
        }
        if rack_count == 0 {
            let count = |id: i32| {
                let held = partitions(&after).into_iter();
                held.filter(|(_, p)| p.replica_on(BrokerId(id)).is_some()).count()
            };
            let counts: Vec<usize> = (1..=5).map(count).collect();
            let spread = counts.iter().max().unwrap() - counts.iter().min().unwrap();
            prop_assert!(spread <= 1, "{counts:?}");
        }
        prop_assert_eq!(balance_moves(&after), vec![]);
    }
}
