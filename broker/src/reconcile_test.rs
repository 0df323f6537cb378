//! Plans from images, and what an image changes.

use std::collections::BTreeMap;

use chronik_types::cluster_image::{Broker, ClusterImage, Drain, Partition, Restore, Topic};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{PartitionIndex, TopicId};

use super::assignment::{AssignmentChange, Wanted};
use super::*;

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
    trust: Trust,
) -> Plan {
    let running = running
        .iter()
        .map(|(group, id)| (RaftGroupId(*group), *id))
        .collect();
    let on_disk = on_disk.iter().copied().map(RaftGroupId).collect();
    plan(
        image,
        &wanted(image, BrokerId(1)),
        &running,
        &on_disk,
        trust,
    )
}

fn groups(ids: &[u64]) -> Vec<RaftGroupId> {
    ids.iter().copied().map(RaftGroupId).collect()
}

#[test]
fn assigned_replicas_are_opened_once() {
    let both = [replica(1, 5), replica(2, 5)];
    let image = image(&[(7, &both), (8, &both[1..])]);
    let first = check(&image, &[], &[7], Trust::Full);
    assert_eq!(
        first,
        Plan {
            open: groups(&[7]),
            ..Plan::default()
        }
    );
    assert_eq!(
        check(&image, &[(7, both[0])], &[7], Trust::Full),
        Plan::default()
    );
    assert_eq!(check(&image, &[], &[7], Trust::Disk), first);
}

#[test]
fn a_replica_that_lost_its_log_is_not_opened_under_its_old_id() {
    let image = image(&[(7, &[replica(1, 5), replica(2, 5)])]);
    assert_eq!(check(&image, &[], &[], Trust::Disk), Plan::default());
    let opened = Plan {
        open: groups(&[7]),
        ..Plan::default()
    };
    assert_eq!(check(&image, &[], &[], Trust::Full), opened);
}

#[test]
fn what_is_not_assigned_goes_only_on_a_trusted_image() {
    let image = image(&[]);
    let running = [(7, replica(1, 5))];
    assert_eq!(
        check(&image, &running, &[7, 9], Trust::Disk),
        Plan::default()
    );
    let gone = Plan {
        remove: groups(&[7]),
        delete: groups(&[9]),
        ..Plan::default()
    };
    assert_eq!(check(&image, &running, &[7, 9], Trust::Full), gone);
}

#[test]
fn a_new_incarnation_replaces_the_old_replica() {
    let image = image(&[(7, &[replica(1, 9), replica(2, 5)])]);
    let running = [(7, replica(1, 5))];
    let replaced = Plan {
        remove: groups(&[7]),
        open: groups(&[7]),
        ..Plan::default()
    };
    assert_eq!(check(&image, &running, &[7], Trust::Full), replaced);
    assert_eq!(check(&image, &running, &[7], Trust::Disk), Plan::default());
    // It is not a first voter: the others have been running the group since revision 5.
    assert!(!wanted(&image, BrokerId(1))[&RaftGroupId(7)].is_founder());
    assert!(!wanted(&image, BrokerId(2))[&RaftGroupId(7)].is_founder());
}

#[test]
fn what_a_restore_has_forgotten_is_kept() {
    let mut image = image(&[
        (7, &[replica(1, 5)]),
        (8, &[replica(1, 120), replica(2, 5)]),
    ]);
    image.restores.push(Restore {
        backup_revision: 10,
        revision: 100,
    });
    // 9: created after the backup. 10: of a topic that was deleted since the restore. 11: not running,
    // so it is not known when it was created.
    let running = [(7, replica(1, 5)), (9, replica(1, 20)), (10, replica(1, 4))];
    let on_disk = [7, 9, 10, 11];
    let kept = Plan {
        remove: groups(&[10]),
        close: groups(&[9]),
        unknown: groups(&[11]),
        open: groups(&[8]),
        ..Plan::default()
    };
    assert_eq!(check(&image, &running, &on_disk, Trust::Full), kept);
    assert_eq!(
        check(&image, &running, &on_disk, Trust::Disk),
        Plan::default()
    );
    assert_eq!(check(&image, &[], &on_disk, Trust::Not), Plan::default());
    // A replica from before the backup without its log is not founded anew.
    let lost = Plan {
        lost: groups(&[7]),
        open: groups(&[8]),
        ..Plan::default()
    };
    assert_eq!(check(&image, &[], &[], Trust::Full), lost);
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
    assert_eq!(trust(&view(&image, true), BrokerId(1), us), Trust::Disk);
    image
        .brokers
        .insert(BrokerId(1), broker(Uuid::from_u128(4)));
    assert_eq!(trust(&view(&image, true), BrokerId(1), us), Trust::Disk);
    image.brokers.insert(BrokerId(1), broker(us));
    assert_eq!(trust(&view(&image, true), BrokerId(1), us), Trust::Full);
    assert_eq!(trust(&view(&image, false), BrokerId(1), us), Trust::Disk);
    // Restored, and this process has not registered since: what it holds is not known there.
    image.restores.push(Restore {
        backup_revision: 1,
        revision: 100,
    });
    assert_eq!(trust(&view(&image, true), BrokerId(1), us), Trust::Not);
    assert_eq!(trust(&view(&image, true), BrokerId(2), us), Trust::Not);
    let registered = image.brokers.get_mut(&BrokerId(1)).unwrap();
    registered.broker_epoch = BrokerEpoch(101);
    assert_eq!(trust(&view(&image, true), BrokerId(1), us), Trust::Full);
    assert_eq!(trust(&view(&image, false), BrokerId(1), us), Trust::Disk);
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
