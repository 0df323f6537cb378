//! A log's content on its way from one broker to another: nothing changes under an export, nothing
//! damaged is taken in, and a log is replaced as a whole or not at all.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

#[path = "../common/mod.rs"]
mod common;
mod restart;

use std::sync::Arc;

use bytes::Bytes;
use chronik_storage::disk::{FaultyDisk, RealDisk};
use chronik_storage::{
    Disk, Export, Installer, LogManifest, PartitionLog, Purged, SegmentFile, Storage,
    StorageConfig, StorageError,
};
use common::*;

const FILES: [SegmentFile; 2] = [SegmentFile::Log, SegmentFile::Sidecar];

fn pieces(export: &Export, segment: usize, file: SegmentFile) -> Vec<Bytes> {
    let mut out: Vec<Bytes> = Vec::new();
    loop {
        let position = out.iter().map(|piece| piece.len() as u64).sum();
        let piece = export.read_chunk(segment, file, position, 333).unwrap();
        if piece.is_empty() {
            return out;
        }
        out.push(piece);
    }
}

fn send_segment(export: &Export, installer: &Installer, segment: usize) {
    for file in FILES {
        let mut position = 0;
        for piece in pieces(export, segment, file) {
            assert_eq!(installer.received(segment, file), position);
            installer.write(segment, file, position, &piece).unwrap();
            position += piece.len() as u64;
        }
        assert_eq!(
            position,
            export.manifest().segments[segment].file_bytes(file)
        );
    }
}

fn send(export: &Export, storage: &Storage, group_id: u64) -> Installer {
    let manifest = LogManifest::decode(&export.manifest().encode()).unwrap();
    let installer = storage.install(group(group_id), manifest).unwrap();
    (0..export.manifest().segments.len())
        .for_each(|segment| send_segment(export, &installer, segment));
    installer
}

fn read_all(log: &PartitionLog) -> Vec<Bytes> {
    log.read(log.log_start_offset(), log.log_end_offset(), usize::MAX)
        .unwrap()
}

#[test]
fn a_log_arrives_as_it_was_up_to_any_of_its_entries() {
    let (_, _from, log) = replica(60, 3000);
    let all = read_all(&log);
    for upto in [59, 58, 57, 36, 35, 4, 1, 0] {
        let export = log.export(upto).unwrap();
        let end = log.offset_at(upto).unwrap().unwrap();
        let disk = FaultyDisk::new();
        let storage = open(&disk);
        let installed = storage.open_log(group(9)).unwrap();
        vote(&installed, b"mine").unwrap();
        send(&export, &storage, 9)
            .commit(Bytes::from_static(b"state"))
            .unwrap();
        let check = |log: &PartitionLog| {
            let term = 1 + upto / 7;
            assert_eq!(log.last_entry_id(), Some((upto, term)));
            assert_eq!(
                log.purged(),
                Some(Purged {
                    index: upto,
                    term,
                    next_offset: end
                })
            );
            assert_eq!(
                (log.committed(), log.durable_index()),
                (Some(upto), Some(upto))
            );
            assert_eq!((log.first_index(), log.log_end_offset()), (upto + 1, end));
            assert_eq!(log.vote(), Some(Bytes::from_static(b"mine")));
            assert_eq!(
                log.replica_state(),
                Some((upto, Bytes::from_static(b"state")))
            );
            assert_eq!(log.term_starts().last().unwrap().term, term);
            assert_eq!(read_all(log)[..], all[..read_all(log).len()]);
            let time = 9 + end.0 / 2;
            let found = log.batch_for_timestamp(time, end).unwrap();
            let time_of = |b: &Bytes| i64::from_be_bytes(b[35..43].try_into().unwrap());
            let expected = read_all(log)
                .into_iter()
                .find(|batch| time_of(batch) >= time);
            assert_eq!(found, expected);
        };
        check(&installed);
        // Also what the receiver sends on, and after a power failure.
        let again = installed.export(upto).unwrap();
        assert_eq!(again.manifest().next_offset, end);
        let crashed = open(&disk.crash_copy());
        let log = crashed.open_log(group(9)).unwrap();
        check(&log);
        fill_mixed(&log, upto + 1..upto + 20);
        crashed.close().unwrap();
        assert_eq!(entries(&log).len(), 19);
    }
    assert!(matches!(
        log.export(60),
        Err(StorageError::IndexOutOfRange { .. })
    ));
}

#[test]
fn a_flipped_bit_on_the_way_is_found_and_the_segment_can_be_sent_again() {
    let (_, _from, log) = replica(24, 3000);
    let export = log.export(23).unwrap();
    let storage = open(&FaultyDisk::new());
    let installer = send(&export, &storage, 1);
    for segment in 0..export.manifest().segments.len() {
        for file in FILES {
            let size = export.manifest().segments[segment].file_bytes(file);
            for bit in (0..size * 8).step_by(29) {
                let at = bit / 8;
                let byte = export.read_chunk(segment, file, at, 1).unwrap()[0];
                installer
                    .write(segment, file, at, &[byte ^ (1 << (bit % 8))])
                    .unwrap();
                let error = installer.check_segment(segment).unwrap_err();
                assert!(
                    matches!(error, StorageError::Corrupt { .. }),
                    "bit {bit}: {error}"
                );
                assert!(error.is_damage());
                assert_eq!(installer.received(segment, file), 0);
                send_segment(&export, &installer, segment);
            }
        }
        installer.check_segment(segment).unwrap();
    }
    let beyond = installer
        .write(0, SegmentFile::Log, u64::MAX, b"x")
        .unwrap_err();
    assert!(matches!(beyond, StorageError::InvalidManifest { .. }));
    installer.commit(Bytes::new()).unwrap();
    assert_eq!(
        read_all(&storage.open_log(group(1)).unwrap()),
        read_all(&log)
    );
}

#[test]
fn an_install_replaces_a_log_that_is_in_use_and_an_incomplete_one_changes_nothing() {
    let (_, _from, log) = replica(40, 3000);
    let export = log.export(39).unwrap();
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let old = storage.open_log(group(1)).unwrap();
    fill_mixed(&old, 0..12);
    old.roll().unwrap();
    // Uncommitted entries of an old leader.
    append(&old, vec![blank(12, 3), blank(13, 3)]).unwrap();
    let before = (entries(&old), read_all(&old), paths_with(&disk, "/1/"));
    let manifest = export.manifest().clone();
    let installer = storage.install(group(1), manifest.clone()).unwrap();
    send_segment(&export, &installer, 0);
    assert!(matches!(
        installer.commit(Bytes::new()),
        Err(StorageError::InvalidManifest { .. })
    ));
    let dropped = send(&export, &storage, 1);
    drop(dropped);
    assert_eq!(
        (entries(&old), read_all(&old), paths_with(&disk, "/1/")),
        before
    );
    let reader = old.export(11).unwrap();
    // In flight while the content changes.
    let (done, receiver) = callback();
    old.append(vec![blank(14, 3)], done).unwrap();
    send(&export, &storage, 1).commit(Bytes::new()).unwrap();
    answer(&receiver).unwrap();
    assert_eq!(old.last_entry_id(), Some((39, 6)));
    assert_eq!(read_all(&old), read_all(&log));
    // The old files are still read by somebody.
    let first = &before.2[0];
    assert!(disk.content(first).is_some());
    assert_eq!(
        pieces(&reader, 0, SegmentFile::Log).concat(),
        before.1.concat()
    );
    drop(reader);
    assert!(disk.content(first).is_none());
    fill_mixed(&old, 40..45);
    storage.close().unwrap();
    let again = open(&disk.crash(&mut || false));
    let log = again.open_log(group(1)).unwrap();
    assert_eq!((log.first_index(), entries(&log).len()), (40, 5));
}

#[test]
fn what_is_exported_stays_although_it_is_deleted() {
    let (disk, storage, log) = replica(60, 3000);
    log.roll().unwrap();
    let count = log.segments().len();
    let export = log.export(59).unwrap();
    let expected = read_all(&log);
    let first = paths_with(&disk, "/1/")[0].clone();
    log.save_replica_state(59, Bytes::new());
    let (done, receiver) = callback();
    log.set_log_start(log.log_end_offset(), done).unwrap();
    answer(&receiver).unwrap();
    let (done, receiver) = callback();
    log.purge(59, done).unwrap();
    answer(&receiver).unwrap();
    eventually("the segments leave the log", || log.segments().is_empty());
    let sent: Vec<Bytes> = (0..count)
        .map(|segment| pieces(&export, segment, SegmentFile::Log).concat().into())
        .collect();
    assert_eq!(sent.concat(), expected.concat());
    assert!(disk.content(&first).is_some());
    // An empty log can be sent too.
    let empty = log.export(59).unwrap();
    assert!(empty.manifest().segments.is_empty());
    send(&empty, &storage, 2).commit(Bytes::new()).unwrap();
    let copy = storage.open_log(group(2)).unwrap();
    assert_eq!(copy.last_entry_id(), Some((59, 9)));
    assert_eq!(copy.log_start_offset(), log.log_end_offset());
    drop(export);
    assert!(paths_with(&disk, "/1/").is_empty());
    fill_mixed(&copy, 60..64);
    let export = copy.export(63).unwrap();
    storage.delete_log(group(2)).unwrap();
    assert!(matches!(
        export.read_chunk(0, SegmentFile::Log, 0, 10),
        Err(StorageError::Deleted(_))
    ));
    assert!(paths_with(&disk, "/2/").is_empty());
}

#[test]
fn what_was_broken_off_goes_on_with_what_has_come() {
    let (_, _from, log) = replica(60, 3000);
    // The last segment of this one is the start of one of the other's.
    let (first, second) = (log.export(40).unwrap(), log.export(59).unwrap());
    let last = first.manifest().segments.len() - 1;
    let longer = second.manifest().segments[last];
    assert!(first.manifest().segments[last].is_start_of(&longer));
    assert_ne!(first.manifest().segments[last], longer);
    let sizes = |installer: &Installer| {
        let segments = 0..installer.manifest().segments.len();
        segments
            .map(|segment| FILES.map(|file| installer.received(segment, file)))
            .collect::<Vec<_>>()
    };
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let installer = storage.install(group(5), first.manifest().clone()).unwrap();
    send_segment(&first, &installer, 0);
    installer.check_segment(0).unwrap();
    let piece = &pieces(&first, 1, SegmentFile::Log)[0];
    installer.write(1, SegmentFile::Log, 0, piece).unwrap();
    send_segment(&first, &installer, last);
    installer.check_segment(last).unwrap();
    let came = sizes(&installer);
    let installer = installer.go_on(second.manifest().clone()).unwrap();
    assert_eq!(sizes(&installer)[..=last], came);
    assert!(
        sizes(&installer)[last + 1..]
            .iter()
            .all(|size| *size == [0, 0])
    );
    // It was checked as far as it went then.
    let error = installer.check_segment(last).unwrap_err();
    assert!(matches!(error, StorageError::InvalidManifest { .. }));
    // Back: what has more than is described now comes anew, the rest stays.
    let installer = installer.go_on(first.manifest().clone()).unwrap();
    assert_eq!(sizes(&installer)[..last], came[..last]);
    assert_eq!(sizes(&installer)[last], [0, 0]);
    let installer = installer.go_on(second.manifest().clone()).unwrap();
    for segment in 0..second.manifest().segments.len() {
        for file in FILES {
            let mut position = installer.received(segment, file);
            while let piece = second.read_chunk(segment, file, position, 333).unwrap()
                && !piece.is_empty()
            {
                installer.write(segment, file, position, &piece).unwrap();
                position += piece.len() as u64;
            }
        }
    }
    installer.commit(Bytes::new()).unwrap();
    let copy = storage.open_log(group(5)).unwrap();
    assert_eq!(read_all(&copy), read_all(&log));
    // Nothing stays of one that is let go after it went on.
    let installer = send(&first, &storage, 6);
    let installer = installer.go_on(second.manifest().clone()).unwrap();
    assert!(!paths_with(&disk, "/6/").is_empty());
    drop(installer);
    assert!(paths_with(&disk, "/6/").is_empty());
}

#[test]
fn what_is_left_of_a_deleted_log_touches_no_later_one() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let left = send(&export, &storage, 5);
    let names = paths_with(&disk, "/5/");
    storage.delete_log(group(5)).unwrap();
    assert!(paths_with(&disk, "/5/").is_empty());
    send(&export, &storage, 5).commit(Bytes::new()).unwrap();
    // Whoever knows a name of before finds nothing of the later log there.
    let files = paths_with(&disk, "/5/");
    assert!(files.iter().all(|file| !names.contains(file)), "{files:?}");
    let late = left.write(0, SegmentFile::Log, 0, b"late").unwrap_err();
    assert!(matches!(late, StorageError::Deleted(_)), "{late}");
    let refused = left.go_on(export.manifest().clone()).err().unwrap();
    assert!(matches!(refused, StorageError::Deleted(_)), "{refused}");
    assert_eq!(paths_with(&disk, "/5/"), files);
    storage.close().unwrap();
    let again = open(&disk.crash_copy());
    assert_eq!(read_all(&again.open_log(group(5)).unwrap()), read_all(&log));
}

#[test]
fn no_two_logs_of_a_group_have_a_file_of_one_name() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let mut seen = Vec::new();
    for _ in 0..3 {
        let log = storage.open_log(group(1)).unwrap();
        fill_mixed(&log, 0..10);
        log.roll().unwrap();
        let files = paths_with(&disk, "/1/");
        assert!(!files.is_empty());
        assert!(files.iter().all(|file| !seen.contains(file)), "{files:?}");
        seen.extend(files);
        storage.delete_log(group(1)).unwrap();
    }
}

#[test]
fn a_log_is_deleted_whoever_makes_and_removes_files_beside_it() {
    let (_, _from, log) = replica(60, 1000);
    let export = log.export(59).unwrap();
    // A folder that is gone takes no files.
    let folder = tempfile::tempdir().unwrap();
    let config = StorageConfig {
        dir: folder.path().to_owned(),
        ..small_config()
    };
    let storage = Storage::open(config, Arc::new(RealDisk)).unwrap();
    for _ in 0..50 {
        let begun = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let copy = scope.spawn(|| {
                let installer = send(&export, &storage, 5);
                begun.wait();
                for segment in 0..export.manifest().segments.len() {
                    // Its indexes are files too.
                    if installer.check_segment(segment).is_err() {
                        break;
                    }
                }
            });
            begun.wait();
            storage.delete_log(group(5)).unwrap();
            copy.join().unwrap();
        });
        assert!(!folder.path().join("partitions/5").exists());
    }
    storage.close().unwrap();
}
