//! The log and the database stay small, however many commands there were.

use std::time::Duration;

use crate::common::{FakeBroker, Group, create, new_topic, within};
use chronik_controller::config::RaftSettings;
use chronik_proto::v1;

/// Bytes of all files in a controller's data folder.
fn folder_bytes(group: &Group, index: usize) -> u64 {
    let folder = group.config(index).data_dir;
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap());
    entries.map(|entry| entry.metadata().unwrap().len()).sum()
}

fn log_entries(group: &Group, index: usize) -> u64 {
    let status = group.controller(index).node().status();
    status.last_log_index - status.purged_log_index
}

async fn allocate(group: &Group, index: usize, count: usize) {
    let admin = group.admin(index);
    let mut done = 0;
    while done < count {
        let calls = (0..100).map(|_| {
            let mut admin = admin.clone();
            async move {
                let request = v1::AllocateProducerIdsRequest { count: 1 };
                admin.allocate_producer_ids(request).await.unwrap();
            }
        });
        within("a hundred commands", futures::future::join_all(calls)).await;
        done += 100;
    }
}

#[tokio::test]
async fn thousands_of_commands_leave_a_small_log_and_file() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    allocate(&group, leader, 1000).await;
    let bounded = |group: &Group| {
        let raft = group.config(0).raft;
        let max = raft.snapshot_log_entries + raft.retained_log_entries + 20;
        (0..3).all(|index| log_entries(group, index) <= max)
    };
    group.until("short logs", bounded).await;
    let after_1000: Vec<u64> = (0..3).map(|index| folder_bytes(&group, index)).collect();
    allocate(&group, leader, 5000).await;
    group.until("short logs", bounded).await;
    for (index, before) in after_1000.iter().enumerate() {
        let after = folder_bytes(&group, index);
        println!("controller {index}: {before} bytes after 1000 commands, {after} after 6000");
        // SQLite's write-ahead log goes up to some 4 MiB before it is used from its start again.
        assert!(after < 8 * 1024 * 1024, "{after}");
    }
    // And a start reads little.
    group.kill(leader).await;
    group.restart(leader).await;
    group.leader().await;
}

#[tokio::test]
async fn large_commands_are_bounded_by_bytes() {
    let mut group = Group::unstarted(3).await;
    // The broker sends no heartbeats.
    group.session_timeout_ms = 60_000;
    group.raft = RaftSettings {
        snapshot_log_entries: 1_000_000,
        retained_log_entries: 1_000_000,
        snapshot_log_bytes: 256 * 1024,
        ..RaftSettings::default()
    };
    for index in 0..3 {
        group.restart(index).await;
    }
    let leader = group.leader().await;
    let _broker = FakeBroker::register(&group, leader, 1).await;
    // Each command holds an assignment of all its partitions.
    for number in 0..20 {
        let topic = new_topic(&format!("t{number}"), 20_000, 1);
        let created = create(&mut group.admin(leader), vec![topic], 0).await;
        assert_eq!(created[0].error(), v1::AdminError::TimedOut);
    }
    let short = |group: &Group| (0..3).all(|index| log_entries(group, index) <= 8);
    tokio::time::timeout(Duration::from_secs(60), group.until("short logs", short))
        .await
        .unwrap();
}
