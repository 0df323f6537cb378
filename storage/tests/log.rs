//! What a partition's log promises while all goes well: order, reading across memory and segments,
//! lookups, restart.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

use bytes::Bytes;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::{Payload, StorageError};
use chronik_types::offset::Offset;
use common::*;

#[test]
fn entries_come_back_after_a_crash_and_after_a_close() {
    let disk = FaultyDisk::new();
    let expected = vec![
        membership(0, 0, &[9; 70]),
        blank(1, 1),
        data(2, 1, 0, b"a"),
        data(3, 2, 1, b"b"),
    ];
    {
        let storage = open(&disk);
        let log = storage.open_log(group(7)).unwrap();
        append(&log, expected.clone()).unwrap();
        vote(&log, b"vote").unwrap();
        assert_eq!(log.durable_index(), Some(3));
    }
    for close in [false, true, true, false] {
        let disk = disk.crash(&mut || false);
        let storage = open(&disk);
        assert_eq!(storage.group_ids(), vec![group(7)]);
        let log = storage.open_log(group(7)).unwrap();
        assert_eq!(entries(&log), expected);
        assert_eq!(log.vote(), Some(Bytes::from_static(b"vote")));
        assert_eq!(log.log_end_offset(), Offset(2));
        assert_eq!(log.last_entry_id(), Some((3, 2)));
        log.set_committed(3);
        if close {
            storage.close().unwrap();
            assert!(matches!(
                append(&log, vec![blank(4, 2)]),
                Err(StorageError::Closed)
            ));
            drop((storage, log));
            let storage = open(&disk.crash(&mut || false));
            let log = storage.open_log(group(7)).unwrap();
            assert_eq!(entries(&log), expected);
            assert_eq!(log.committed(), Some(3));
            assert_eq!(log.vote(), Some(Bytes::from_static(b"vote")));
        }
    }
}

#[test]
fn entries_that_do_not_continue_the_log_are_refused() {
    let storage = open(&FaultyDisk::new());
    let log = storage.open_log(group(1)).unwrap();
    append(&log, vec![blank(5, 1), data(6, 1, 0, b"x")]).unwrap();
    assert_eq!(log.first_index(), 5);
    let refused = |entries| match append(&log, entries) {
        Err(StorageError::OutOfOrder { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(vec![blank(8, 1)]), "index");
    assert_eq!(refused(vec![blank(6, 1)]), "index");
    assert_eq!(refused(vec![blank(7, 1), blank(9, 1)]), "index");
    assert_eq!(refused(vec![data(7, 1, 2, b"x")]), "offset");
    assert_eq!(
        refused(vec![data(7, 1, 1, b"x"), data(8, 1, 3, b"x")]),
        "offset"
    );
    let mut short = data(7, 1, 1, b"xyz");
    if let Payload::Batches { bytes, .. } = &mut short.payload {
        *bytes = bytes.slice(..bytes.len() - 1);
    }
    assert!(matches!(
        append(&log, vec![short]),
        Err(StorageError::InvalidEntry { .. })
    ));
    append(&log, vec![data(7, 1, 1, b"x")]).unwrap();
    assert_eq!(entries(&log).len(), 3);
}

#[test]
fn truncation_stops_at_what_is_committed_and_survives() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    append(&log, (0..6).map(|i| data(i, 1, i as i64, b"old")).collect()).unwrap();
    log.set_committed(2);
    assert!(matches!(
        truncate(&log, Some(1)),
        Err(StorageError::TruncatesCommitted { committed: 2, .. })
    ));
    assert!(matches!(
        truncate(&log, None),
        Err(StorageError::TruncatesCommitted { .. })
    ));
    truncate(&log, Some(3)).unwrap();
    assert_eq!(log.last_entry_id(), Some((3, 1)));
    assert_eq!(log.log_end_offset(), Offset(4));
    append(&log, vec![blank(4, 2), data(5, 2, 4, b"new")]).unwrap();
    let starts: Vec<_> = log
        .term_starts()
        .iter()
        .map(|s| (s.term, s.first_index, s.first_offset.0))
        .collect();
    assert_eq!(starts, vec![(1, 0, 0), (2, 4, 4)]);
    let expected = entries(&log);
    drop((storage, log));
    let storage = open(&disk.crash(&mut || false));
    let log = storage.open_log(group(1)).unwrap();
    assert_eq!(entries(&log), expected);
    assert_eq!(log.term_starts().len(), 2);
}

/// Writes `count` entries of several batches, all committed, in terms of ten entries each.
fn fill(log: &chronik_storage::PartitionLog, count: u64) -> Vec<Bytes> {
    let mut offset = log.log_end_offset().0;
    let mut all = Vec::new();
    for index in 0..count {
        let term = 1 + index / 10;
        let time = 1000 + (index as i64) * 10;
        let entry = match index % 5 {
            0 => blank(index, term),
            1 => membership(index, term, &vec![index as u8; index as usize % 60]),
            _ => batches(
                index,
                term,
                offset,
                &[(2, time, &[1; 90]), (3, time - 500, &[2; 130])],
            ),
        };
        if let Payload::Batches {
            bytes, next_offset, ..
        } = &entry.payload
        {
            offset = next_offset.0;
            let first = bytes.len() - (61 + 130);
            all.extend([bytes.slice(..first), bytes.slice(first..)]);
        }
        append(log, vec![entry]).unwrap();
        log.set_committed(index);
    }
    all
}

fn check_reads(log: &chronik_storage::PartitionLog, all: &[Bytes]) {
    let end = log.log_end_offset();
    let first_of = |batch: &Bytes| i64::from_be_bytes(batch[..8].try_into().unwrap());
    for from in (0..end.0).step_by(3) {
        let at = all
            .iter()
            .rposition(|batch| first_of(batch) <= from)
            .unwrap();
        let read = log.read(Offset(from), end, 1).unwrap();
        assert_eq!(read, all[at..=at].to_vec());
        let read = log.read(Offset(from), end, usize::MAX).unwrap();
        assert_eq!(read, all[at..].to_vec());
        let limit = Offset(from + 6);
        let read = log.read(Offset(from), limit, usize::MAX).unwrap();
        let below = all[at..].iter().take_while(|batch| {
            let records = i32::from_be_bytes(batch[57..61].try_into().unwrap());
            first_of(batch) + i64::from(records) <= limit.0
        });
        assert_eq!(read, below.cloned().collect::<Vec<_>>());
    }
    assert_eq!(log.read(end, end, 1).unwrap(), Vec::<Bytes>::new());
    for outside in [-1, end.0 + 1] {
        let error = log.read(Offset(outside), end, 1).unwrap_err();
        assert!(matches!(error, StorageError::OffsetOutOfRange { .. }));
    }
}

fn check_times(log: &chronik_storage::PartitionLog, all: &[Bytes]) {
    let end = log.log_end_offset();
    let time_of = |batch: &Bytes| i64::from_be_bytes(batch[35..43].try_into().unwrap());
    let largest = all.iter().map(time_of).max().unwrap();
    for time in (0..=largest + 20).step_by(7) {
        let expected = all.iter().find(|batch| time_of(batch) >= time).cloned();
        assert_eq!(
            log.batch_for_timestamp(time, end).unwrap(),
            expected,
            "time {time}"
        );
    }
    let expected = all.iter().find(|batch| time_of(batch) == largest).cloned();
    assert_eq!(log.max_timestamp_batch(end).unwrap(), expected);
    assert_eq!(log.batch_for_timestamp(0, Offset(0)).unwrap(), None);
    assert_eq!(log.max_timestamp_batch(Offset(0)).unwrap(), None);
    let some = Offset(end.0 / 2);
    let first_half = all.iter().filter(|batch| {
        let base = i64::from_be_bytes(batch[..8].try_into().unwrap());
        base + i64::from(i32::from_be_bytes(batch[57..61].try_into().unwrap())) <= some.0
    });
    let largest = first_half.clone().map(time_of).max().unwrap();
    let expected = first_half
        .clone()
        .find(|batch| time_of(batch) == largest)
        .cloned();
    assert_eq!(log.max_timestamp_batch(some).unwrap(), expected);
}

#[test]
fn reads_and_lookups_are_the_same_from_memory_and_from_segments() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(3)).unwrap();
    let all = fill(&log, 100);
    let expected = entries(&log);
    let offsets: Vec<_> = (0..100)
        .map(|index| log.offset_at(index).unwrap())
        .collect();
    check_reads(&log, &all);
    check_times(&log, &all);
    assert!(
        log.read_cached(Offset(0), log.log_end_offset(), 1)
            .is_some()
    );
    storage.close().unwrap();
    drop((storage, log));

    let storage = open(&disk);
    let log = storage.open_log(group(3)).unwrap();
    assert!(paths_with(&disk, ".log").len() > 3, "several segments");
    assert!(
        log.read_cached(Offset(0), log.log_end_offset(), 1)
            .is_none()
    );
    assert!(log.read_entries_cached(0..1, 1).is_none());
    assert_eq!(entries(&log), expected);
    assert_eq!(
        (0..100)
            .map(|i| log.offset_at(i).unwrap())
            .collect::<Vec<_>>(),
        offsets
    );
    assert_eq!(log.offset_at(100).unwrap(), None);
    assert_eq!(log.term_at(99).unwrap(), Some(10));
    assert_eq!(log.term_starts().len(), 10);
    check_reads(&log, &all);
    check_times(&log, &all);
    // Part in segments, part in memory.
    let next = log.log_end_offset().0;
    append(&log, vec![batches(100, 11, next, &[(4, 5000, b"tail")])]).unwrap();
    let Payload::Batches { bytes, .. } = &entries(&log)[100].payload else {
        panic!()
    };
    let all: Vec<_> = all.iter().cloned().chain([bytes.clone()]).collect();
    check_reads(&log, &all);
    check_times(&log, &all);
    assert_eq!(log.read_entries(98..101, usize::MAX).unwrap().len(), 3);
    let log_bytes: u64 = all.iter().map(|batch| batch.len() as u64).sum();
    assert_eq!(log.size_bytes(), log_bytes);
}

#[test]
fn segments_hold_exactly_the_batches() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(3)).unwrap();
    let all = fill(&log, 60);
    storage.close().unwrap();
    let mut bytes = Vec::new();
    for path in paths_with(&disk, "/3/")
        .iter()
        .filter(|path| path.extension().unwrap() == "log")
    {
        let name: i64 = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let content = disk.content(path).unwrap();
        assert_eq!(name, i64::from_be_bytes(content[..8].try_into().unwrap()));
        bytes.extend(content);
    }
    // What is little stays in the WAL.
    let all = all.concat();
    assert!(all.starts_with(&bytes));
    let left = all.len() - bytes.len();
    assert!(
        left < 4096 && bytes.len() > 4096,
        "{left} of {} bytes",
        all.len()
    );
}

#[test]
fn a_deleted_log_never_comes_back_and_its_group_can_be_used_again() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(3)).unwrap();
    fill(&log, 40);
    vote(&log, b"old").unwrap();
    storage.delete_log(group(3)).unwrap();
    storage.delete_log(group(4)).unwrap();
    assert!(matches!(
        append(&log, vec![blank(40, 9)]),
        Err(StorageError::Deleted(_))
    ));
    assert!(matches!(
        log.read(Offset(0), Offset(1), 1),
        Err(StorageError::Deleted(_))
    ));
    assert!(storage.group_ids().is_empty());
    let again = open(&disk.copy());
    assert!(again.group_ids().is_empty());
    let log = storage.open_log(group(3)).unwrap();
    assert_eq!((log.vote(), log.last_entry_id()), (None, None));
    append(&log, vec![data(0, 1, 0, b"new")]).unwrap();
    for close in [false, true] {
        if close {
            storage.close().unwrap();
        }
        let again = open(&disk.copy());
        let log = again.open_log(group(3)).unwrap();
        assert_eq!(entries(&log), vec![data(0, 1, 0, b"new")]);
        assert_eq!(log.vote(), None);
    }
}

#[test]
fn an_entry_larger_than_a_wal_file_is_kept() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    let expected = vec![
        data(0, 1, 0, b"small"),
        data(1, 1, 1, &vec![7; 20_000]),
        data(2, 1, 2, b"small"),
        data(3, 1, 3, &vec![8; 9_000]),
    ];
    for entry in &expected {
        append(&log, vec![entry.clone()]).unwrap();
    }
    let again = open(&disk.crash(&mut || false));
    let log = again.open_log(group(1)).unwrap();
    assert_eq!(entries(&log), expected);
    log.set_committed(3);
    again.close().unwrap();
}

#[test]
fn the_wal_stays_small_and_idle_logs_with_few_bytes_have_no_files() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let idle = storage.open_log(group(100)).unwrap();
    append(&idle, vec![membership(0, 0, b"abc"), blank(1, 1)]).unwrap();
    vote(&idle, b"v").unwrap();
    idle.set_committed(1);
    let log = storage.open_log(group(1)).unwrap();
    for index in 0..400 {
        append(&log, vec![data(index, 1, index as i64, &[1; 400])]).unwrap();
        log.set_committed(index);
    }
    // 180 KiB went through a WAL of 4 KiB files.
    eventually("old WAL files are recycled", || {
        paths_with(&disk, ".wal").len() <= 8
    });
    assert!(paths_with(&disk, "/100/").is_empty());
    let again = open(&disk.crash(&mut || false));
    let log = again.open_log(group(1)).unwrap();
    assert_eq!(entries(&log).len(), 400);
    let idle = again.open_log(group(100)).unwrap();
    assert_eq!(entries(&idle), vec![membership(0, 0, b"abc"), blank(1, 1)]);
    assert_eq!(idle.vote(), Some(Bytes::from_static(b"v")));
    assert_eq!(idle.committed(), Some(1));
}

#[test]
fn memory_stays_within_its_budget_and_too_much_uncommitted_data_is_refused() {
    let storage = open(&FaultyDisk::new());
    let log = storage.open_log(group(1)).unwrap();
    for index in 0..300 {
        // The flusher may be behind, since the budget is small.
        eventually("flushing makes room", || {
            append(&log, vec![data(index, 1, index as i64, &[1; 20_000])]).is_ok()
        });
        log.set_committed(index);
        // Copies go a moment after they may.
        assert!(storage.memory_bytes() < 2 << 20);
    }
    eventually("copies of flushed entries are dropped", || {
        storage.memory_bytes() <= 1 << 20
    });
    eventually("nothing waits for its commit", || !log.is_overloaded());
    // Entries that bring the commit of earlier ones are taken, whatever waits.
    let mut index = 300;
    for _ in 0..60 {
        eventually("the flusher makes room of what is committed", || {
            append(&log, vec![data(index, 1, index as i64, &[1; 20_000])]).is_ok()
        });
        index += 1;
    }
    // A log that has nothing to commit waits for the others.
    let other = storage.open_log(group(2)).unwrap();
    assert!(other.is_overloaded());
    let refused = append(&other, vec![data(0, 1, 0, &[1; 20_000])]);
    assert!(matches!(refused, Err(StorageError::Overloaded { .. })));
    append(&log, vec![blank(index, 2)]).unwrap();
    assert!(storage.memory_bytes() < 2 << 20);
    log.set_committed(index);
    eventually("committed data makes room again", || {
        append(&other, vec![data(0, 1, 0, &[1; 20_000])]).is_ok()
    });
    assert_eq!(entries(&log).len() as u64, index + 1);
}

#[test]
fn the_replica_state_that_comes_back_is_never_ahead_of_the_log() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    append(&log, (0..5).map(|i| data(i, 1, i as i64, b"x")).collect()).unwrap();
    log.set_committed(4);
    log.save_replica_state(3, Bytes::from_static(b"three"));
    log.save_replica_state(9, Bytes::from_static(b"ahead"));
    assert_eq!(log.replica_state(), Some((9, Bytes::from_static(b"ahead"))));
    storage.close().unwrap();
    let again = open(&disk.crash(&mut || false));
    let log = again.open_log(group(1)).unwrap();
    assert_eq!(log.replica_state(), Some((3, Bytes::from_static(b"three"))));
}
