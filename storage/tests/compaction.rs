//! Compaction against a model: whatever is written, compacted, moved and cut off by power failures,
//! the last committed value of each key is found at its own offset, and nothing is invented.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use chronik_storage::disk::{FaultyDisk, RealDisk};
use chronik_storage::records::{body_of, put_varint, records_of};
use chronik_storage::{
    CompactionReason, CompactionReport, CompactionRequest, CompactionSettings, Disk, LogEntry,
    PartitionLog, Payload, SegmentFile, SegmentState, Storage, StorageConfig, StorageError,
};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::ProducerId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{
    BatchHeader, HEADER_SIZE, LENGTH_PREFIX_SIZE, batches as batches_in, crc32c, stamp,
};
use common::*;
use proptest::prelude::*;

const SETTINGS: CompactionSettings = CompactionSettings {
    delete_retention_ms: 1000,
    min_compaction_lag_ms: 0,
    max_compaction_lag_ms: i64::MAX,
    min_cleanable_dirty_ratio: 0.0,
};
const TRANSACTIONAL: i16 = 0x10;
const CONTROL: i16 = 0x20;

/// A record: key, and value (none: a tombstone).
type Pair = (Vec<u8>, Option<Vec<u8>>);

fn put_sized(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    put_varint(out, bytes.map_or(-1, |bytes| bytes.len() as i64));
    out.extend_from_slice(bytes.unwrap_or_default());
}

/// A batch of records, gzipped where the attributes say so.
fn keyed(base: i64, time: i64, attributes: i16, producer: i64, pairs: &[Pair]) -> Bytes {
    let mut body = Vec::new();
    for (delta, (key, value)) in pairs.iter().enumerate() {
        let mut record = vec![0];
        put_varint(&mut record, 0);
        put_varint(&mut record, delta as i64);
        put_sized(&mut record, Some(key));
        put_sized(&mut record, value.as_deref());
        put_varint(&mut record, 0);
        put_varint(&mut body, record.len() as i64);
        body.extend(record);
    }
    if attributes & 7 == 1 {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&body).unwrap();
        body = encoder.finish().unwrap();
    }
    let mut out = vec![0; HEADER_SIZE];
    out.extend(body);
    let length = (out.len() - LENGTH_PREFIX_SIZE) as i32;
    out[8..12].copy_from_slice(&length.to_be_bytes());
    out[16] = 2;
    out[21..23].copy_from_slice(&attributes.to_be_bytes());
    out[23..27].copy_from_slice(&(pairs.len() as i32 - 1).to_be_bytes());
    out[27..35].copy_from_slice(&time.to_be_bytes());
    out[35..43].copy_from_slice(&time.to_be_bytes());
    out[43..51].copy_from_slice(&producer.to_be_bytes());
    out[57..61].copy_from_slice(&(pairs.len() as i32).to_be_bytes());
    let crc = crc32c(&out[21..]);
    out[17..21].copy_from_slice(&crc.to_be_bytes());
    stamp(&mut out, Offset(base), LeaderEpoch(1));
    Bytes::from(out)
}

fn marker_pair(is_abort: bool) -> Vec<Pair> {
    vec![(vec![0, 0, 0, u8::from(!is_abort)], Some(vec![0; 6]))]
}

fn append_batch(log: &PartitionLog, make: impl Fn(i64) -> Bytes) -> Result<LogEntry, StorageError> {
    let index = log.last_entry_id().map_or(0, |(index, _)| index + 1);
    let base_offset = log.log_end_offset();
    let bytes = make(base_offset.0);
    let next_offset = BatchHeader::parse(&bytes).unwrap().next_offset();
    let payload = Payload::Batches {
        bytes,
        base_offset,
        next_offset,
    };
    let entry = LogEntry {
        index,
        term: 1,
        payload,
    };
    append(log, vec![entry.clone()])?;
    log.set_committed(index);
    Ok(entry)
}

fn purge_all(log: &PartitionLog) -> Result<(), StorageError> {
    let Some((last, _)) = log.last_entry_id() else {
        return Ok(());
    };
    log.save_replica_state(last, Bytes::new());
    let (done, receiver) = callback();
    log.purge(last, done)?;
    answer(&receiver)
}

fn compact_at(
    log: &PartitionLog,
    now_ms: i64,
    map_max_bytes: usize,
) -> Result<CompactionReport, StorageError> {
    let request = CompactionRequest {
        settings: SETTINGS,
        now_ms,
        limit: log.log_end_offset(),
        active_producers: HashMap::new(),
        map_max_bytes,
    };
    log.compact(&request, &mut |_| ControlFlow::Continue(()))
}

/// Rolls, purges and compacts all there is.
fn compact_all(log: &PartitionLog, now_ms: i64) -> CompactionReport {
    log.roll().unwrap();
    purge_all(log).unwrap();
    compact_at(log, now_ms, 1 << 20).unwrap()
}

/// Offset, key and value of every data record that can be read, in order, aborted ones too.
fn records(log: &PartitionLog) -> Result<Vec<(i64, Pair)>, StorageError> {
    let mut out = Vec::new();
    for batch in log.read(log.log_start_offset(), log.log_end_offset(), usize::MAX)? {
        let header = BatchHeader::parse(&batch).unwrap();
        if header.is_control() {
            continue;
        }
        let body = body_of(&header, &batch).unwrap();
        for record in records_of(&header, &body).unwrap() {
            let offset = header.base_offset.0 + i64::from(record.offset_delta);
            let value = record.value.map(<[u8]>::to_vec);
            out.push((offset, (record.key.unwrap().to_vec(), value)));
        }
    }
    Ok(out)
}

fn pair(key: &str, value: &str) -> Pair {
    let value = (!value.is_empty()).then(|| value.as_bytes().to_vec());
    (key.as_bytes().to_vec(), value)
}

fn write(log: &PartitionLog, pairs: &[(&str, &str)]) {
    let pairs: Vec<Pair> = pairs.iter().map(|(key, value)| pair(key, value)).collect();
    append_batch(log, |base| keyed(base, 10, 0, -1, &pairs)).unwrap();
}

fn transaction(log: &PartitionLog, producer: i64, key: &str, value: &str) {
    let pairs = [pair(key, value)];
    append_batch(log, |base| keyed(base, 10, TRANSACTIONAL, producer, &pairs)).unwrap();
}

fn end(log: &PartitionLog, producer: i64, is_abort: bool) {
    let (attributes, pairs) = (TRANSACTIONAL | CONTROL, marker_pair(is_abort));
    append_batch(log, |base| keyed(base, 10, attributes, producer, &pairs)).unwrap();
}

fn shown(log: &PartitionLog) -> Vec<String> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let show = |(offset, (key, value)): (i64, Pair)| {
        format!("{offset}:{}={}", text(key), value.map_or("-".into(), text))
    };
    records(log).unwrap().into_iter().map(show).collect()
}

fn markers(log: &PartitionLog) -> usize {
    let read = log
        .read(log.log_start_offset(), log.log_end_offset(), usize::MAX)
        .unwrap();
    let headers = read.iter().map(|batch| BatchHeader::parse(batch).unwrap());
    headers.filter(BatchHeader::is_control).count()
}

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

#[derive(Debug, Clone)]
enum Op {
    /// Keys (few) and whether it is a tombstone; compressed or not.
    Write(Vec<(u8, bool)>, bool),
    /// By one of two producers: a record, then later its end.
    Transaction(u8, u8),
    End(u8, bool),
    Roll,
    Purge,
    LogStart(u8),
    Compact(u8, bool),
    /// The log's content goes to another log and back.
    Move,
    Crash(u64),
}

/// What was appended, by offset.
#[derive(Default)]
struct Model {
    records: BTreeMap<i64, (Pair, Fate)>,
    open: HashMap<u8, Vec<i64>>,
    log_start: i64,
    /// Tombstones before it may be gone.
    now_ms: i64,
    value: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Committed,
    Open,
    Aborted,
}

impl Model {
    fn check(&self, log: &PartitionLog) {
        let found = records(log).unwrap();
        let found: BTreeMap<i64, Pair> = found.into_iter().collect();
        for (offset, pair) in &found {
            assert_eq!(
                Some(pair),
                self.records.get(offset).map(|(pair, _)| pair),
                "at {offset}"
            );
        }
        let mut newest: HashMap<&[u8], i64> = HashMap::new();
        for (offset, ((key, _), fate)) in &self.records {
            if *fate == Fate::Committed {
                newest.insert(key, *offset);
            }
        }
        for (key, offset) in newest {
            let ((_, value), _) = &self.records[&offset];
            let may_be_gone = value.is_none() || offset < self.log_start;
            assert!(
                may_be_gone || found.contains_key(&offset),
                "{key:?} is not at {offset}"
            );
        }
        for (offset, (_, fate)) in &self.records {
            let must_be = *fate == Fate::Open && *offset >= self.log_start;
            assert!(
                !must_be || found.contains_key(offset),
                "open record at {offset}"
            );
        }
    }
}

struct World {
    disk: FaultyDisk,
    storage: Option<Storage>,
    model: Model,
}

fn open_log(disk: &FaultyDisk) -> Option<Storage> {
    let config = StorageConfig {
        segment_bytes: 1500,
        ..small_config()
    };
    Storage::open(config, Arc::new(disk.clone()) as Arc<dyn Disk>).ok()
}

impl World {
    fn new(disk: FaultyDisk) -> Self {
        World {
            storage: open_log(&disk),
            disk,
            model: Model::default(),
        }
    }

    fn log(&self) -> Option<PartitionLog> {
        self.storage.as_ref()?.open_log(group(1)).ok()
    }

    fn append(&mut self, producer: Option<u8>, attributes: i16, pairs: &[Pair]) -> bool {
        let Some(log) = self.log() else { return false };
        let (time, id) = (self.model.now_ms, producer.map_or(-1, i64::from));
        let base = log.log_end_offset().0;
        let appended = append_batch(&log, |base| keyed(base, time, attributes, id, pairs));
        if attributes & CONTROL == 0 {
            let fate = if producer.is_some() {
                Fate::Open
            } else {
                Fate::Committed
            };
            for (offset, pair) in (base..).zip(pairs) {
                if appended.is_ok() {
                    self.model.records.insert(offset, (pair.clone(), fate));
                    let open = self.model.open.entry(producer.unwrap_or(0)).or_default();
                    open.extend(producer.map(|_| offset));
                }
            }
        }
        appended.is_ok()
    }

    fn value(&mut self) -> Option<Vec<u8>> {
        self.model.value += 1;
        Some(format!("value {} {}", self.model.value, "x".repeat(40)).into_bytes())
    }

    fn apply(&mut self, op: &Op) {
        let Some(log) = self.log() else { return };
        self.model.now_ms += 100;
        match op {
            Op::Write(keys, is_compressed) => {
                let pairs: Vec<Pair> = keys
                    .iter()
                    .map(|(key, is_tombstone)| {
                        let value = self.value().filter(|_| !is_tombstone);
                        (vec![key % 6], value)
                    })
                    .collect();
                self.append(None, i16::from(*is_compressed), &pairs);
            }
            Op::Transaction(producer, key) => {
                let value = self.value();
                self.append(
                    Some(1 + producer % 2),
                    TRANSACTIONAL,
                    &[(vec![key % 6], value)],
                );
            }
            Op::End(producer, is_abort) => {
                let producer = 1 + producer % 2;
                let attributes = TRANSACTIONAL | CONTROL;
                if self.append(Some(producer), attributes, &marker_pair(*is_abort)) {
                    let fate = if *is_abort {
                        Fate::Aborted
                    } else {
                        Fate::Committed
                    };
                    for offset in self.model.open.remove(&producer).unwrap_or_default() {
                        self.model.records.get_mut(&offset).unwrap().1 = fate;
                    }
                }
            }
            Op::Roll => drop(log.roll()),
            Op::Purge => drop(purge_all(&log)),
            Op::LogStart(back) => {
                let offset = Offset((log.log_end_offset().0 - i64::from(*back)).max(0));
                let (done, receiver) = callback();
                if log.set_log_start(offset, done).is_ok() {
                    // Whether or not it is durable, what is below need not be there.
                    self.model.log_start = self.model.log_start.max(offset.0);
                    let _ = answer(&receiver);
                }
            }
            Op::Compact(memory, is_cancelled) => {
                let mut left = if *is_cancelled { 2 } else { usize::MAX };
                let request = CompactionRequest {
                    settings: SETTINGS,
                    now_ms: self.model.now_ms,
                    limit: log.log_end_offset(),
                    active_producers: HashMap::new(),
                    map_max_bytes: usize::from(*memory) * 10,
                };
                let result = log.compact(&request, &mut |_| {
                    left = left.saturating_sub(1);
                    if left == 0 {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                });
                if let Err(error) = result {
                    let is_power = matches!(
                        error,
                        StorageError::Io { .. } | StorageError::Poisoned { .. }
                    );
                    assert!(is_power, "{error}");
                }
                self.check_running();
            }
            Op::Move => {
                let _ = self.transfer(1, 2).and_then(|()| self.transfer(2, 1));
            }
            Op::Crash(seed) => self.crash(*seed),
        }
    }

    fn check_running(&self) {
        if let Some(log) = self.log()
            && log
                .read(log.log_start_offset(), log.log_end_offset(), 1)
                .is_ok()
            && records(&log).is_ok()
        {
            self.model.check(&log);
        }
    }

    fn transfer(&self, from: u64, to: u64) -> Result<(), StorageError> {
        let storage = self.storage.as_ref().ok_or(StorageError::Closed)?;
        let log = storage.open_log(group(from))?;
        let Some((last, _)) = log.last_entry_id() else {
            return Err(StorageError::Closed);
        };
        let export = log.export(last)?;
        let installer = storage.install(group(to), export.manifest().clone())?;
        for (number, segment) in export.manifest().segments.iter().enumerate() {
            for file in [SegmentFile::Log, SegmentFile::Sidecar] {
                let size = segment.file_bytes(file) as usize;
                installer.write(number, file, 0, &export.read_chunk(number, file, 0, size)?)?;
            }
            if let Err(error) = installer.check_segment(number) {
                assert!(!error.is_damage(), "{error}");
                return Err(error);
            }
        }
        installer.commit(Bytes::new())
    }

    fn crash(&mut self, seed: u64) {
        let mut state = seed | 1;
        let mut keep = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match seed % 4 {
                0 => false,
                1 => true,
                _ => !state.is_multiple_of(3),
            }
        };
        let disk = self.disk.crash(&mut keep);
        self.storage = None;
        self.disk = disk;
        let storage = open_log(&self.disk).unwrap();
        assert!(storage.damaged().is_empty(), "{:?}", storage.damaged());
        let log = storage.open_log(group(1)).unwrap();
        // What was not confirmed may be there all the same; it is taken over as it is found.
        for (offset, pair) in records(&log).unwrap() {
            self.model
                .records
                .entry(offset)
                .or_insert((pair, Fate::Open));
        }
        let end = log.log_end_offset().0;
        assert!(self.model.records.keys().all(|offset| *offset < end));
        self.model.check(&log);
        // An orderly end here or there, so that both kinds of start are seen.
        self.storage = Some(storage);
        if seed.is_multiple_of(5) {
            self.storage.as_ref().unwrap().close().unwrap();
            self.storage = open_log(&self.disk);
            self.model.check(&self.log().unwrap());
            let names = paths_with(&self.disk, "partitions/1/").into_iter();
            let logs = names
                .filter(|name| name.extension().unwrap() == "log")
                .count();
            let parts = self.log().unwrap().segments().into_iter();
            let in_files = parts.filter(|part| part.state != SegmentState::Unflushed);
            assert_eq!(logs, in_files.filter(|part| part.size_bytes > 0).count());
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let keys = proptest::collection::vec((any::<u8>(), proptest::bool::weighted(0.2)), 1..5);
    prop_oneof![
        10 => (keys, any::<bool>()).prop_map(|(keys, gzip)| Op::Write(keys, gzip)),
        4 => (any::<u8>(), any::<u8>()).prop_map(|(producer, key)| Op::Transaction(producer, key)),
        3 => (any::<u8>(), any::<bool>()).prop_map(|(producer, abort)| Op::End(producer, abort)),
        3 => Just(Op::Roll),
        3 => Just(Op::Purge),
        1 => any::<u8>().prop_map(Op::LogStart),
        4 => (any::<u8>(), proptest::bool::weighted(0.2)).prop_map(|(m, c)| Op::Compact(m, c)),
        1 => Just(Op::Move),
        1 => any::<u64>().prop_map(Op::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 150,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn the_last_value_of_each_key_survives_everything(
        ops in proptest::collection::vec(op(), 1..120),
        last in any::<u64>(),
    ) {
        let mut world = World::new(FaultyDisk::new());
        ops.iter().for_each(|op| world.apply(op));
        world.check_running();
        world.crash(last);
    }
}

/// A fixed run with everything in it.
fn script(seed: u64) -> Vec<Op> {
    let mut state = seed * 77 + 13;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut ops = Vec::new();
    for step in 0..45u64 {
        let number = next();
        let keys = (0..1 + number % 4).map(|i| ((number >> (8 * i)) as u8, (number >> i) & 7 == 0));
        ops.push(Op::Write(keys.collect(), number & 1 == 0));
        match next() % 7 {
            0 => ops.push(Op::Transaction(step as u8, number as u8)),
            1 => ops.push(Op::End(step as u8, number & 2 == 0)),
            2 => ops.extend([Op::Roll, Op::Purge]),
            3 if step > 30 => ops.push(Op::Move),
            _ => {}
        }
        if step % 11 == 10 {
            ops.extend([Op::Roll, Op::Purge, Op::Compact(40, false)]);
        }
    }
    ops
}

#[test]
fn the_power_may_fail_at_every_step_of_a_compaction() {
    for seed in 1..3 {
        let ops = script(seed);
        let mut whole = World::new(FaultyDisk::new());
        ops.iter().for_each(|op| whole.apply(op));
        let removed = whole.storage.as_ref().unwrap().stats();
        assert!(removed.compactions >= 4 && removed.compaction_written_bytes > 0);
        let calls = whole.disk.changing_calls();
        for step in 0..calls + 5 {
            let disk = FaultyDisk::new();
            disk.fail_power_after(step);
            let mut world = World::new(disk);
            ops.iter().for_each(|op| world.apply(op));
            world.crash(seed * 1000 + step as u64);
            world.apply(&Op::Compact(100, false));
            world.crash(step as u64);
        }
    }
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
