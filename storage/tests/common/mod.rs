//! Shared by the storage's tests: batches, a small storage on a faulty disk, and waiting.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part; tests may panic"
)]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::{
    Disk, LogEntry, OnDurable, OpenError, PartitionLog, Payload, Storage, StorageConfig,
    StorageError,
};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{HEADER_SIZE, LENGTH_PREFIX_SIZE, crc32c, stamp};

pub const DIR: &str = "/data";

/// Settings so small that everything rolls and recycles within a few entries.
pub fn small_config() -> StorageConfig {
    StorageConfig {
        dir: PathBuf::from(DIR),
        wal_file_size_bytes: 4096,
        wal_files_max: 2,
        memory_max_bytes: 1 << 20,
        segment_bytes: 4000,
        open_files_max: 8,
        scrub_bytes_per_second: 0,
        ..StorageConfig::default()
    }
}

pub fn open(disk: &FaultyDisk) -> Storage {
    try_open(disk).unwrap()
}

/// With so little memory that entries are dropped from it, and refused, all the time.
pub fn open_tight(disk: &FaultyDisk) -> Result<Storage, OpenError> {
    let config = StorageConfig {
        memory_max_bytes: 20_000,
        ..small_config()
    };
    Storage::open(config, Arc::new(disk.clone()) as Arc<dyn Disk>)
}

pub fn try_open(disk: &FaultyDisk) -> Result<Storage, OpenError> {
    Storage::open(small_config(), Arc::new(disk.clone()) as Arc<dyn Disk>)
}

/// One batch with `records` records and a body of `body_size` bytes.
pub fn batch(base_offset: i64, records: i32, timestamp: i64, epoch: i32, body: &[u8]) -> Bytes {
    let mut bytes = vec![0; HEADER_SIZE];
    bytes.extend_from_slice(body);
    let length = (bytes.len() - LENGTH_PREFIX_SIZE) as i32;
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes[16] = 2;
    bytes[23..27].copy_from_slice(&(records - 1).to_be_bytes());
    bytes[27..35].copy_from_slice(&timestamp.to_be_bytes());
    bytes[35..43].copy_from_slice(&timestamp.to_be_bytes());
    bytes[43..51].copy_from_slice(&(-1i64).to_be_bytes());
    bytes[57..61].copy_from_slice(&records.to_be_bytes());
    let crc = crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    stamp(&mut bytes, Offset(base_offset), LeaderEpoch(epoch));
    Bytes::from(bytes)
}

/// An entry of one batch with one record.
pub fn data(index: u64, term: u64, offset: i64, body: &[u8]) -> LogEntry {
    batches(index, term, offset, &[(1, offset, body)])
}

/// An entry of several batches, each (records, timestamp, body).
pub fn batches(index: u64, term: u64, offset: i64, parts: &[(i32, i64, &[u8])]) -> LogEntry {
    let mut bytes = Vec::new();
    let mut next = offset;
    for (records, timestamp, body) in parts {
        bytes.extend_from_slice(&batch(next, *records, *timestamp, term as i32, body));
        next += i64::from(*records);
    }
    let payload = Payload::Batches {
        bytes: Bytes::from(bytes),
        base_offset: Offset(offset),
        next_offset: Offset(next),
    };
    LogEntry {
        index,
        term,
        payload,
    }
}

pub fn blank(index: u64, term: u64) -> LogEntry {
    LogEntry {
        index,
        term,
        payload: Payload::Blank,
    }
}

pub fn membership(index: u64, term: u64, bytes: &[u8]) -> LogEntry {
    LogEntry {
        index,
        term,
        payload: Payload::Membership(Bytes::copy_from_slice(bytes)),
    }
}

pub type Answer = Receiver<Result<(), StorageError>>;

/// A callback, and what it is told.
pub fn callback() -> (OnDurable, Answer) {
    let (sender, receiver) = sync_channel(1);
    (
        Box::new(move |result| sender.send(result).unwrap_or(())),
        receiver,
    )
}

pub fn answer(receiver: &Answer) -> Result<(), StorageError> {
    receiver
        .recv_timeout(Duration::from_secs(20))
        .expect("the callback must be called")
}

/// Appends and waits until it is durable.
pub fn append(log: &PartitionLog, entries: Vec<LogEntry>) -> Result<(), StorageError> {
    let (done, receiver) = callback();
    log.append(entries, done)?;
    answer(&receiver)
}

/// Entry i of term `1 + i / 7`; blank, membership and data; all committed.
pub fn fill_mixed(log: &PartitionLog, range: Range<u64>) {
    for index in range {
        let (term, offset) = (1 + index / 7, log.log_end_offset().0);
        let body = [index as u8; 150];
        let entry = match index % 5 {
            0 => blank(index, term),
            1 => membership(index, term, &body[..60]),
            _ => batches(
                index,
                term,
                offset,
                &[(1, 5, &body), (3, 9 + offset, &body)],
            ),
        };
        append(log, vec![entry]).unwrap();
        log.set_committed(index);
    }
}

/// A replica with that many entries, in segments of that size.
pub fn replica(count: u64, segment_bytes: u64) -> (FaultyDisk, Storage, PartitionLog) {
    let disk = FaultyDisk::new();
    let storage = open(&disk);
    let log = storage.open_log(group(1)).unwrap();
    log.set_segment_bytes(segment_bytes);
    fill_mixed(&log, 0..count);
    (disk, storage, log)
}

pub fn truncate(log: &PartitionLog, index: Option<u64>) -> Result<(), StorageError> {
    let (done, receiver) = callback();
    log.truncate_after(index, done)?;
    answer(&receiver)
}

pub fn vote(log: &PartitionLog, vote: &[u8]) -> Result<(), StorageError> {
    let (done, receiver) = callback();
    log.save_vote(Bytes::copy_from_slice(vote), done)?;
    answer(&receiver)
}

pub fn group(id: u64) -> RaftGroupId {
    RaftGroupId(id)
}

/// All entries of the log.
pub fn entries(log: &PartitionLog) -> Vec<LogEntry> {
    try_entries(log).expect("entries can be read")
}

/// All entries of the log; `None` if the disk fails.
pub fn try_entries(log: &PartitionLog) -> Option<Vec<LogEntry>> {
    let next = log.last_entry_id().map_or(0, |(index, _)| index + 1);
    let mut out: Vec<LogEntry> = Vec::new();
    let mut from = log.first_index();
    while from < next {
        let some = match log.read_entries(from..next, 700) {
            Ok(some) => some,
            Err(StorageError::Io { .. }) => return None,
            Err(error) => panic!("{error}"),
        };
        assert!(!some.is_empty());
        from = some.last().unwrap().index + 1;
        out.extend(some);
    }
    Some(out)
}

/// Waits for a condition that a background thread brings about.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        // The background threads need the cores more than this one.
        std::thread::park_timeout(Duration::from_micros(200));
    }
}

pub fn paths_with(disk: &FaultyDisk, part: &str) -> Vec<PathBuf> {
    disk.paths()
        .into_iter()
        .filter(|path| path.to_string_lossy().contains(part))
        .collect()
}

pub fn in_dir(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}
