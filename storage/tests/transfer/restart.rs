//! Copies that were under way when the process ended go on in the next one: what had come is not
//! written again, and whatever is found on the disk, a log gets the right bytes or none.

use std::path::PathBuf;

use chronik_storage::disk::faulty::{Fault, Operation};

use super::*;

const GROUP: u64 = 5;

/// Files of the group, by what they are.
fn files(disk: &FaultyDisk) -> Vec<PathBuf> {
    paths_with(disk, &format!("/{GROUP}/"))
}

fn descriptions(disk: &FaultyDisk) -> Vec<PathBuf> {
    let all = files(disk).into_iter();
    all.filter(|path| path.extension().is_some_and(|e| e == "copy"))
        .collect()
}

fn is_left(storage: &Storage) -> bool {
    storage.unfinished_copies().contains(&group(GROUP))
}

fn install(storage: &Storage, export: &Export) -> Installer {
    storage
        .install(group(GROUP), export.manifest().clone())
        .unwrap()
}

fn received(installer: &Installer) -> u64 {
    let segments = 0..installer.manifest().segments.len();
    let files = segments.flat_map(|segment| FILES.map(|file| (segment, file)));
    files
        .map(|(segment, file)| installer.received(segment, file))
        .sum()
}

/// A copy with a whole segment that was checked, a whole one that was not, and a part of a third.
fn half(storage: &Storage, export: &Export) -> Installer {
    let installer = install(storage, export);
    send_segment(export, &installer, 0);
    installer.check_segment(0).unwrap();
    send_segment(export, &installer, 1);
    let piece = &pieces(export, 2, SegmentFile::Log)[0];
    installer.write(2, SegmentFile::Log, 0, piece).unwrap();
    installer
}

/// Sends what has not come of a segment. Gives the bytes.
fn send_rest(export: &Export, installer: &Installer, segment: usize) -> u64 {
    let mut sent = 0;
    for file in FILES {
        let mut position = installer.received(segment, file);
        while let piece = export.read_chunk(segment, file, position, 333).unwrap()
            && !piece.is_empty()
        {
            installer.write(segment, file, position, &piece).unwrap();
            position += piece.len() as u64;
            sent += piece.len() as u64;
        }
    }
    sent
}

/// Sends what is missing; a segment that is found to be damaged, once more. Gives the bytes.
fn complete(export: &Export, installer: &Installer) -> u64 {
    let mut sent = 0;
    for segment in 0..export.manifest().segments.len() {
        sent += send_rest(export, installer, segment);
        if let Err(error) = installer.check_segment(segment) {
            assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
            sent += send_rest(export, installer, segment);
            installer.check_segment(segment).unwrap();
        }
    }
    sent
}

/// A copy that is half done, on a disk of its own.
fn begun(export: &Export) -> (FaultyDisk, Storage, Installer) {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let installer = half(&storage, export);
    (disk, storage, installer)
}

/// Goes on with what is left of a copy, if anything, until it is in force. Gives the bytes that were sent.
fn go_on(disk: &FaultyDisk, storage: Storage, export: &Export, log: &PartitionLog) -> u64 {
    let installer = install(&storage, export);
    let sent = complete(export, &installer);
    installer.commit(Bytes::new()).unwrap();
    check_in_force(disk, storage, log);
    sent
}

/// The log is the copy, now and after another start, and nothing else is on the disk.
fn check_in_force(disk: &FaultyDisk, storage: Storage, log: &PartitionLog) {
    let copy = storage.open_log(group(GROUP)).unwrap();
    assert_eq!(copy.last_entry_id(), log.last_entry_id());
    assert_eq!(read_all(&copy), read_all(log));
    assert!(!is_left(&storage));
    let names = files(disk);
    assert!(descriptions(disk).is_empty(), "{names:?}");
    // A start that cleans up finds nothing more to remove.
    let disk = disk.copy();
    let again = open(&disk);
    assert_eq!(files(&disk), names);
    assert_eq!(
        read_all(&again.open_log(group(GROUP)).unwrap()),
        read_all(log)
    );
}

#[test]
fn a_copy_goes_on_after_a_crash_with_what_had_come() {
    let (_, _from, log) = replica(60, 3000);
    // Whether something of the log is known from elsewhere or not.
    for has_log in [false, true] {
        let (first, second) = (log.export(40).unwrap(), log.export(59).unwrap());
        let disk = FaultyDisk::new();
        let storage = open(&disk);
        if has_log {
            let old = storage.open_log(group(GROUP)).unwrap();
            fill_mixed(&old, 0..4);
            old.roll().unwrap();
        }
        let installer = half(&storage, &first);
        let came = received(&installer);
        // Killed: all that was written is there. Once more before somebody goes on.
        let disk = disk.copy().copy();
        let killed = open(&disk);
        assert_eq!(killed.group_ids().len(), usize::from(has_log));
        let disk = disk.copy();
        drop((installer, storage, killed));
        let storage = open(&disk);
        assert!(is_left(&storage));
        // Another replica describes more of the log by now.
        let installer = install(&storage, &second);
        assert!(!is_left(&storage));
        assert_eq!(received(&installer), came);
        let disk = disk.copy();
        drop((installer, storage));
        // Under the new description it is found, too.
        let storage = open(&disk);
        let installer = install(&storage, &second);
        assert_eq!(received(&installer), came);
        let missing = second.manifest().total_bytes() - came;
        assert_eq!(complete(&second, &installer), missing);
        installer.commit(Bytes::from_static(b"state")).unwrap();
        check_in_force(&disk, storage, &log);
    }
}

#[test]
fn a_copy_goes_on_after_an_orderly_stop() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    // Let go of before the storage is closed, or after.
    for is_late in [false, true] {
        let disk = FaultyDisk::new();
        let storage = open(&disk);
        let mut installer = Some(half(&storage, &export));
        let came = installer.as_ref().map(received).unwrap();
        storage.leave_unfinished_copies();
        installer = installer.filter(|_| is_late);
        storage.close().unwrap();
        drop(installer);
        // Nobody asks for it before the next stop.
        let storage = open(&disk);
        assert!(is_left(&storage));
        storage.close().unwrap();
        let storage = open(&disk);
        let missing = export.manifest().total_bytes() - came;
        assert_eq!(go_on(&disk, storage, &export, &log), missing);
    }
}

#[test]
fn a_copy_that_lost_what_was_not_synced_gets_the_right_bytes() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    let mut left = 0;
    for seed in 0..60u64 {
        let (disk, storage, installer) = begun(&export);
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut keep = || {
            random ^= random >> 12;
            random ^= random << 25;
            random ^= random >> 27;
            // The more is kept, the more often its names are.
            seed % 4 != 0 && random % 40 >= seed % 4
        };
        let crashed = disk.crash(&mut keep);
        drop((installer, storage));
        let storage = open(&crashed);
        left += usize::from(is_left(&storage));
        go_on(&crashed, storage, &export, &log);
    }
    assert!(left > 20, "only {left} were found again");
}

#[test]
fn a_copy_whose_files_end_in_zeros_gets_the_right_bytes() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    // Bytes that are kept, and the size that the file then has.
    for (kept, size) in [(0.0, 1.0), (0.3, 1.0), (0.99, 1.0), (1.0, 1.5), (0.5, 0.9)] {
        let (disk, storage, installer) = begun(&export);
        let came = received(&installer);
        let disk = disk.copy();
        drop((installer, storage));
        let segments = files(&disk).into_iter();
        for path in segments.filter(|path| !descriptions(&disk).contains(path)) {
            let mut content = disk.content(&path).unwrap();
            let of_it = |share: f64| (content.len() as f64 * share) as usize;
            let (kept, size) = (of_it(kept), of_it(size));
            content.truncate(kept);
            content.resize(size, 0);
            disk.set_content(&path, content);
        }
        let storage = open(&disk);
        let installer = install(&storage, &export);
        assert!(received(&installer) > 0);
        let sent = complete(&export, &installer);
        assert!(sent > export.manifest().total_bytes() - came);
        installer.commit(Bytes::new()).unwrap();
        check_in_force(&disk, storage, &log);
    }
}

#[test]
fn a_crash_while_a_copy_comes_into_force_leaves_the_log_or_a_copy_to_go_on_with() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    let (mut left, mut in_force) = (0, 0);
    for keeps_all in [true, false] {
        for step in 0.. {
            let (disk, storage, installer) = begun(&export);
            complete(&export, &installer);
            disk.fail_power_after(step);
            let is_done = installer.commit(Bytes::new()).is_ok();
            let has_failed = disk.create_dir_all(&in_dir("any")).is_err();
            drop(storage);
            let disk = disk.crash(&mut || keeps_all);
            let storage = open(&disk);
            if is_left(&storage) {
                assert!(!is_done);
                left += 1;
                let installer = install(&storage, &export);
                assert_eq!(complete(&export, &installer), 0);
                installer.commit(Bytes::new()).unwrap();
            } else if storage.group_ids().is_empty() {
                // Not even the names had reached the disk.
                assert!(!is_done && files(&disk).is_empty());
                send(&export, &storage, GROUP).commit(Bytes::new()).unwrap();
            } else {
                in_force += 1;
            }
            check_in_force(&disk, storage, &log);
            if !has_failed {
                break;
            }
        }
    }
    assert!(left > 0 && in_force > 2, "{left} {in_force}");
}

#[test]
fn a_torn_description_goes_with_its_files() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    for has_log in [false, true] {
        let disk = FaultyDisk::new();
        let storage = open(&disk);
        if has_log {
            let old = storage.open_log(group(GROUP)).unwrap();
            fill_mixed(&old, 0..4);
            old.roll().unwrap();
        }
        let own = files(&disk);
        let installer = half(&storage, &export);
        let whole = disk.content(&descriptions(&disk)[0]).unwrap();
        let mut flipped = whole.clone();
        flipped[40] ^= 1;
        let cut = whole[..whole.len() - 1].to_vec();
        for torn in [Vec::new(), cut, flipped] {
            let disk = disk.copy();
            disk.set_content(&descriptions(&disk)[0], torn);
            let storage = open(&disk);
            assert!(!is_left(&storage));
            assert!(files(&disk).iter().all(|file| own.contains(file)));
            assert_eq!(storage.group_ids().len(), usize::from(has_log));
            send(&export, &storage, GROUP).commit(Bytes::new()).unwrap();
            check_in_force(&disk, storage, &log);
        }
        drop(installer);
    }
}

#[test]
fn of_several_copies_the_last_is_kept_and_none_that_was_overtaken() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let first = half(&storage, &export);
    let names = files(&disk);
    let second = half(&storage, &export);
    let killed = disk.copy();
    assert!(is_left(&open(&killed)));
    assert!(files(&killed).iter().all(|file| !names.contains(file)));
    complete(&export, &second);
    second.commit(Bytes::new()).unwrap();
    let killed = disk.copy();
    check_in_force(&killed, open(&killed), &log);
    drop(first);
    check_in_force(&disk, storage, &log);
}

#[test]
fn the_copy_of_a_deleted_group_is_gone_whenever_the_power_fails() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    vote(&storage.open_log(group(GROUP)).unwrap(), b"mine").unwrap();
    let installer = half(&storage, &export);
    let killed = disk.copy();
    drop((installer, storage));
    for step in 0.. {
        let disk = killed.copy();
        let storage = open(&disk);
        disk.fail_power_after(step);
        let deleted = storage.delete_log(group(GROUP)).is_ok();
        drop(storage);
        let disk = disk.crash(&mut || true);
        let storage = open(&disk);
        if deleted || storage.group_ids().is_empty() {
            assert!(files(&disk).is_empty(), "{:?}", files(&disk));
            assert!(!is_left(&storage));
        }
        go_on(&disk, storage, &export, &log);
        if deleted {
            break;
        }
    }
    // A group that has no log but what is left of a copy.
    let (disk, storage, installer) = begun(&export);
    let killed = disk.copy();
    drop((installer, storage));
    let storage = open(&killed);
    assert!(is_left(&storage) && storage.group_ids().is_empty());
    storage.delete_log(group(GROUP)).unwrap();
    assert!(!is_left(&storage) && files(&killed).is_empty());
}

#[test]
fn a_forgotten_copy_is_gone_and_its_names_are_not_used_again() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    for has_log in [false, true] {
        let disk = FaultyDisk::new();
        let storage = open(&disk);
        if has_log {
            vote(&storage.open_log(group(GROUP)).unwrap(), b"mine").unwrap();
        }
        let installer = half(&storage, &export);
        let names = files(&disk);
        let disk = disk.copy();
        drop((installer, storage));
        let storage = open(&disk);
        storage.forget_unfinished_copy(group(GROUP));
        assert!(!is_left(&storage));
        assert!(files(&disk).is_empty(), "{:?}", files(&disk));
        let installer = half(&storage, &export);
        let new = files(&disk);
        assert!(!new.is_empty());
        assert!(new.iter().all(|file| !names.contains(file)), "{new:?}");
        // Not one that somebody goes on with.
        storage.forget_unfinished_copy(group(GROUP));
        complete(&export, &installer);
        installer.commit(Bytes::new()).unwrap();
        check_in_force(&disk, storage, &log);
    }
}

/// Linux gives the bytes back from memory, and a further fsync finds nothing to do.
#[test]
fn what_could_not_be_synced_is_not_gone_on_with() {
    let (_, _from, log) = replica(60, 3000);
    let export = log.export(59).unwrap();
    let (disk, _storage, installer) = begun(&export);
    send_rest(&export, &installer, 1);
    disk.inject(Fault {
        operation: Operation::Sync,
        path_contains: "/5/",
        after: 0,
        error: std::io::ErrorKind::Other,
    });
    let failed = installer.check_segment(1).unwrap_err();
    assert!(matches!(failed, StorageError::Poisoned { .. }), "{failed}");
    // As killed: nothing is dropped before.
    let killed = disk.copy();
    killed.clear_faults();
    assert!(!is_left(&open(&killed)));
    assert!(files(&killed).is_empty(), "{:?}", files(&killed));
}
