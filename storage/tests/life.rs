//! The life of a log: what is purged, expires, is rolled and deleted, and what that gives back.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

use std::path::PathBuf;

use bytes::Bytes;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::{PartitionLog, Payload, Purged, SegmentState, Storage, StorageError};
use chronik_types::offset::Offset;
use common::*;

fn purge(log: &PartitionLog, index: u64) -> Result<(), StorageError> {
    let (done, receiver) = callback();
    log.purge(index, done)?;
    answer(&receiver)
}

fn set_log_start(log: &PartitionLog, offset: i64) -> Result<(), StorageError> {
    let (done, receiver) = callback();
    log.set_log_start(Offset(offset), done)?;
    answer(&receiver)
}

/// Entry i (from 0) has offsets 2i and 2i + 1 and time 1000 + 10i; all are committed.
fn fill(log: &PartitionLog, range: std::ops::Range<u64>) {
    for index in range {
        let body = [index as u8; 300];
        let time = 1000 + 10 * index as i64;
        let entry = batches(index, 1 + index / 10, 2 * index as i64, &[(2, time, &body)]);
        append(log, vec![entry]).unwrap();
        log.set_committed(index);
    }
}

fn log_files(disk: &FaultyDisk, group_id: u64) -> usize {
    let paths = paths_with(disk, &format!("/{group_id}/"));
    paths
        .iter()
        .filter(|path| path.extension().unwrap() == "log")
        .count()
}

fn base_offsets(batches: &[Bytes]) -> Vec<i64> {
    let base = |batch: &Bytes| i64::from_be_bytes(batch[..8].try_into().unwrap());
    batches.iter().map(base).collect()
}

#[test]
fn purged_entries_are_hidden_from_raft_and_their_records_stay() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    fill(&log, 0..30);
    assert!(matches!(
        purge(&log, 20),
        Err(StorageError::PurgeAheadOfState { .. })
    ));
    log.save_replica_state(25, Bytes::from_static(b"25"));
    assert!(matches!(
        purge(&log, 30),
        Err(StorageError::IndexOutOfRange { .. })
    ));
    purge(&log, 20).unwrap();
    purge(&log, 7).unwrap();
    let expected = Purged {
        index: 20,
        term: 3,
        next_offset: Offset(42),
    };
    let check = |log: &PartitionLog| {
        assert_eq!(log.purged(), Some(expected));
        assert_eq!(log.first_index(), 21);
        assert!(matches!(
            log.read_entries(20..22, 1 << 20),
            Err(StorageError::IndexOutOfRange {
                first_index: 21,
                ..
            })
        ));
        assert!(log.read_entries_cached(20..22, 1 << 20).is_none());
        assert_eq!(entries(log).len(), 9);
        assert_eq!(
            (log.term_at(19).unwrap(), log.term_at(20).unwrap()),
            (None, Some(3))
        );
        assert_eq!(log.offset_at(19).unwrap(), None);
        assert_eq!(log.offset_at(20).unwrap(), Some(Offset(42)));
        assert_eq!(log.offset_at(21).unwrap(), Some(Offset(44)));
        let read = log.read(Offset(0), Offset(60), usize::MAX).unwrap();
        assert_eq!(
            base_offsets(&read),
            (0..30).map(|i| 2 * i).collect::<Vec<_>>()
        );
        assert_eq!(log.index_of_offset(Offset(13)).unwrap(), Some(6));
        assert_eq!(log.replica_state(), Some((25, Bytes::from_static(b"25"))));
    };
    check(&log);
    // The state goes with the purge, whether there is a checkpoint or not.
    let again = open(&disk.crash_copy());
    check(&again.open_log(group(1)).unwrap());
    storage.close().unwrap();
    let again = open(&disk.copy());
    check(&again.open_log(group(1)).unwrap());
}

#[test]
fn a_log_that_is_purged_to_its_end_goes_on_where_it_was() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    fill(&log, 0..5);
    log.save_replica_state(4, Bytes::from_static(b"4"));
    purge(&log, 4).unwrap();
    set_log_start(&log, 10).unwrap();
    for close in [false, true, false] {
        let disk = disk.crash_copy();
        let storage = open(&disk);
        let log = storage.open_log(group(1)).unwrap();
        assert_eq!(log.last_entry_id(), Some((4, 1)));
        assert_eq!((log.committed(), log.durable_index()), (Some(4), Some(4)));
        assert_eq!(
            (log.log_start_offset(), log.log_end_offset()),
            (Offset(10), Offset(10))
        );
        assert!(log.segments().is_empty());
        let refused = append(&log, vec![blank(9, 2)]);
        assert!(matches!(refused, Err(StorageError::OutOfOrder { .. })));
        fill(&log, 5..8);
        if close {
            storage.close().unwrap();
        }
        let again = open(&disk.crash_copy());
        let log = again.open_log(group(1)).unwrap();
        assert_eq!(entries(&log).len(), 3);
        let read = log.read(Offset(10), Offset(16), usize::MAX).unwrap();
        assert_eq!(base_offsets(&read), vec![10, 12, 14]);
    }
}

#[test]
fn nothing_is_read_below_the_log_start_and_whole_segments_go() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    fill(&log, 0..60);
    log.roll().unwrap();
    let before = log.segments();
    assert!(before.len() >= 4, "{before:?}");
    assert!(before.iter().all(|part| part.state == SegmentState::Sealed));
    assert_eq!(before[1].base_offset, before[0].next_offset);
    assert_eq!(before[0].first_timestamp, 1000);
    assert_eq!(
        before[0].max_timestamp,
        1000 + 10 * before[0].last_index as i64
    );
    let size = log.size_bytes();
    // In the middle of a segment, and of a batch.
    let start = before[2].base_offset.0 + 3;
    let check = |log: &PartitionLog| {
        assert_eq!(log.log_start_offset(), Offset(start));
        for below in [0, start - 1] {
            let error = log.read(Offset(below), Offset(120), 1).unwrap_err();
            assert!(
                matches!(error, StorageError::OffsetOutOfRange { log_start_offset, .. } if log_start_offset == Offset(start))
            );
            assert!(log.read_cached(Offset(below), Offset(120), 1).is_none());
            assert_eq!(log.index_of_offset(Offset(below)).unwrap(), None);
        }
        let read = log.read(Offset(start), Offset(120), usize::MAX).unwrap();
        assert_eq!(base_offsets(&read)[0], start - 1);
        // The batch that holds the log start is the first that a lookup may find.
        let found = log.batch_for_timestamp(0, Offset(120)).unwrap().unwrap();
        assert_eq!(base_offsets(&[found])[0], start - 1);
        let next = Offset(start + 1);
        let found = log
            .batch_for_timestamp_from(next, 0, Offset(120))
            .unwrap()
            .unwrap();
        assert_eq!(base_offsets(&[found])[0], start + 1);
        let found = log.max_timestamp_batch(Offset(120)).unwrap().unwrap();
        assert_eq!(base_offsets(&[found])[0], 118);
    };
    set_log_start(&log, start).unwrap();
    set_log_start(&log, 1).unwrap();
    check(&log);
    // Raft may still want the entries.
    assert_eq!(log_files(&disk, 1), before.len());
    assert_eq!(entries(&log).len(), 60);
    check(&open(&disk.crash_copy()).open_log(group(1)).unwrap());
    log.save_replica_state(59, Bytes::new());
    purge(&log, before[2].last_index - 1).unwrap();
    eventually("the first two segments are deleted", || {
        log_files(&disk, 1) == before.len() - 2
    });
    assert_eq!(log.segments()[..], before[2..]);
    assert!(log.size_bytes() < size);
    check(&log);
    for crash in [true, false] {
        let disk = if crash {
            disk.crash_copy()
        } else {
            disk.copy()
        };
        let again = open(&disk);
        check(&again.open_log(group(1)).unwrap());
        // Those that no checkpoint names are in the WAL again.
        assert!(log_files(&disk, 1) <= before.len() - 2);
    }
    // All of it, the active segment too.
    fill(&log, 60..62);
    log.save_replica_state(61, Bytes::new());
    purge(&log, 61).unwrap();
    set_log_start(&log, 124).unwrap();
    eventually("nothing is left", || {
        log_files(&disk, 1) == 0 && log.segments().is_empty()
    });
    assert_eq!(log.size_bytes(), 0);
    storage.close().unwrap();
    let disk = disk.crash(&mut || false);
    assert!(paths_with(&disk, "/1/").is_empty());
    let again = open(&disk);
    let log = again.open_log(group(1)).unwrap();
    fill(&log, 62..64);
    assert_eq!(log.log_end_offset(), Offset(128));
}

#[test]
fn an_idle_tail_that_is_in_the_wal_only_expires_without_ever_having_a_file() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let idle = storage.open_log(group(1)).unwrap();
    fill(&idle, 0..3);
    let parts = idle.segments();
    assert_eq!(parts.len(), 1);
    assert_eq!(parts[0].state, SegmentState::Unflushed);
    assert_eq!(
        (parts[0].base_offset, parts[0].next_offset),
        (Offset(0), Offset(6))
    );
    assert_eq!(
        (parts[0].first_timestamp, parts[0].max_timestamp),
        (1000, 1020)
    );
    assert!(parts[0].created_ms > 1_000_000_000_000 && parts[0].created_ms <= parts[0].appended_ms);
    idle.save_replica_state(2, Bytes::new());
    set_log_start(&idle, 4).unwrap();
    purge(&idle, 2).unwrap();
    eventually("two of three entries are gone", || {
        idle.segments()[0].first_index == 2
    });
    assert_eq!(
        base_offsets(&idle.read(Offset(4), Offset(6), 1).unwrap()),
        vec![4]
    );
    set_log_start(&idle, 6).unwrap();
    eventually("nothing is left", || idle.segments().is_empty());
    assert_eq!(storage.memory_bytes(), 0);
    assert!(paths_with(&disk, "/1/").is_empty());
    // The WAL forgets it too.
    let busy = storage.open_log(group(2)).unwrap();
    fill(&busy, 0..100);
    storage.close().unwrap();
    let again = open(&disk.crash(&mut || false));
    let idle = again.open_log(group(1)).unwrap();
    assert_eq!(
        (idle.log_start_offset(), idle.log_end_offset()),
        (Offset(6), Offset(6))
    );
    assert!(idle.segments().is_empty());
    fill(&idle, 3..4);
    idle.roll().unwrap();
    assert_eq!(idle.segments()[0].base_offset, Offset(6));
    assert_eq!(
        base_offsets(&idle.read(Offset(6), Offset(8), 1).unwrap()),
        vec![6]
    );
}

#[test]
fn a_rolled_log_goes_on_in_a_new_segment_also_after_a_restart() {
    let disk = FaultyDisk::new();
    let mut storage = open(&disk);
    for round in 0..4 {
        let log = storage.open_log(group(1)).unwrap();
        fill(&log, 3 * round..3 * round + 3);
        log.roll().unwrap();
        log.roll().unwrap();
        let parts = log.segments();
        assert_eq!(parts.len() as u64, round + 1);
        assert!(parts.iter().all(|part| part.state == SegmentState::Sealed));
        storage.close().unwrap();
        drop((storage, log));
        storage = open(&disk);
    }
    let log = storage.open_log(group(1)).unwrap();
    assert_eq!(entries(&log).len(), 12);
    let read = log.read(Offset(0), Offset(24), usize::MAX).unwrap();
    assert_eq!(
        base_offsets(&read),
        (0..12).map(|i| 2 * i).collect::<Vec<_>>()
    );
}

#[test]
fn control_entries_take_no_offset_and_come_back_from_memory_and_from_segments() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    let control = |index, size| chronik_storage::LogEntry {
        index,
        term: 1,
        payload: Payload::Control(Bytes::from(vec![index as u8; size])),
    };
    let expected = vec![
        data(0, 1, 0, b"a"),
        control(1, 9),
        data(2, 1, 1, b"b"),
        control(3, 0),
        control(4, 2000),
        data(5, 1, 2, b"c"),
    ];
    append(&log, expected.clone()).unwrap();
    let too_large = append(&log, vec![control(6, 70_000)]);
    assert!(matches!(too_large, Err(StorageError::TooLarge { .. })));
    assert_eq!(entries(&log), expected);
    assert_eq!(
        entries(&open(&disk.crash_copy()).open_log(group(1)).unwrap()),
        expected
    );
    log.set_committed(5);
    log.roll().unwrap();
    storage.close().unwrap();
    let again = open(&disk.crash(&mut || false));
    let log = again.open_log(group(1)).unwrap();
    assert!(log.read_entries_cached(0..6, 1).is_none());
    assert_eq!(entries(&log), expected);
    assert_eq!(log.log_end_offset(), Offset(3));
}

fn bytes_of(disk: &FaultyDisk, part: &str) -> usize {
    let sizes = paths_with(disk, part).into_iter();
    sizes
        .map(|path| disk.content(&path).map_or(0, |bytes| bytes.len()))
        .sum()
}

#[test]
fn a_deleted_log_gives_its_files_and_its_part_of_the_wal_back() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let other = storage.open_log(group(1)).unwrap();
    fill(&other, 0..2);
    let write = |storage: &Storage, group_id| {
        let log = storage.open_log(group(group_id)).unwrap();
        fill(&log, 0..200);
        log.roll().unwrap();
        assert!(bytes_of(&disk, &format!("/{group_id}/")) > 30_000);
        storage.delete_log(group(group_id)).unwrap();
        assert_eq!(bytes_of(&disk, &format!("/{group_id}/")), 0);
        assert!(matches!(log.roll(), Err(StorageError::Deleted(_))));
        // Another log's write may be needed to turn the WAL over.
        let next = other.last_entry_id().unwrap().0 + 1;
        fill(&other, next..next + 20);
    };
    write(&storage, 2);
    eventually("the WAL is small again", || {
        bytes_of(&disk, "/wal/") <= 8 * 4096
    });
    for group_id in 3..6 {
        write(&storage, group_id);
    }
    eventually("the WAL does not grow", || {
        bytes_of(&disk, "/wal/") <= 8 * 4096
    });
    let known = ["/wal/", "checkpoint", "/partitions/1/"];
    let mut others = paths_with(&disk, "/");
    others.retain(|path| {
        let path = path.to_string_lossy();
        !known.iter().any(|part| path.contains(part))
    });
    assert_eq!(others, Vec::<PathBuf>::new(), "nothing else is left");
    assert_eq!(storage.group_ids(), vec![group(1)]);
}
