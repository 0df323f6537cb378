//! What compaction keeps and what it removes, case by case; and that it disturbs nothing beside it.

use super::*;

#[test]
fn the_last_value_of_each_key_stays_at_its_offset_and_segments_are_merged() {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    write(&log, &[("a", "1"), ("b", "1"), ("a", "2")]);
    log.roll().unwrap();
    write(&log, &[("c", "1")]);
    log.roll().unwrap();
    write(&log, &[("b", "2")]);
    log.roll().unwrap();
    write(&log, &[("a", "3")]);
    log.roll().unwrap();
    // Raft may still need the entries.
    assert!(log.compaction_due(&SETTINGS, 100).is_none());
    assert_eq!(compact_at(&log, 100, 1 << 20).unwrap().records_removed, 0);
    purge_all(&log).unwrap();
    let due = log.compaction_due(&SETTINGS, 100).unwrap();
    assert_eq!(
        (due.reason, due.dirty_bytes),
        (CompactionReason::DirtyRatio, due.total_bytes)
    );
    let report = compact_at(&log, 100, 1 << 20).unwrap();
    assert!(report.is_complete && report.read_bytes > 0 && report.written_bytes > 0);
    assert_eq!(
        (
            report.segments_before,
            report.segments_after,
            report.records_removed
        ),
        (4, 1, 3)
    );
    assert!(log.compaction_due(&SETTINGS, 100).is_none());
    let expected = ["3:c=1", "4:b=2", "5:a=3"];
    assert_eq!(shown(&log), expected);
    let parts = log.segments();
    assert!(parts[0].is_compacted);
    assert_eq!(
        (parts[0].base_offset, parts[0].next_offset),
        (Offset(0), Offset(6))
    );
    // A read from a gap begins with what comes after it; lookups do the same.
    assert_eq!(log.read(Offset(1), Offset(6), 1).unwrap().len(), 1);
    assert_eq!(log.index_of_offset(Offset(1)).unwrap(), None);
    assert_eq!(log.index_of_offset(Offset(4)).unwrap(), Some(2));
    assert!(log.batch_for_timestamp(10, Offset(6)).unwrap().is_some());
    write(&log, &[("c", "2"), ("d", "1")]);
    let report = compact_all(&log, 100);
    assert_eq!(report.records_removed, 1);
    let expected = ["4:b=2", "5:a=3", "6:c=2", "7:d=1"];
    assert_eq!(shown(&log), expected);
    assert_eq!(paths_with(&disk, ".log").len(), 1);
    for close in [false, true] {
        if close {
            storage.close().unwrap();
        }
        let again = open(&disk.crash_copy());
        assert_eq!(shown(&again.open_log(group(1)).unwrap()), expected);
    }
}

#[test]
fn tombstones_go_when_everybody_had_the_time_to_see_them() {
    let storage = open(&FaultyDisk::new());
    let log = storage.open_log(group(1)).unwrap();
    write(&log, &[("a", "1"), ("b", "1")]);
    write(&log, &[("a", "")]);
    compact_all(&log, 5000);
    assert_eq!(shown(&log), ["1:b=1", "2:a=-"]);
    assert!(log.compaction_due(&SETTINGS, 5999).is_none());
    compact_at(&log, 5999, 1 << 20).unwrap();
    assert_eq!(shown(&log), ["1:b=1", "2:a=-"]);
    let due = log.compaction_due(&SETTINGS, 6000).unwrap();
    assert_eq!(due.reason, CompactionReason::DeleteHorizon);
    compact_at(&log, 6000, 1 << 20).unwrap();
    assert_eq!(shown(&log), ["1:b=1"]);
    assert!(log.compaction_due(&SETTINGS, i64::MAX).is_none());
    assert_eq!(log.log_end_offset(), Offset(3));
    write(&log, &[("a", "2")]);
    assert_eq!(shown(&log), ["1:b=1", "3:a=2"]);
}

#[test]
fn aborted_records_go_committed_ones_count_and_open_transactions_wait() {
    let storage = open(&FaultyDisk::new());
    let log = storage.open_log(group(1)).unwrap();
    write(&log, &[("a", "1"), ("b", "1")]);
    transaction(&log, 7, "a", "aborted");
    transaction(&log, 8, "b", "committed");
    end(&log, 7, true);
    end(&log, 8, false);
    // The same producer once more, and this time it commits; another one is open.
    transaction(&log, 7, "c", "committed");
    end(&log, 7, false);
    let open_from = log.log_end_offset();
    transaction(&log, 9, "a", "open");
    write(&log, &[("c", "newer")]);
    log.roll().unwrap();
    let report = compact_all(&log, 100);
    assert!(!report.is_complete);
    // What is newer counts, also behind the open transaction.
    let expected = ["0:a=1", "3:b=committed", "8:a=open", "9:c=newer"];
    assert_eq!(shown(&log), expected);
    assert_eq!(markers(&log), 3);
    assert_eq!(open_from, Offset(8));
    end(&log, 9, true);
    let report = compact_all(&log, 1500);
    assert!(report.is_complete);
    assert_eq!(shown(&log), ["0:a=1", "3:b=committed", "9:c=newer"]);
    // Of 7's transactions no records are left, and the horizon has passed; 9's has just begun.
    assert_eq!(markers(&log), 2);
    compact_at(&log, 2500, 1 << 20).unwrap();
    assert_eq!(markers(&log), 1);
    assert_eq!(shown(&log), ["0:a=1", "3:b=committed", "9:c=newer"]);
}

#[test]
fn the_last_batch_of_a_producer_stays_without_records() {
    let storage = open(&FaultyDisk::new());
    let log = storage.open_log(group(1)).unwrap();
    append_batch(&log, |base| {
        keyed(base, 10, 0, 5, &[pair("a", "1"), pair("b", "1")])
    })
    .unwrap();
    append_batch(&log, |base| keyed(base, 10, 0, 6, &[pair("a", "2")])).unwrap();
    write(&log, &[("a", "3"), ("b", "3")]);
    log.roll().unwrap();
    purge_all(&log).unwrap();
    let mut request = CompactionRequest {
        settings: SETTINGS,
        now_ms: 100,
        limit: Offset(5),
        active_producers: HashMap::from([(ProducerId(5), Offset(1))]),
        map_max_bytes: 1 << 20,
    };
    let mut pace = |_| ControlFlow::Continue(());
    log.compact(&request, &mut pace).unwrap();
    let read = log.read(Offset(0), Offset(5), usize::MAX).unwrap();
    let header = BatchHeader::parse(&read[0]).unwrap();
    assert_eq!(
        (header.producer_id, header.record_count),
        (ProducerId(5), 0)
    );
    assert_eq!(
        (header.base_offset, header.last_offset()),
        (Offset(0), Offset(1))
    );
    assert_eq!(
        (read.len(), shown(&log)),
        (2, vec!["3:a=3".to_owned(), "4:b=3".to_owned()])
    );
    // When it is forgotten, so is the batch.
    request.active_producers.clear();
    write(&log, &[("c", "1")]);
    log.roll().unwrap();
    purge_all(&log).unwrap();
    request.limit = Offset(6);
    log.compact(&request, &mut pace).unwrap();
    assert_eq!(log.read(Offset(0), Offset(5), usize::MAX).unwrap().len(), 1);
}

#[test]
fn little_memory_takes_several_passes_and_gives_the_same() {
    let storage = open(&FaultyDisk::new());
    let log = storage.open_log(group(1)).unwrap();
    for round in 0..6 {
        for key in 0..20 {
            write(&log, &[(&format!("key {key}"), &format!("{round}"))]);
        }
        log.roll().unwrap();
    }
    purge_all(&log).unwrap();
    // The least map there is holds 16 keys.
    let report = compact_at(&log, 100, 0).unwrap();
    assert!(report.is_complete);
    let expected: Vec<_> = (0..20)
        .map(|key| format!("{}:key {key}=5", 100 + key))
        .collect();
    assert_eq!(shown(&log), expected);
    // And it can be ended at any time.
    write(&log, &[("key 0", "6")]);
    log.roll().unwrap();
    purge_all(&log).unwrap();
    let request = CompactionRequest {
        settings: SETTINGS,
        now_ms: 100,
        limit: log.log_end_offset(),
        active_producers: HashMap::new(),
        map_max_bytes: 0,
    };
    let report = log
        .compact(&request, &mut |_| ControlFlow::Break(()))
        .unwrap();
    assert!(!report.is_complete);
    assert!(
        log.compact(&request, &mut |_| ControlFlow::Continue(()))
            .unwrap()
            .is_complete
    );
    assert_eq!(shown(&log)[0], "101:key 1=5");
    assert_eq!(shown(&log)[19], "120:key 0=6");
}

#[test]
fn bytes_that_are_no_records_stop_compaction_and_nothing_else() {
    let storage = open(&FaultyDisk::new());
    let log = storage.open_log(group(1)).unwrap();
    write(&log, &[("a", "1")]);
    append(&log, vec![data(1, 1, 1, b"no record")]).unwrap();
    log.set_committed(1);
    log.roll().unwrap();
    purge_all(&log).unwrap();
    let error = compact_at(&log, 100, 1 << 20).unwrap_err();
    assert!(
        matches!(
            error,
            StorageError::Uncleanable {
                offset: Offset(1),
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(log.damage(), None);
    assert_eq!(log.read(Offset(0), Offset(2), usize::MAX).unwrap().len(), 2);
}

#[test]
fn a_log_may_be_deleted_at_every_step_of_a_compaction() {
    // A folder that is gone takes no files.
    let folder = tempfile::tempdir().unwrap();
    let config = StorageConfig {
        dir: folder.path().to_owned(),
        ..small_config()
    };
    let storage = Storage::open(config, Arc::new(RealDisk)).unwrap();
    let (mut step, mut is_whole) = (0, false);
    while !is_whole {
        let log = storage.open_log(group(1)).unwrap();
        for round in 0..4 {
            for key in ["a", "b", "c"] {
                write(&log, &[(key, &format!("{round}"))]);
            }
            log.roll().unwrap();
        }
        purge_all(&log).unwrap();
        let request = CompactionRequest {
            settings: SETTINGS,
            now_ms: 0,
            limit: log.log_end_offset(),
            active_producers: HashMap::new(),
            map_max_bytes: 1 << 20,
        };
        let mut calls = 0;
        let compacted = log.compact(&request, &mut |_| {
            if calls == step {
                storage.delete_log(group(1)).unwrap();
            }
            calls += 1;
            ControlFlow::Continue(())
        });
        is_whole = calls <= step;
        match compacted {
            Ok(report) => assert!(is_whole && report.records_removed > 0, "step {step}"),
            Err(error) => assert!(
                matches!(error, StorageError::Deleted(_)),
                "step {step}: {error}"
            ),
        }
        if is_whole {
            assert!(step > 2, "{step} steps");
            storage.delete_log(group(1)).unwrap();
        }
        step += 1;
    }
    storage.close().unwrap();
}

#[test]
fn batches_that_lose_nothing_stay_byte_for_byte() {
    let storage = open(&FaultyDisk::new());
    let log = storage.open_log(group(1)).unwrap();
    for key in 0..30 {
        write(&log, &[(&format!("key {key}"), "only")]);
    }
    log.roll().unwrap();
    let before = log.read(Offset(0), Offset(30), usize::MAX).unwrap();
    write(&log, &[("other", "x")]);
    compact_all(&log, 100);
    let after = log.read(Offset(0), Offset(30), usize::MAX).unwrap();
    assert_eq!(before, after);
    assert!(batches_in(&after.concat()).all(|batch| batch.is_ok()));
}
