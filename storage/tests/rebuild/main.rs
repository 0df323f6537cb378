//! Damaged segments are taken anew from another replica: all of the log can be read again, and nothing
//! else of it changes, whenever the power fails.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

#[path = "../common/mod.rs"]
mod common;
mod harmed;
mod model;

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
