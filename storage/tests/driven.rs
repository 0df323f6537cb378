//! A storage without threads does nothing by itself, and with its driver does what one with threads
//! does.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use chronik_storage::disk::FaultyDisk;
use chronik_storage::{Driver, OnDurable, PartitionLog, Storage, StorageConfig, StorageError};
use chronik_types::id::RaftGroupId;

use common::{data, small_config};

const GROUP: RaftGroupId = RaftGroupId(1);

fn open(disk: &FaultyDisk) -> (Storage, Driver) {
    Storage::open_driven(small_config(), Arc::new(disk.clone())).unwrap()
}

/// Appends one committed entry that holds offset `index`; counts when it is durable.
fn append(log: &PartitionLog, index: u64, confirmed: &Arc<AtomicUsize>) {
    let confirmed = confirmed.clone();
    let on_durable: OnDurable = Box::new(move |result| {
        result.unwrap();
        confirmed.fetch_add(1, Ordering::SeqCst);
    });
    let entry = data(index, 1, index as i64, &[7; 300]);
    log.append(vec![entry], on_durable).unwrap();
    log.set_committed(index);
}

#[test]
fn nothing_is_durable_before_the_driver_steps() {
    let disk = FaultyDisk::new();
    let (storage, mut driver) = open(&disk);
    let log = storage.open_log(GROUP).unwrap();
    let confirmed = Arc::new(AtomicUsize::new(0));
    assert!(!driver.has_wal_work() && !driver.step_wal());
    append(&log, 0, &confirmed);
    append(&log, 1, &confirmed);
    assert!(driver.has_wal_work());
    assert_eq!(confirmed.load(Ordering::SeqCst), 0);
    // One group commit for both.
    assert!(driver.step_wal());
    assert_eq!(confirmed.load(Ordering::SeqCst), 2);
    assert!(!driver.step_wal());
    append(&log, 2, &confirmed);
    let disk = disk.crash(&mut || false);
    drop((log, storage, driver));
    let (storage, _driver) = open(&disk);
    let log = storage.open_log(GROUP).unwrap();
    assert_eq!(log.last_entry_id(), Some((1, 1)));
}

/// What many partitions have queued goes to the disk by one write and one fsync. Nobody is told
/// before that, and whoever is told first finds the entries of all on the disk.
#[test]
fn appends_of_many_partitions_share_one_fsync() {
    const PARTITIONS: u64 = 100;
    let disk = FaultyDisk::new();
    let config = StorageConfig {
        // So large that the first file takes it all: a next one would cost an fsync of the folder.
        wal_file_size_bytes: 1 << 20,
        ..small_config()
    };
    let opened = Storage::open_driven(config.clone(), Arc::new(disk.clone()));
    let (storage, mut driver) = opened.unwrap();
    let (calls, syncs) = (disk.changing_calls(), disk.syncs());
    let (told, answers) = channel();
    for id in 1..=PARTITIONS {
        let (told, disk) = (told.clone(), disk.clone());
        let on_durable: OnDurable = Box::new(move |result| {
            result.unwrap();
            told.send((id, disk.syncs(), disk.crash_copy())).unwrap();
        });
        let log = storage.open_log(RaftGroupId(id)).unwrap();
        let entry = data(0, 1, 0, &[7; 100]);
        log.append(vec![entry], on_durable).unwrap();
    }
    assert_eq!((disk.changing_calls(), disk.syncs()), (calls, syncs));
    assert!(answers.try_recv().is_err());

    assert!(driver.step_wal());
    assert!(!driver.has_wal_work());
    // The write and the fsync.
    assert_eq!(
        (disk.changing_calls(), disk.syncs()),
        (calls + 2, syncs + 1)
    );
    let answers: Vec<(u64, usize, FaultyDisk)> = answers.try_iter().collect();
    let groups: Vec<u64> = answers.iter().map(|(id, _, _)| *id).collect();
    assert_eq!(groups, (1..=PARTITIONS).collect::<Vec<_>>());
    for (id, seen, _) in &answers {
        assert_eq!(*seen, syncs + 1, "group {id}");
    }
    let left = answers[0].2.clone();
    let (storage, _driver) = Storage::open_driven(config, Arc::new(left)).unwrap();
    for id in 1..=PARTITIONS {
        let log = storage.open_log(RaftGroupId(id)).unwrap();
        assert_eq!(log.last_entry_id(), Some((0, 1)), "group {id}");
    }
}

#[test]
fn the_driver_flushes_recycles_closes_and_deletes() {
    let disk = FaultyDisk::new();
    let (storage, mut driver) = open(&disk);
    let log = storage.open_log(GROUP).unwrap();
    storage.open_log(RaftGroupId(2)).unwrap();
    let confirmed = Arc::new(AtomicUsize::new(0));
    for index in 0..200 {
        append(&log, index, &confirmed);
        driver.step_wal();
        while driver.step_flusher() {}
    }
    let is_wal = |path: &PathBuf| path.extension().is_some_and(|e| e == "wal");
    let wal_files = disk.paths().into_iter().filter(is_wal).count();
    assert!(
        (1..=4).contains(&wal_files),
        "{wal_files} WAL files are left"
    );
    driver.delete_log(RaftGroupId(2)).unwrap();
    driver.close().unwrap();
    let refused = log.append(vec![data(200, 1, 200, b"x")], Box::new(|_| {}));
    assert!(matches!(refused, Err(StorageError::Closed)), "{refused:?}");
    drop((log, storage));
    let (storage, driver) = open(&disk);
    assert_eq!(storage.group_ids(), vec![GROUP]);
    let log = storage.open_log(GROUP).unwrap();
    assert_eq!(log.last_entry_id(), Some((199, 1)));
    // Whoever comes after the driver is gone is told so.
    drop(driver);
    let refused = log.append(vec![data(200, 1, 200, b"x")], Box::new(|_| {}));
    assert!(matches!(refused, Err(StorageError::Closed)), "{refused:?}");
}

/// An append that is almost as large as the budget waits for the last of what is committed to leave
/// memory, however little that is; nobody else would move it.
#[test]
fn a_large_append_gets_its_room() {
    let disk = FaultyDisk::new();
    let config = StorageConfig {
        memory_max_bytes: 20_000,
        ..small_config()
    };
    let (storage, mut driver) = Storage::open_driven(config, Arc::new(disk)).unwrap();
    let log = storage.open_log(GROUP).unwrap();
    append(&log, 0, &Arc::default());
    driver.step_wal();
    let large = || data(1, 1, 1, &[7; 19_700]);
    let refused = log.append(vec![large()], Box::new(|_| {}));
    assert!(
        matches!(refused, Err(StorageError::Overloaded { .. })),
        "{refused:?}"
    );
    while driver.step_flusher() {}
    log.append(vec![large()], Box::new(|_| {})).unwrap();
}
