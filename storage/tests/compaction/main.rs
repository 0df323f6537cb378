//! Compaction: `kept` has the rules case by case; `model` shows that, whatever is written, compacted, moved
//! and cut off by power failures, the last committed value of each key is found at its own offset, and
//! nothing is invented. Here is what both share.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

#[path = "../common/mod.rs"]
mod common;
mod kept;
mod model;

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
