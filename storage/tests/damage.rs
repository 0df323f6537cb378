//! Torn writes, failing disks and flipped bits: what was confirmed is found or the damage is named;
//! nothing panics, nothing damaged is served.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

use std::future::Future;
use std::io::ErrorKind;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::disk::faulty::{Fault, Operation};
use chronik_storage::{LogEntry, OpenError, PartitionLog, StorageError};
use chronik_types::offset::Offset;
use common::*;

const FIRST_WAL: &str = "wal/00000000000000000001.wal";

/// A disk with three confirmed appends in the first WAL file, and where each frame ends.
fn three_frames() -> (FaultyDisk, Vec<LogEntry>, Vec<usize>) {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    let entries = vec![
        data(0, 1, 0, b"first"),
        data(1, 1, 1, b"second"),
        data(2, 1, 2, b"third"),
    ];
    let mut ends = Vec::new();
    for entry in &entries {
        append(&log, vec![entry.clone()]).unwrap();
        ends.push(disk.content(&in_dir(FIRST_WAL)).unwrap().len());
    }
    drop((storage, log));
    (disk.crash(&mut || false), entries, ends)
}

fn found(disk: &FaultyDisk) -> Vec<LogEntry> {
    let storage = open(disk);
    entries(&storage.open_log(group(1)).unwrap())
}

#[test]
fn a_tail_torn_at_any_byte_is_cut_off() {
    let (disk, expected, ends) = three_frames();
    let path = in_dir(FIRST_WAL);
    let whole = disk.content(&path).unwrap();
    for size in ends[1]..=ends[2] {
        for fill in [None, Some(0u8), Some(0xff)] {
            // The file ends here, or goes on with something else.
            let mut torn = whole[..size].to_vec();
            if let Some(fill) = fill {
                torn.resize(ends[2] + 700, fill);
            }
            let is_whole = torn.get(..ends[2]) == Some(&whole[..ends[2]]);
            let disk = disk.copy();
            disk.set_content(&path, torn);
            let count = if is_whole { 3 } else { 2 };
            assert_eq!(found(&disk), expected[..count], "torn at {size}");
            // The log goes on after the cut, and the cut stays where it was.
            let storage = open(&disk);
            let log = storage.open_log(group(1)).unwrap();
            let next = data(count as u64, 2, count as i64, b"next");
            append(&log, vec![next.clone()]).unwrap();
            drop((storage, log));
            let disk = disk.crash(&mut || false);
            let all: Vec<_> = expected[..count].iter().cloned().chain([next]).collect();
            assert_eq!(found(&disk), all);
        }
    }
}

#[test]
fn a_tail_with_any_bit_flipped_is_cut_off() {
    let (disk, expected, ends) = three_frames();
    let path = in_dir(FIRST_WAL);
    let whole = disk.content(&path).unwrap();
    for bit in ends[1] * 8..ends[2] * 8 {
        let mut torn = whole.clone();
        torn[bit / 8] ^= 1 << (bit % 8);
        let disk = disk.copy();
        disk.set_content(&path, torn);
        assert_eq!(found(&disk), expected[..2], "bit {bit}");
    }
}

#[test]
fn damage_before_the_last_frame_is_reported_and_nothing_is_cut() {
    let (disk, _, ends) = three_frames();
    let path = in_dir(FIRST_WAL);
    let whole = disk.content(&path).unwrap();
    for bit in 0..ends[1] * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let disk = disk.copy();
        disk.set_content(&path, damaged.clone());
        match try_open(&disk) {
            Err(OpenError::Corrupt {
                file,
                position,
                why,
            }) => {
                assert_eq!(file, path);
                assert!(position <= bit as u64 / 8, "{why}");
            }
            other => panic!("bit {bit}: {:?}", other.err()),
        }
        assert_eq!(disk.content(&path).unwrap(), damaged);
    }
}

#[test]
fn a_missing_or_emptied_wal_file_is_reported() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    // Three files, none of them recycled yet.
    for index in 0..20 {
        append(&log, vec![data(index, 1, index as i64, &[1; 300])]).unwrap();
    }
    drop((storage, log));
    let disk = disk.crash(&mut || false);
    let files = paths_with(&disk, ".wal");
    assert!(files.len() >= 2, "{files:?}");
    for file in &files[..files.len() - 1] {
        let disk = disk.copy();
        disk.set_content(file, Vec::new());
        assert!(matches!(try_open(&disk), Err(OpenError::Corrupt { .. })));
    }
    let disk = disk.copy();
    chronik_storage::Disk::remove_file(&disk, &files[0]).unwrap();
    assert!(matches!(try_open(&disk), Err(OpenError::Corrupt { .. })));
}

#[test]
fn what_an_earlier_use_left_in_a_recycled_file_is_never_taken_for_new() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    let mut expected = Vec::new();
    // Frames of one size: in a recycled file an old frame starts exactly where the new ones end.
    for index in 0..120 {
        let entry = data(index, 1, index as i64, &[index as u8; 400]);
        append(&log, vec![entry.clone()]).unwrap();
        log.set_committed(index);
        expected.push(entry);
        let crashed = disk.crash_copy();
        assert_eq!(found(&crashed), expected);
    }
    let newest = paths_with(&disk, ".wal").pop().unwrap();
    assert_eq!(
        disk.content(&newest).unwrap().len(),
        4096,
        "a recycled or prepared file"
    );
}

fn is_failed(storage: &chronik_storage::Storage) -> bool {
    let mut failed = pin!(storage.failed());
    let poll = failed
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()));
    matches!(poll, Poll::Ready(StorageError::Poisoned { .. }))
}

#[test]
fn a_failed_write_or_fsync_poisons_the_storage_for_good() {
    for (operation, error) in [
        (Operation::Write, ErrorKind::StorageFull),
        (Operation::Write, ErrorKind::Other),
        (Operation::Sync, ErrorKind::Other),
    ] {
        let disk = FaultyDisk::new();
        let storage = open(&disk);
        let log = storage.open_log(group(1)).unwrap();
        append(&log, vec![data(0, 1, 0, b"good")]).unwrap();
        assert!(!is_failed(&storage));
        disk.inject(Fault {
            operation,
            path_contains: ".wal",
            after: 0,
            error,
        });
        let answers: Vec<_> = (1..4)
            .filter_map(|index| {
                let (done, receiver) = callback();
                let sent = log.append(vec![data(index, 1, index as i64, b"bad")], done);
                sent.is_ok().then_some(receiver)
            })
            .collect();
        assert!(!answers.is_empty());
        for receiver in &answers {
            assert!(matches!(
                answer(receiver),
                Err(StorageError::Poisoned { .. })
            ));
        }
        // The disk works again; the storage must not.
        disk.clear_faults();
        assert!(is_failed(&storage));
        let poisoned = |result| matches!(result, Err(StorageError::Poisoned { .. }));
        assert!(poisoned(append(&log, vec![data(4, 1, 4, b"late")])));
        assert!(poisoned(vote(&log, b"v")));
        assert!(poisoned(truncate(&log, Some(0))));
        assert!(poisoned(storage.open_log(group(2)).map(drop)));
        assert!(poisoned(storage.delete_log(group(1))));
        assert!(poisoned(storage.close()));
        assert_eq!(log.durable_index(), Some(0));
        drop((storage, log));
        let after = found(&disk.crash(&mut || false));
        assert_eq!(after, vec![data(0, 1, 0, b"good")]);
    }
}

#[test]
fn what_a_failed_fsync_left_in_the_page_cache_is_made_durable_before_it_is_reported() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    let (operation, error) = (Operation::Sync, ErrorKind::Other);
    disk.inject(Fault {
        operation,
        path_contains: ".wal",
        after: 0,
        error,
    });
    assert!(append(&log, vec![data(0, 1, 0, b"x")]).is_err());
    disk.clear_faults();
    drop((storage, log));
    // The process restarts and sees the frame, though the kernel dropped it: a plain fsync would
    // now succeed without writing anything.
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    assert_eq!(log.durable_index(), Some(0));
    drop((storage, log));
    assert_eq!(found(&disk.crash(&mut || false)), vec![data(0, 1, 0, b"x")]);
}

#[test]
fn a_failure_while_flushing_or_checkpointing_poisons_and_loses_nothing() {
    for path_contains in [".log", ".raft", "checkpoint", "partitions", "/wal"] {
        for operation in [Operation::Write, Operation::Sync, Operation::Other] {
            let disk = FaultyDisk::new();
            let storage = open(&disk);
            let log = storage.open_log(group(1)).unwrap();
            let error = ErrorKind::Other;
            disk.inject(Fault {
                operation,
                path_contains,
                after: 3,
                error,
            });
            let mut confirmed = Vec::new();
            for index in 0..60 {
                let entry = data(index, 1, index as i64, &[1; 400]);
                if append(&log, vec![entry.clone()]).is_err() {
                    break;
                }
                confirmed.push(entry);
                log.set_committed(index);
            }
            let _ = storage.close();
            disk.clear_faults();
            drop((storage, log));
            let found = found(&disk.crash(&mut || false));
            assert!(
                found.starts_with(&confirmed),
                "{path_contains} {operation:?}"
            );
        }
    }
}

/// A closed storage with several segments, and what is in it.
fn closed() -> (FaultyDisk, Vec<LogEntry>, Vec<Bytes>) {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    log.set_segment_bytes(9000);
    for index in 0..48 {
        let offset = log.log_end_offset().0;
        let entry = match index % 6 {
            0 => membership(index, 1, &[index as u8; 40]),
            1 => blank(index, 1),
            // The last is large, so that the offset index has entries.
            _ => batches(
                index,
                1,
                offset,
                &[(2, 50, &[1; 200]), (1, 60 + index as i64, b"x")],
            ),
        };
        append(&log, vec![entry]).unwrap();
    }
    vote(&log, b"vote").unwrap();
    log.set_committed(47);
    let all = entries(&log);
    let read = log
        .read(Offset(0), log.log_end_offset(), usize::MAX)
        .unwrap();
    storage.close().unwrap();
    drop((storage, log));
    (disk.crash(&mut || false), all, read)
}

/// Reads everything in every way; each answer must be right, or an error that names the damage.
fn read_all(log: &PartitionLog, all: &[LogEntry], read: &[Bytes]) -> usize {
    let mut errors = 0;
    let mut check = |result: Result<bool, StorageError>| match result {
        Ok(is_right) => assert!(is_right),
        Err(StorageError::Corrupt { .. } | StorageError::Io { .. }) => errors += 1,
        Err(error) => panic!("{error}"),
    };
    let end = log.log_end_offset();
    check(
        log.read(Offset(0), end, usize::MAX)
            .map(|found| found == read),
    );
    for offset in 0..end.0 {
        check(
            log.read(Offset(offset), end, 1)
                .map(|found| read.contains(&found[0])),
        );
    }
    let next = all.len() as u64;
    check(
        log.read_entries(0..next, usize::MAX)
            .map(|found| found == all),
    );
    for entry in all {
        let index = entry.index;
        check(
            log.read_entries(index..index + 1, 1)
                .map(|found| found[0] == *entry),
        );
        check(log.offset_at(index).map(|found| found.is_some()));
    }
    let time_of = |batch: &Bytes| i64::from_be_bytes(batch[35..43].try_into().unwrap());
    for time in [0, 55, 70, 90, 105, 200] {
        let expected = read.iter().find(|batch| time_of(batch) >= time);
        check(
            log.batch_for_timestamp(time, end)
                .map(|found| found.as_ref() == expected),
        );
    }
    check(
        log.max_timestamp_batch(end)
            .map(|found| found.as_ref() == read.last()),
    );
    errors
}

#[test]
fn flipped_bits_in_any_file_are_found_and_never_served() {
    let (disk, all, read) = closed();
    let mut found_kinds = std::collections::BTreeSet::new();
    for path in disk.paths() {
        let whole = disk.content(&path).unwrap();
        let kind = path
            .extension()
            .map_or("none".into(), |e| e.to_string_lossy().into_owned());
        found_kinds.insert(kind.clone());
        for bit in (0..whole.len() * 8).step_by(if whole.len() > 3000 { 61 } else { 13 }) {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let disk = disk.copy();
            disk.set_content(&path, damaged);
            let storage = match try_open(&disk) {
                Ok(storage) => storage,
                Err(OpenError::Corrupt { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            let log = storage.open_log(group(1)).unwrap();
            if log.last_entry_id().is_none() {
                panic!("the log is gone after bit {bit} of {}", path.display());
            }
            let errors = read_all(&log, &all, &read);
            match kind.as_str() {
                "log" | "raft" => assert!(errors > 0, "bit {bit} of {}", path.display()),
                _ => assert_eq!(errors, 0, "bit {bit} of {}", path.display()),
            }
        }
    }
    for kind in ["log", "raft", "index", "timeindex", "wal", "none"] {
        assert!(found_kinds.contains(kind), "{kind} in {found_kinds:?}");
    }
}

#[test]
fn segment_files_that_are_short_or_gone_are_found() {
    let (disk, all, read) = closed();
    for path in paths_with(&disk, "/1/") {
        for is_gone in [true, false] {
            let disk = disk.copy();
            match is_gone {
                true => chronik_storage::Disk::remove_file(&disk, &path).unwrap(),
                false => {
                    let mut content = disk.content(&path).unwrap();
                    content.truncate(content.len() / 2);
                    disk.set_content(&path, content);
                }
            }
            let storage = open(&disk);
            let log = storage.open_log(group(1)).unwrap();
            let errors = read_all(&log, &all, &read);
            let is_index = path.to_string_lossy().ends_with("index");
            assert_eq!(errors == 0, is_index, "{}", path.display());
        }
    }
}

#[test]
fn a_storage_without_its_checkpoint_does_not_open_as_an_empty_one() {
    let (disk, _, _) = closed();
    chronik_storage::Disk::remove_file(&disk, &in_dir("checkpoint")).unwrap();
    let error = try_open(&disk).err().unwrap();
    assert!(
        matches!(&error, OpenError::Corrupt { file, .. } if file == Path::new("/data/checkpoint"))
    );
}

#[test]
fn a_folder_is_used_by_one_storage_at_a_time() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    assert!(matches!(try_open(&disk), Err(OpenError::Locked { .. })));
    let id = storage.storage_id();
    drop(storage);
    assert_eq!(open(&disk).storage_id(), id);
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let mut config = small_config();
    config.wal_files_max = 0;
    let opened = chronik_storage::Storage::open(config, std::sync::Arc::new(FaultyDisk::new()));
    assert!(matches!(opened, Err(OpenError::InvalidConfig { .. })));
}
