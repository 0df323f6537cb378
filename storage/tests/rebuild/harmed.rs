//! Damage of each kind to each file, and what becomes of it.

use super::*;

#[test]
fn any_damaged_file_is_rebuilt_from_a_replica_with_other_segments() {
    let disk = closed(60, 3000);
    for peer_bytes in [3000, 1700, 1_000_000] {
        let (_, _peer, peer) = replica(64, peer_bytes);
        let paths = files(&disk);
        assert!(paths.len() > 8, "{paths:?}");
        for path in paths {
            for how in [Harm::Flip(77), Harm::Short, Harm::Gone] {
                let disk = disk.copy();
                let before = {
                    let storage = open(&disk.copy());
                    let log = storage.open_log(group(1)).unwrap();
                    (facts(&log), read_all(&log).unwrap(), entries(&log))
                };
                assert!(harm(&disk, &path, how));
                let storage = open(&disk);
                let log = storage.open_log(group(1)).unwrap();
                notice(&log);
                assert_eq!(log.damage().unwrap().file, path, "{how:?}");
                assert!(read_all(&log).is_err() || read_entries(&log).is_err());
                assert!(rebuild(&log, &peer, false).unwrap());
                let check = |log: &PartitionLog| {
                    assert_eq!(log.damage(), None);
                    assert_eq!(facts(log), before.0, "{how:?} {}", path.display());
                    assert_eq!(read_all(log).unwrap(), before.1);
                    assert_eq!(entries(log), before.2);
                };
                check(&log);
                assert!(storage.damaged().is_empty());
                assert!(!rebuild(&log, &peer, false).unwrap());
                // After a power failure, and with what comes later.
                let crashed = open(&disk.crash_copy());
                let log = crashed.open_log(group(1)).unwrap();
                notice(&log);
                check(&log);
                fill_mixed(&log, 60..70);
                log.roll().unwrap();
                crashed.close().unwrap();
                assert_eq!(entries(&log).len(), 70);
                let peers = read_all(&peer).unwrap();
                assert_eq!(read_all(&log).unwrap()[..peers.len()], peers);
            }
        }
    }
}

#[test]
fn only_what_is_damaged_is_taken_where_both_have_the_same_segments() {
    let disk = closed(60, 3000);
    let (_, _peer, peer) = replica(64, 3000);
    let third = files(&disk)[5].clone();
    let others: Vec<_> = files(&disk)
        .into_iter()
        .filter(|path| path.file_stem() != third.file_stem())
        .collect();
    assert!(harm(&disk, &third, Harm::Flip(5)));
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    notice(&log);
    assert!(rebuild(&log, &peer, false).unwrap());
    let now = files(&disk);
    assert!(others.iter().all(|path| now.contains(path)), "{now:?}");
    assert!(!now.contains(&third));
    assert_eq!(now.len(), others.len() + 2);
}

#[test]
fn bytes_that_are_wrong_again_or_from_another_log_are_not_taken() {
    let disk = closed(60, 3000);
    let (peer_disk, storage_of_peer, peer) = replica(64, 3000);
    peer.roll().unwrap();
    storage_of_peer.close().unwrap();
    let path = files(&disk)[4].clone();
    assert!(harm(&disk, &path, Harm::Flip(50)));
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    notice(&log);
    let before = (facts(&log), files(&disk));
    // The peer has the same damage.
    assert!(harm(&peer_disk, &path, Harm::Flip(50)));
    assert!(rebuild(&log, &peer, false).unwrap_err().is_damage());
    assert_eq!((facts(&log), files(&disk)), before);
    // One that has not come so far, and one that is of another history.
    let (_, _short, short) = replica(20, 3000);
    let behind = rebuild(&log, &short, false).unwrap_err();
    assert!(matches!(behind, StorageError::IndexOutOfRange { .. }));
    let other_disk = FaultyDisk::new();
    let other_storage = open(&other_disk);
    let other = other_storage.open_log(group(1)).unwrap();
    for index in 0..64 {
        append(&other, vec![data(index, 1, index as i64, &[1; 200])]).unwrap();
        other.set_committed(index);
    }
    let refused = rebuild(&log, &other, false).unwrap_err();
    assert!(
        matches!(refused, StorageError::NotRebuilt { .. }),
        "{refused}"
    );
    assert_eq!((facts(&log), files(&disk)), before);
    assert!(log.is_damaged());
}

#[test]
fn power_may_fail_at_any_moment_of_a_rebuild() {
    let disk = closed(40, 3000);
    let (_, _peer, peer) = replica(50, 1700);
    let whole = {
        let storage = open(&disk.copy());
        let log = storage.open_log(group(1)).unwrap();
        (read_all(&log).unwrap(), entries(&log))
    };
    let path = files(&disk)[2].clone();
    assert!(harm(&disk, &path, Harm::Flip(9)));
    let run = |disk: &FaultyDisk, moment: Option<usize>| {
        let storage = open(disk);
        let log = storage.open_log(group(1)).unwrap();
        notice(&log);
        // Acknowledged, and only in the WAL: not to be lost by anything that happens to segments.
        fill_mixed(&log, 40..43);
        let before = disk.changing_calls();
        if let Some(moment) = moment {
            disk.fail_power_after(moment);
        }
        let rebuilt = rebuild(&log, &peer, false);
        (rebuilt, disk.changing_calls() - before)
    };
    let measured = disk.copy();
    let (rebuilt, moments) = run(&measured, None);
    assert!(rebuilt.unwrap() && moments > 10, "{moments}");
    let mut seen = [0, 0];
    for moment in 0..moments + 2 {
        for keeps in [false, true] {
            let disk = disk.copy();
            let (rebuilt, _) = run(&disk, Some(moment));
            let disk = disk.crash(&mut || keeps);
            let storage = open(&disk);
            let log = storage.open_log(group(1)).unwrap();
            notice(&log);
            assert_eq!(log.last_entry_id(), Some((42, 7)), "{moment}");
            assert_eq!(log.vote(), Some(Bytes::from_static(b"mine")));
            assert!(rebuilt.is_err() || !log.is_damaged(), "{moment}");
            seen[usize::from(log.is_damaged())] += 1;
            let was_damaged = log.is_damaged();
            assert_eq!(rebuild(&log, &peer, false).unwrap(), was_damaged);
            assert!(!log.is_damaged());
            assert_eq!(read_all(&log).unwrap()[..whole.0.len()], whole.0);
            assert_eq!(entries(&log)[..40], whole.1);
            assert_eq!(entries(&log).len(), 43);
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

#[test]
fn a_file_that_somebody_removed_damages_one_log_and_stops_nothing() {
    let disk = FaultyDisk::new();
    let config = StorageConfig {
        wal_file_size_bytes: 1 << 20,
        ..small_config()
    };
    let storage = Storage::open(config, Arc::new(disk.clone()) as Arc<dyn Disk>).unwrap();
    let mut changes = storage.damage_changes();
    assert!(!has_changed(&mut changes));
    let log = storage.open_log(group(1)).unwrap();
    let other = storage.open_log(group(2)).unwrap();
    let (_, _peer, peer) = replica(64, 3000);
    for id in 3..12 {
        fill_mixed(&storage.open_log(group(id)).unwrap(), 0..10);
    }
    fill_mixed(&log, 0..60);
    log.roll().unwrap();
    let of_log = files(&disk);
    use_other_files(&storage);
    // None of them is fsynced yet, which is what the next checkpoint is to do.
    for path in [&of_log[3], &of_log[6]] {
        Disk::remove_file(&disk, path).unwrap();
    }
    let body = vec![1; 20_000];
    eventually("the missing files are found", || {
        let index = other.last_entry_id().map_or(0, |(index, _)| index + 1);
        // Refused while memory is full.
        if append(&other, vec![data(index, 1, index as i64, &body)]).is_ok() {
            other.set_committed(index);
        }
        log.is_damaged()
    });
    let damaged = storage.damaged();
    assert!(damaged.iter().all(|damage| damage.group == group(1)));
    // It is told a moment after it is on record.
    eventually("it is told", || has_changed(&mut changes));
    // The second file may be found to be missing while the first is replaced.
    rebuild_all(&log, &peer, false);
    assert!(!log.is_damaged() && has_changed(&mut changes));
    assert!(!has_changed(&mut changes));
    // The segment that is being written.
    fill_mixed(&log, 60..63);
    let _ = log.export_files(62).unwrap();
    let written = paths_with(&disk, "/1/").pop().unwrap();
    assert!(written.to_string_lossy().ends_with(".raft"));
    use_other_files(&storage);
    Disk::remove_file(&disk, &written).unwrap();
    fill_mixed(&log, 63..64);
    log.roll().unwrap();
    assert_eq!(log.damage().unwrap().file, written);
    assert!(rebuild(&log, &peer, false).unwrap());
    storage.close().unwrap();
    drop((storage, log, other));
    let storage = open(&disk.crash(&mut || false));
    let log = storage.open_log(group(1)).unwrap();
    notice(&log);
    assert!(storage.damaged().is_empty());
    assert_eq!(entries(&log), entries(&peer));
}

#[test]
fn damage_goes_with_segments_that_are_deleted() {
    let disk = closed(60, 3000);
    assert!(harm(&disk, &files(&disk)[0], Harm::Gone));
    let storage = open(&disk);
    let mut changes = storage.damage_changes();
    assert!(has_changed(&mut changes));
    let log = storage.open_log(group(1)).unwrap();
    assert!(log.is_damaged());
    let second = log.segments()[1];
    log.save_replica_state(59, Bytes::new());
    let (done, receiver) = callback();
    log.set_log_start(second.base_offset, done).unwrap();
    answer(&receiver).unwrap();
    let (done, receiver) = callback();
    log.purge(second.first_index, done).unwrap();
    answer(&receiver).unwrap();
    eventually("the damage is gone", || !log.is_damaged());
    assert!(has_changed(&mut changes));
    assert_eq!(log.rebuild_end(false).unwrap(), None);
}
