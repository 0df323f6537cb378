//! Disks that are full, that cannot read, and that forget: reads go on, nothing is lost that was
//! confirmed, and damage is named where it can be repaired.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::disk::faulty::{Fault, Operation};
use chronik_storage::{Disk, LogEntry, PartitionLog, Storage, StorageConfig, StorageError};
use chronik_types::offset::Offset;
use common::*;

fn open_with(disk: &FaultyDisk, change: impl FnOnce(&mut StorageConfig)) -> Storage {
    let mut config = small_config();
    change(&mut config);
    Storage::open(config, Arc::new(disk.clone()) as Arc<dyn Disk>).unwrap()
}

fn append_next(log: &PartitionLog, size: usize) -> Result<LogEntry, StorageError> {
    let index = log.last_entry_id().map_or(0, |(index, _)| index + 1);
    let entry = data(index, 1, log.log_end_offset().0, &vec![index as u8; size]);
    log.check_room(size)?;
    append(log, vec![entry.clone()])?;
    log.set_committed(index);
    Ok(entry)
}

fn is_full(result: Result<LogEntry, StorageError>) -> bool {
    matches!(result, Err(StorageError::Full { .. }))
}

#[test]
fn records_are_refused_before_the_disk_is_full_and_taken_again_when_there_is_room() {
    let disk = FaultyDisk::new();
    disk.set_capacity(Some(400_000));
    let storage = open_with(&disk, |config| {
        config.reserve_bytes = Some(150_000);
        // What may be on its way to segments has room in the reserve.
        config.memory_max_bytes = 100_000;
    });
    let log = storage.open_log(group(1)).unwrap();
    let mut written = Vec::new();
    let error = loop {
        match append_next(&log, 2000) {
            Ok(entry) => written.push(entry),
            // The flusher is behind.
            Err(StorageError::Overloaded { .. }) => std::thread::yield_now(),
            Err(error) => break error,
        }
        assert!(written.len() < 1000);
    };
    assert!(
        matches!(error, StorageError::Full { available_bytes, reserve_bytes: 150_000 } if available_bytes < 150_000),
        "{error}"
    );
    assert!(storage.is_full() && storage.stats().is_full);
    // Half of the reserve is for what leaders elsewhere have taken.
    assert!(log.check_room_to_follow(10).is_ok());
    assert!(log.check_room_to_follow(80_000).is_err());
    // What keeps the cluster together still goes, and so does what makes room.
    let next = written.len() as u64;
    append(&log, vec![blank(next, 2), membership(next + 1, 2, b"m")]).unwrap();
    vote(&log, b"vote").unwrap();
    log.set_committed(next + 1);
    assert_eq!(entries(&log)[..written.len()], written);
    assert_eq!(log.read(Offset(0), Offset(3), usize::MAX).unwrap().len(), 3);
    log.roll().unwrap();
    // The whole reserve is left for what is in memory.
    assert!(disk.used_bytes() < 400_000);
    assert!(is_full(append_next(&log, 10)));
    log.save_replica_state(next + 1, Bytes::new());
    let (done, receiver) = callback();
    log.set_log_start(Offset(written.len() as i64 - 2), done)
        .unwrap();
    answer(&receiver).unwrap();
    let (done, receiver) = callback();
    log.purge(next + 1, done).unwrap();
    answer(&receiver).unwrap();
    eventually("records are taken again", || append_next(&log, 10).is_ok());
    assert!(!storage.is_full());
    eventually("the old segments are deleted", || {
        let stats = storage.stats();
        stats.segments_deleted > 0 && stats.segment_bytes_deleted > 50_000
    });
    let stats = storage.stats();
    assert_eq!((stats.total_bytes, stats.reserve_bytes), (400_000, 150_000));
    storage.close().unwrap();
}

#[test]
fn a_disk_that_is_full_to_the_last_byte_stops_nothing_that_is_running() {
    let disk = FaultyDisk::new();
    let storage = open_with(&disk, |config| config.reserve_bytes = Some(0));
    let log = storage.open_log(group(1)).unwrap();
    let mut written = Vec::new();
    for _ in 0..10 {
        written.push(append_next(&log, 300).unwrap());
    }
    // Somebody else fills the disk.
    disk.set_capacity(Some(disk.used_bytes()));
    let error = log.roll().unwrap_err();
    assert!(error.is_out_of_room(), "{error}");
    assert!(storage.is_full());
    assert!(is_full(append_next(&log, 10)));
    let mut ended = 0;
    while log.last_entry_id().unwrap().0 < 300 && ended == 0 {
        // The WAL has room in its files, and waits when it needs a new one.
        let next = log.last_entry_id().unwrap().0 + 1;
        let (done, receiver) = callback();
        log.append(vec![membership(next, 1, &[7; 90])], done)
            .unwrap();
        log.set_committed(next);
        written.push(membership(next, 1, &[7; 90]));
        if receiver.recv_timeout(Duration::from_millis(200)).is_err() {
            ended += 1;
        }
    }
    assert_eq!(ended, 1, "the WAL waits");
    assert_eq!(entries(&log), written);
    assert_eq!(
        log.read(Offset(0), Offset(10), usize::MAX).unwrap().len(),
        10
    );
    assert!(disk.used_bytes() <= storage.stats().total_bytes);
    // A power failure now loses nothing that was confirmed.
    let durable = log.durable_index().unwrap() as usize + 1;
    let copy = disk.crash_copy();
    assert_eq!(
        entries(&open(&copy).open_log(group(1)).unwrap())[..durable],
        written[..durable]
    );
    disk.set_capacity(Some(10_000_000));
    eventually("all is written", || {
        log.durable_index() == log.last_entry_id().map(|(i, _)| i)
    });
    eventually("records are taken again", || append_next(&log, 10).is_ok());
    log.roll().unwrap();
    storage.close().unwrap();
    drop((storage, log));
    let again = open(&disk.crash(&mut || false));
    let log = again.open_log(group(1)).unwrap();
    assert_eq!(entries(&log)[..written.len()], written);
    assert!(again.damaged().is_empty());
}

#[test]
fn a_flush_that_finds_no_room_is_tried_again() {
    let disk = FaultyDisk::new();
    let storage = open_with(&disk, |config| config.reserve_bytes = Some(0));
    let log = storage.open_log(group(1)).unwrap();
    for path_contains in [".log", ".raft", "checkpoint.new"] {
        let (operation, error) = (Operation::Write, ErrorKind::StorageFull);
        disk.inject(Fault {
            operation,
            path_contains,
            after: 0,
            error,
        });
        let before = storage.stats().flush_retries;
        eventually("the flusher meets the full disk and tries again", || {
            let _ = append_next(&log, 300);
            storage.stats().flush_retries > before
        });
        disk.clear_faults();
        eventually("records are taken again", || append_next(&log, 10).is_ok());
        eventually("the WAL is emptied", || {
            let _ = append_next(&log, 300);
            storage.stats().wal_files <= 4
        });
    }
    let expected = entries(&log);
    storage.close().unwrap();
    let again = open(&disk.crash(&mut || false));
    assert_eq!(entries(&again.open_log(group(1)).unwrap()), expected);
}

/// A closed storage with two logs of several segments each.
fn closed() -> FaultyDisk {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    for id in [1, 2] {
        let log = storage.open_log(group(id)).unwrap();
        (0..40).for_each(|_| drop(append_next(&log, 300).unwrap()));
        log.roll().unwrap();
    }
    storage.close().unwrap();
    drop(storage);
    disk.crash(&mut || false)
}

fn read_all(log: &PartitionLog) -> Result<Vec<Bytes>, StorageError> {
    log.read(Offset(0), log.log_end_offset(), usize::MAX)
}

#[test]
fn what_the_disk_cannot_read_is_told_and_the_rest_goes_on() {
    let disk = closed();
    let storage = open(&disk);
    let (log, other) = (
        storage.open_log(group(1)).unwrap(),
        storage.open_log(group(2)).unwrap(),
    );
    let second = log.segments()[1].base_offset;
    disk.inject(Fault {
        operation: Operation::Read,
        path_contains: "/1/00000000000000000000.log",
        after: 0,
        error: ErrorKind::Other,
    });
    assert!(storage.damaged().is_empty());
    let error = read_all(&log).unwrap_err();
    assert!(error.is_damage());
    assert!(
        matches!(&error, StorageError::Corrupt { file, position: 0, .. } if file.ends_with("1/00000000000000000000.log")),
        "{error}"
    );
    let damage = log.damage().unwrap();
    assert_eq!(
        (damage.group, &*damage.why),
        (group(1), "the disk cannot read it")
    );
    assert_eq!(storage.damaged(), vec![damage]);
    assert_eq!(storage.stats().damaged_logs, 1);
    assert!(
        !log.read(second, log.log_end_offset(), usize::MAX)
            .unwrap()
            .is_empty()
    );
    append_next(&log, 10).unwrap();
    assert_eq!(read_all(&other).unwrap().len(), 40);
    assert_eq!(other.damage(), None);
}

#[test]
fn a_log_whose_file_is_missing_or_short_is_opened_as_damaged_and_repaired_by_an_install() {
    let disk = closed();
    for path in paths_with(&disk, "/1/") {
        let is_index = path.to_string_lossy().ends_with("index");
        for is_gone in [true, false] {
            // After an orderly end and after a crash.
            for is_clean in [true, false] {
                let disk = disk.copy();
                if !is_clean {
                    let storage = open(&disk);
                    append_next(&storage.open_log(group(2)).unwrap(), 10).unwrap();
                }
                let content = disk.content(&path).unwrap();
                match is_gone {
                    true => Disk::remove_file(&disk, &path).unwrap(),
                    false => disk.set_content(&path, content[..content.len() / 2].to_vec()),
                }
                let storage = open(&disk);
                let log = storage.open_log(group(1)).unwrap();
                let other = storage.open_log(group(2)).unwrap();
                assert!(read_all(&other).unwrap().len() >= 40);
                assert_eq!(storage.damaged().is_empty(), is_index, "{}", path.display());
                if is_index {
                    assert_eq!(read_all(&log).unwrap().len(), 40);
                    continue;
                }
                assert_eq!(log.damage().unwrap().file, path);
                assert!(read_all(&log).unwrap_err().is_damage());
                // It goes on at its end, and nothing is written behind the hole.
                append_next(&log, 10).unwrap();
                log.roll().unwrap();
                assert_eq!(log.read(Offset(40), Offset(41), 1).unwrap().len(), 1);
                assert!(log.export(40).is_err() || read_all(&log).is_err());
                repair(&storage, &log, &other);
            }
        }
    }
}

/// Takes over the content of another log, as of a peer.
fn repair(storage: &Storage, log: &PartitionLog, peer: &PartitionLog) {
    let last = peer.last_entry_id().unwrap().0;
    peer.set_committed(last);
    let export = peer.export(last).unwrap();
    let installer = storage
        .install(log.group_id(), export.manifest().clone())
        .unwrap();
    for (number, segment) in export.manifest().segments.iter().enumerate() {
        for file in [
            chronik_storage::SegmentFile::Log,
            chronik_storage::SegmentFile::Sidecar,
        ] {
            let size = segment.file_bytes(file) as usize;
            let bytes = export.read_chunk(number, file, 0, size).unwrap();
            installer.write(number, file, 0, &bytes).unwrap();
        }
    }
    installer.commit(Bytes::new()).unwrap();
    assert_eq!(log.damage(), None);
    assert!(storage.damaged().is_empty());
    assert_eq!(read_all(log).unwrap(), read_all(peer).unwrap());
}

#[test]
fn the_scrub_finds_any_flipped_bit_of_sealed_segments() {
    let disk = closed();
    let scrubbing = |disk: &FaultyDisk| {
        open_with(disk, |config| {
            config.scrub_bytes_per_second = u64::MAX;
            config.scrub_interval = Duration::from_millis(1);
        })
    };
    let storage = scrubbing(&disk);
    eventually("several passes", || storage.stats().scrub_passes >= 2);
    assert!(storage.stats().scrubbed_bytes > 20_000);
    assert!(storage.damaged().is_empty());
    drop(storage);
    for path in paths_with(&disk, "/2/") {
        if path.to_string_lossy().ends_with("index") {
            continue;
        }
        let whole = disk.content(&path).unwrap();
        for bit in (0..whole.len() * 8).step_by(997) {
            let disk = disk.copy();
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            disk.set_content(&path, damaged);
            let storage = scrubbing(&disk);
            eventually("the damage is found", || !storage.damaged().is_empty());
            assert_eq!(storage.damaged()[0].group, group(2));
            let log = storage.open_log(group(2)).unwrap();
            assert!(read_all(&log).unwrap_err().is_damage());
        }
    }
}

#[test]
fn the_scrub_keeps_to_its_rate_and_ends_at_once() {
    let disk = closed();
    let storage = open_with(&disk, |config| {
        // So low that it would now pause for ten seconds.
        config.scrub_bytes_per_second = 100;
        config.scrub_interval = Duration::from_millis(1);
    });
    eventually("it has begun", || storage.stats().scrubbed_bytes > 0);
    let (started, before) = (std::time::Instant::now(), storage.stats().scrubbed_bytes);
    assert!(before <= 8000, "one segment at most: {before}");
    storage.close().unwrap();
    assert!(started.elapsed() < Duration::from_secs(8));
}

#[test]
fn a_failed_fsync_of_files_that_are_taken_in_stops_the_storage() {
    let source = closed();
    let storage = open(&source);
    let peer = storage.open_log(group(1)).unwrap();
    let export = peer.export(peer.committed().unwrap()).unwrap();
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let installer = storage
        .install(group(1), export.manifest().clone())
        .unwrap();
    for (number, segment) in export.manifest().segments.iter().enumerate() {
        for file in [
            chronik_storage::SegmentFile::Log,
            chronik_storage::SegmentFile::Sidecar,
        ] {
            let size = segment.file_bytes(file) as usize;
            let bytes = export.read_chunk(number, file, 0, size).unwrap();
            installer.write(number, file, 0, &bytes).unwrap();
        }
    }
    let (operation, error) = (Operation::Sync, ErrorKind::Other);
    disk.inject(Fault {
        operation,
        path_contains: ".log",
        after: 0,
        error,
    });
    let poisoned = |result| matches!(result, Err(StorageError::Poisoned { .. }));
    assert!(poisoned(installer.check_segment(0)));
    // A second fsync would succeed, and say nothing.
    disk.clear_faults();
    assert!(poisoned(installer.check_segment(0)));
    assert!(poisoned(installer.commit(Bytes::new())));
    assert!(poisoned(storage.close()));
}
