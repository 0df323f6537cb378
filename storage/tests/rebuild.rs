//! Damaged segments are taken anew from another replica: all of the log can be read again, and nothing
//! else of it changes, whenever the power fails.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use bytes::Bytes;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::{
    DamageChanges, Disk, LogEntry, LogManifest, PartitionLog, Purged, SegmentFile, Storage,
    StorageConfig, StorageError, TermStart,
};
use chronik_types::offset::Offset;
use common::*;
use proptest::prelude::*;

/// As after an orderly end, so that nothing is in memory.
fn closed(count: u64, segment_bytes: u64) -> FaultyDisk {
    let (disk, storage, log) = replica(count, segment_bytes);
    vote(&log, b"mine").unwrap();
    log.roll().unwrap();
    storage.close().unwrap();
    drop((storage, log));
    disk.crash(&mut || false)
}

fn read_all(log: &PartitionLog) -> Result<Vec<Bytes>, StorageError> {
    log.read(log.log_start_offset(), log.log_end_offset(), usize::MAX)
}

fn read_entries(log: &PartitionLog) -> Result<Vec<LogEntry>, StorageError> {
    let end = log.last_entry_id().map_or(0, |(index, _)| index + 1);
    log.read_entries(log.first_index()..end, usize::MAX)
}

/// Reads each segment by itself, so that all damage is found.
fn notice(log: &PartitionLog) {
    for segment in log.segments() {
        let from = segment.base_offset.max(log.log_start_offset());
        let _ = log.read(from, segment.next_offset, usize::MAX);
        let first = segment.first_index.max(log.first_index());
        let _ = log.read_entries(first..segment.last_index + 1, usize::MAX);
    }
}

/// What `broker/catch_up` does over the network. False: nothing is damaged.
fn rebuild(log: &PartitionLog, peer: &PartitionLog, all: bool) -> Result<bool, StorageError> {
    let Some(upto) = log.rebuild_end(all)? else {
        return Ok(false);
    };
    let export = peer.export_files(upto)?;
    let manifest = LogManifest::decode(&export.manifest().encode()).unwrap();
    let Some((installer, rebuild)) = log.rebuild(manifest)? else {
        return Ok(false);
    };
    let wanted = installer.manifest().segments.clone();
    for (number, segment) in wanted.iter().enumerate() {
        let theirs = export.manifest().segments.iter();
        let at = theirs.clone().position(|other| other == segment).unwrap();
        for file in [SegmentFile::Log, SegmentFile::Sidecar] {
            let mut position = 0;
            loop {
                let bytes = export.read_chunk(at, file, position, 1000)?;
                if bytes.is_empty() {
                    break;
                }
                installer.write(number, file, position, &bytes)?;
                position += bytes.len() as u64;
            }
        }
    }
    rebuild.commit(installer)?;
    Ok(true)
}

/// Until nothing is known to be damaged, as often as there may be files.
fn rebuild_all(log: &PartitionLog, peer: &PartitionLog, all: bool) {
    for _ in 0..1000 {
        notice(log);
        if !rebuild(log, peer, all).unwrap() {
            return;
        }
    }
    panic!(
        "a rebuild says that it was done, and the damage stays: {:?}",
        log.damage()
    );
}

/// All of a log but where its bytes lie.
#[derive(Debug, PartialEq)]
struct Facts {
    last: Option<(u64, u64)>,
    committed: Option<u64>,
    durable: Option<u64>,
    first_index: u64,
    purged: Option<Purged>,
    vote: Option<Bytes>,
    state: Option<(u64, Bytes)>,
    terms: Vec<TermStart>,
    offsets: (Offset, Offset),
}

fn facts(log: &PartitionLog) -> Facts {
    Facts {
        last: log.last_entry_id(),
        committed: log.committed(),
        durable: log.durable_index(),
        first_index: log.first_index(),
        purged: log.purged(),
        vote: log.vote(),
        state: log.replica_state(),
        terms: log.term_starts(),
        offsets: (log.log_start_offset(), log.log_end_offset()),
    }
}

#[derive(Debug, Clone, Copy)]
enum Harm {
    Flip(usize),
    Short,
    Gone,
}

/// False where the file is gone already, or nothing is in it yet.
#[must_use]
fn harm(disk: &FaultyDisk, path: &Path, harm: Harm) -> bool {
    let content = disk.content(path).filter(|content| !content.is_empty());
    let Some(mut content) = content else {
        return false;
    };
    match harm {
        Harm::Flip(at) => {
            let size = content.len();
            content[at % size] ^= 4;
        }
        Harm::Short => content.truncate(content.len() / 2),
        Harm::Gone => return Disk::remove_file(disk, path).is_ok(),
    }
    disk.set_content(path, content);
    true
}

/// The files of the first log that hold what nothing else does.
fn files(disk: &FaultyDisk) -> Vec<PathBuf> {
    let paths = paths_with(disk, "/1/").into_iter();
    paths
        .filter(|path| !path.to_string_lossy().ends_with("index"))
        .collect()
}

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

fn has_changed(changes: &mut DamageChanges) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    pin!(changes.changed()).poll(&mut context).is_ready()
}

/// Opens so many other files that those of the log do not stay open.
fn use_other_files(storage: &Storage) {
    for id in 3..12 {
        let log = storage.open_log(group(id)).unwrap();
        let export = log.export_files(9).unwrap();
        for segment in 0..export.manifest().segments.len() {
            for file in [SegmentFile::Log, SegmentFile::Sidecar] {
                export.read_chunk(segment, file, 0, 1).unwrap();
            }
        }
    }
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

#[derive(Debug, Clone)]
enum Step {
    Fill(u64),
    Roll(bool),
    Purge(bool, usize),
    LogStart(usize),
    Restart(bool),
    Harm(usize, Harm),
    Rebuild(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let harm = prop_oneof![
        any::<usize>().prop_map(Harm::Flip),
        Just(Harm::Short),
        Just(Harm::Gone)
    ];
    prop_oneof![
        4 => (1u64..12).prop_map(Step::Fill),
        2 => any::<bool>().prop_map(Step::Roll),
        1 => (any::<bool>(), any::<usize>()).prop_map(|(own, at)| Step::Purge(own, at)),
        1 => any::<usize>().prop_map(Step::LogStart),
        1 => any::<bool>().prop_map(Step::Restart),
        2 => (any::<usize>(), harm).prop_map(|(at, how)| Step::Harm(at, how)),
        3 => any::<bool>().prop_map(Step::Rebuild),
    ]
}

/// A replica, and what it has to give back whatever happens.
struct Checked {
    disk: FaultyDisk,
    storage: Storage,
    log: PartitionLog,
}

impl Checked {
    fn new(segment_bytes: u64) -> Checked {
        let (disk, storage, log) = replica(0, segment_bytes);
        Checked { disk, storage, log }
    }

    /// In order, or as after a power failure.
    fn restart(&mut self, in_order: bool) {
        let segment_bytes = 2500;
        if in_order {
            self.storage.close().unwrap();
        }
        self.disk = self.disk.crash(&mut || false);
        self.storage = open(&self.disk);
        self.log = self.storage.open_log(group(1)).unwrap();
        self.log.set_segment_bytes(segment_bytes);
        if let Some((last, _)) = self.log.last_entry_id() {
            self.log.set_committed(last);
        }
    }

    fn purge(&self, upto: u64) {
        if self.log.committed().is_none_or(|last| upto > last) {
            return;
        }
        self.log.save_replica_state(upto, Bytes::new());
        let (done, receiver) = callback();
        // The disk may have to be read for it.
        if self.log.purge(upto, done).is_ok() {
            answer(&receiver).unwrap();
        }
    }

    fn set_log_start(&self, offset: Offset) {
        let (done, receiver) = callback();
        self.log.set_log_start(offset, done).unwrap();
        answer(&receiver).unwrap();
    }

    /// Nothing but what was written, or an error that says that it is damaged.
    fn check(&self, model: &PartitionLog) -> bool {
        let log = &self.log;
        assert_eq!(log.last_entry_id(), model.last_entry_id());
        assert_eq!(log.log_end_offset(), model.log_end_offset());
        let records = read_all(log);
        let end = log.last_entry_id().map_or(0, |(index, _)| index + 1);
        let entries = log.read_entries(log.first_index()..end, usize::MAX);
        match &records {
            Ok(records) => {
                let (from, to) = (log.log_start_offset(), log.log_end_offset());
                assert_eq!(*records, model.read(from, to, usize::MAX).unwrap());
            }
            Err(error) => assert!(error.is_damage(), "{error}"),
        }
        match &entries {
            // It may end before what cannot be read.
            Ok(entries) => {
                let expected = model.read_entries(log.first_index()..end, usize::MAX);
                assert_eq!(entries[..], expected.unwrap()[..entries.len()]);
            }
            Err(error) => assert!(error.is_damage(), "{error}"),
        }
        let is_whole = records.is_ok() && entries.is_ok();
        assert!(is_whole || log.is_damaged());
        is_whole
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_rebuild_brings_back_what_was_written_or_says_why_not(
        steps in proptest::collection::vec(step(), 1..40),
        sizes in (800u64..5000, 800u64..5000),
    ) {
        let (_, _model_storage, model) = replica(0, 1_000_000);
        let (mut own, peer) = (Checked::new(sizes.0), Checked::new(sizes.1));
        let mut next = 0;
        for step in steps {
            match step {
                Step::Fill(count) => {
                    for log in [&model, &own.log, &peer.log] {
                        fill_mixed(log, next..next + count);
                    }
                    next += count;
                }
                Step::Roll(is_own) => match is_own {
                    true => own.log.roll().unwrap(),
                    false => peer.log.roll().unwrap(),
                },
                Step::Purge(is_own, at) if next > 0 => match is_own {
                    true => own.purge(at as u64 % next),
                    false => peer.purge(at as u64 % next),
                },
                // A log start is agreed on, but not applied everywhere at once.
                Step::LogStart(at) => {
                    let offset = Offset(at as i64 % (model.log_end_offset().0 + 1));
                    own.set_log_start(offset);
                    if at % 3 > 0 {
                        peer.set_log_start(offset);
                    }
                }
                Step::Restart(in_order) => own.restart(in_order),
                Step::Harm(file, how) => {
                    let files = files(&own.disk);
                    if !files.is_empty() {
                        let path = files[file % files.len()].clone();
                        // What is deleted goes a moment later.
                        let _ = harm(&own.disk, &path, how);
                    }
                }
                Step::Rebuild(all) => {
                    notice(&own.log);
                    let before = own.log.damage();
                    match rebuild(&own.log, &peer.log, all) {
                        Ok(true) => {
                            // Memory, or an open file, may have hidden something else.
                            notice(&own.log);
                            prop_assert_ne!(own.log.damage(), before);
                        }
                        Ok(false) => prop_assert!(!own.log.is_damaged()),
                        Err(error) => prop_assert!(
                            // What is deleted meanwhile takes its damage along.
                            matches!(
                                error,
                                StorageError::NotRebuilt { .. } | StorageError::Superseded
                            ),
                            "{error}"
                        ),
                    }
                }
                Step::Purge(..) => {}
            }
            own.check(&model);
        }
        // The peer has all of it, so it comes back in the end: at the latest when both have forgotten
        // the same. Memory hides some of it until the next start.
        own.restart(false);
        notice(&own.log);
        for _ in 0..10 {
            if !own.log.is_damaged() {
                break;
            }
            // What is purged must be known, and this is in memory.
            for log in [&model, &own.log, &peer.log] {
                fill_mixed(log, next..next + 3);
            }
            next += 3;
            for replica in [&own, &peer] {
                replica.set_log_start(own.log.log_start_offset().max(peer.log.log_start_offset()));
                replica.purge(next - 1);
                eventually("what nobody needs is gone", || {
                    let segments = replica.log.segments();
                    let start = replica.log.log_start_offset();
                    segments.first().is_none_or(|first| first.next_offset > start)
                });
            }
            rebuild_all(&own.log, &peer.log, true);
            own.restart(false);
            notice(&own.log);
        }
        prop_assert!(own.check(&model), "{:?}", own.log.damage());
    }
}
