//! Founding of a group, and controllers that come back with an empty disk.

use std::time::Instant;

use crate::common::{Group, bind, create, new_topic, until, within};
use chronik_controller::db::Db;
use chronik_controller::founding::{Identity, NodeId};
use chronik_controller::{Listeners, start_on};
use chronik_proto::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Creates topics that nobody leads, which is all that the controllers have to do with them.
async fn create_topic(group: &Group, index: usize, name: &str) {
    let created = create(&mut group.admin(index), vec![new_topic(name, 1, 1)], 0).await;
    assert_eq!(
        created[0].error(),
        v1::AdminError::TimedOut,
        "{name}: created, without a leader"
    );
}

async fn register_broker(group: &Group, index: usize) {
    crate::common::FakeBroker::register(group, index, 1).await;
}

fn node_id(group: &Group, index: usize) -> Option<NodeId> {
    group.controller(index).node().standing().identity.node_id
}

/// Waits until the controller votes under an id that is not a founder's.
async fn until_replaced(group: &Group, index: usize) -> NodeId {
    group
        .until("a vote for the new disk", |group| {
            group.controller(index).node().is_settled()
        })
        .await;
    let node_id = node_id(group, index).unwrap();
    assert_ne!(
        node_id.incarnation(),
        0,
        "an old id must not vote with an empty log"
    );
    node_id
}

#[tokio::test]
async fn lost_disks_one_after_the_other_cost_nothing() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    register_broker(&group, leader).await;
    create_topic(&group, leader, "before").await;

    // A follower's disk.
    let follower = group.follower_of(leader);
    group.kill(follower).await;
    group.lose_disk(follower);
    create_topic(&group, leader, "meanwhile").await;
    let restarted = Instant::now();
    group.restart(follower).await;
    let first = until_replaced(&group, follower).await;
    println!(
        "a follower's new disk votes after {:?}",
        restarted.elapsed()
    );

    // Then the leader's, and it takes the one with the first new disk to have a majority.
    group.kill(leader).await;
    group.lose_disk(leader);
    let next = group.leader().await;
    create_topic(&group, next, "without-the-leader").await;
    group.restart(leader).await;
    until_replaced(&group, leader).await;

    // The same controller once more: again it is somebody new.
    group.kill(follower).await;
    group.lose_disk(follower);
    group.restart(follower).await;
    assert_ne!(until_replaced(&group, follower).await, first);

    // The third one's, whose disk is the last of the founders'.
    let third = (0..3)
        .find(|index| ![leader, follower].contains(index))
        .unwrap();
    group.kill(third).await;
    group.lose_disk(third);
    group.leader().await;
    group.restart(third).await;
    until_replaced(&group, third).await;

    let leader = group.leader().await;
    group.kill(leader).await;
    let next = group.leader().await;
    create_topic(&group, next, "after-all").await;
    let image = group.controller(next).image();
    for name in ["before", "meanwhile", "without-the-leader", "after-all"] {
        assert!(image.topic_by_name(name).is_some(), "{name} is lost");
    }
    // All at once, and back.
    for index in (0..3).filter(|index| *index != leader) {
        group.kill(index).await;
    }
    for index in 0..3 {
        group.restart(index).await;
    }
    let leader = group.leader().await;
    assert_eq!(group.controller(leader).image().topics, image.topics);
}

/// What `/readyz` answers.
async fn readiness(group: &Group, index: usize) -> String {
    let address = &group.config(index).controllers[index].rest_address;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = b"GET /readyz HTTP/1.1\r\nhost: controller\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Waits until `/readyz` gives this reason.
pub async fn until_readiness_says(group: &Group, index: usize, reason: &str) {
    let what = format!("/readyz of controller {} to say {reason:?}", index + 1);
    let said = async || {
        let answer = readiness(group, index).await;
        answer.contains(reason).then_some(())
    };
    until(&what, said).await;
}

#[tokio::test]
async fn a_group_is_founded_when_all_are_there_and_says_who_is_missing() {
    let mut group = Group::unstarted(3).await;
    group.restart(0).await;
    group.restart(1).await;
    for index in [0, 1] {
        let why = "not founded yet: no answer yet from controllers 3";
        until_readiness_says(&group, index, why).await;
        assert_eq!(node_id(&group, index), None);
    }
    let started = Instant::now();
    group.restart(2).await;
    group.leader().await;
    println!("a leader {:?} after the last one came", started.elapsed());
    for index in 0..3 {
        group
            .until("all to be founders", |group| {
                node_id(group, index).is_some()
            })
            .await;
        assert_eq!(node_id(&group, index).unwrap().incarnation(), 0);
    }
}

/// Leaves a controller as one that had not decided anything when it was killed: empty, but with the
/// disk that it told the others of.
async fn forget_decision(group: &Group, index: usize, disk: &Identity) {
    group.lose_disk(index);
    let (db, _contents, worker) = Db::open(&group.config(index).data_dir).await.unwrap();
    db.save_identity(Identity::of_new_disk(disk.disk_id))
        .await
        .unwrap();
    drop(db);
    within("closing the database", worker).await.unwrap();
}

#[tokio::test]
async fn a_group_that_was_half_founded_is_founded_by_the_same_disks() {
    let mut group = Group::start(3).await;
    group.leader().await;
    let disks: Vec<Identity> = (0..3)
        .map(|index| group.controller(index).node().standing().identity)
        .collect();
    for index in 0..3 {
        group.kill(index).await;
    }
    // Only the first had its decision on disk.
    forget_decision(&group, 1, &disks[1]).await;
    forget_decision(&group, 2, &disks[2]).await;
    for index in 0..3 {
        group.restart(index).await;
    }
    group.leader().await;
    for index in 0..3 {
        group
            .until("all to be founders", |group| {
                node_id(group, index).is_some()
            })
            .await;
        assert_eq!(node_id(&group, index).unwrap().incarnation(), 0);
    }
}

#[tokio::test]
async fn a_folder_of_another_controller_is_refused() {
    let mut group = Group::start(3).await;
    group.leader().await;
    group.kill(0).await;
    let mut config = group.config(0);
    config.data_dir = group.config(1).data_dir;
    group.kill(1).await;
    let listeners = Listeners {
        rpc: bind(0).await,
        rest: bind(0).await,
    };
    let error = start_on(config, listeners).await.err().unwrap().to_string();
    assert!(
        error.contains("belongs to controller 2, controller-id is 1"),
        "{error}"
    );
}
