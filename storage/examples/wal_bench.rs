//! How fast the storage commits on this machine's disk: every append waits for its fsync, several
//! are in flight per partition. Run: `cargo run --release -p chronik-storage --example wal_bench`.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program for people"
)]

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chronik_storage::{LogEntry, Payload, RealDisk, Storage, StorageConfig};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{HEADER_SIZE, LENGTH_PREFIX_SIZE, crc32c, stamp};

const RUN: Duration = Duration::from_secs(3);

fn batch(size: usize) -> Vec<u8> {
    let mut bytes = vec![7; size.max(HEADER_SIZE)];
    bytes[..HEADER_SIZE].fill(0);
    let length = (bytes.len() - LENGTH_PREFIX_SIZE) as i32;
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes[16] = 2;
    bytes[57..61].copy_from_slice(&1i32.to_be_bytes());
    let crc = crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn run(partitions: u64, size: usize, in_flight: usize) {
    let dir = tempfile::tempdir_in(".").unwrap();
    let config = StorageConfig {
        dir: dir.path().to_owned(),
        ..StorageConfig::default()
    };
    let storage = Storage::open(config, Arc::new(RealDisk)).unwrap();
    let template = batch(size);
    let logs: Vec<_> = (0..partitions)
        .map(|id| storage.open_log(RaftGroupId(id)).unwrap())
        .collect();
    let (sender, receiver) = sync_channel(partitions as usize * in_flight);
    let append = |at: usize, index: u64| {
        let log = logs[at].clone();
        let mut bytes = template.clone();
        stamp(&mut bytes, Offset(index as i64), LeaderEpoch(1));
        let payload = Payload::Batches {
            bytes: Bytes::from(bytes),
            base_offset: Offset(index as i64),
            next_offset: Offset(index as i64 + 1),
        };
        let (sender, started) = (sender.clone(), Instant::now());
        let done = Box::new(move |result: Result<(), _>| {
            result.unwrap();
            sender.send((at, index, started.elapsed())).unwrap();
        });
        log.append(
            vec![LogEntry {
                index,
                term: 1,
                payload,
            }],
            done,
        )
    };
    let mut next = vec![0u64; logs.len()];
    for (at, next) in next.iter_mut().enumerate() {
        for _ in 0..in_flight {
            append(at, *next).unwrap();
            *next += 1;
        }
    }
    let started = Instant::now();
    let mut latencies = Vec::new();
    while started.elapsed() < RUN {
        let (at, index, latency) = receiver.recv().unwrap();
        latencies.push(latency);
        logs[at].set_committed(index);
        while append(at, next[at]).is_err() {
            std::thread::yield_now();
        }
        next[at] += 1;
    }
    let seconds = started.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let count = latencies.len();
    println!(
        "{partitions:>4} partitions x {in_flight:>3} in flight, {:>3} KiB: {:>8.0} appends/s {:>7.1} MB/s  p50 {:>6} us  p99 {:>6} us",
        size / 1024,
        count as f64 / seconds,
        (count * size) as f64 / seconds / 1e6,
        latencies[count / 2].as_micros(),
        latencies[count * 99 / 100].as_micros(),
    );
    let closing = Instant::now();
    storage.close().unwrap();
    let closed = closing.elapsed();
    drop((logs, storage));
    let opening = Instant::now();
    let config = StorageConfig {
        dir: dir.path().to_owned(),
        ..StorageConfig::default()
    };
    let storage = Storage::open(config, Arc::new(RealDisk)).unwrap();
    println!("      close {closed:?}, open {:?}", opening.elapsed());
    drop(storage);
}

/// Many idle partitions with a vote and two small entries each: bytes and time of each.
fn many(partitions: u64) {
    let dir = tempfile::tempdir_in(".").unwrap();
    let config = StorageConfig {
        dir: dir.path().to_owned(),
        ..StorageConfig::default()
    };
    let storage = Storage::open(config.clone(), Arc::new(RealDisk)).unwrap();
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let before = resident();
    let started = Instant::now();
    let (sender, receiver) = sync_channel(partitions as usize);
    for id in 0..partitions {
        let log = storage.open_log(RaftGroupId(id)).unwrap();
        log.save_vote(Bytes::from_static(b"vote"), Box::new(|_| {}))
            .unwrap();
        let membership = Payload::Membership(Bytes::from(vec![1; 100]));
        let entries = vec![
            LogEntry {
                index: 0,
                term: 0,
                payload: membership,
            },
            LogEntry {
                index: 1,
                term: 1,
                payload: Payload::Blank,
            },
        ];
        let sender = sender.clone();
        log.append(
            entries,
            Box::new(move |result| sender.send(result).unwrap()),
        )
        .unwrap();
        log.set_committed(1);
    }
    (0..partitions).for_each(|_| receiver.recv().unwrap().unwrap());
    let bytes = resident().saturating_sub(before) / partitions;
    println!(
        "{partitions} idle partitions: {:?}, {bytes} bytes each",
        started.elapsed()
    );
    let crash = Instant::now();
    drop(storage);
    let storage = Storage::open(config.clone(), Arc::new(RealDisk)).unwrap();
    println!("      open after a crash {:?}", crash.elapsed());
    let closing = Instant::now();
    storage.close().unwrap();
    let closed = closing.elapsed();
    drop(storage);
    let opening = Instant::now();
    let storage = Storage::open(config, Arc::new(RealDisk)).unwrap();
    println!("      close {closed:?}, open {:?}", opening.elapsed());
    assert_eq!(storage.group_ids().len() as u64, partitions);
}

fn main() {
    // First, while the process is small.
    many(10_000);
    for (partitions, in_flight) in [(1, 1), (1, 16), (100, 1), (100, 4)] {
        for size in [1 << 10, 64 << 10] {
            run(partitions, size, in_flight);
        }
    }
}
