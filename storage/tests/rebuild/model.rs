//! Random damage, restarts, purges and rebuilds, against a log that nothing happened to.

use super::*;

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
