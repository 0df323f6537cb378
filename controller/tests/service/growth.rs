//! The log and the database stay small, however many commands there were.

use crate::common::{FakeBroker, Group, create, new_topic, within};
use chronik_controller::config::RaftSettings;
use chronik_controller::db::Db;
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
    let raft = group.config(0).raft;
    let max = raft.snapshot_log_entries + raft.retained_log_entries + 20;
    let bounded = |group: &Group| (0..3).all(|index| log_entries(group, index) <= max);
    group.until("short logs", bounded).await;
    allocate(&group, leader, 5000).await;
    group.until("short logs", bounded).await;
    for index in 0..3 {
        let after = folder_bytes(&group, index);
        println!("controller {index}: {after} bytes after 6000 commands");
        // SQLite's write-ahead log goes up to some 4 MiB before it is used from its start again.
        assert!(after < 8 * 1024 * 1024, "{after}");
    }
    // And a start reads little.
    group.kill(leader).await;
    let folder = group.config(leader).data_dir;
    let (db, contents, worker) = Db::open(&folder).await.unwrap();
    let log_count = contents.log.len() as u64;
    assert!(log_count <= max, "{log_count}");
    drop(db);
    within("closing the database", worker).await.unwrap();
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
    group.until("short logs", short).await;
}
