//! What all logs of one storage share.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};

use chronik_types::id::RaftGroupId;

use crate::counters::Counters;
use crate::error::{CANNOT_SYNC, StorageError};
use crate::flusher::Signals;
use crate::memory::Memory;
use crate::partition_log::Log;
use crate::partition_log::damage::DamageSignal;
use crate::poison::Poison;
use crate::segment::open_files::OpenFiles;
use crate::segment::{FileKind, SegmentId};
use crate::space::SpaceWatch;
use crate::sync::lock;
use crate::transfer::Unfinished;
use crate::wal::{Done, Record, WalQueue};

pub struct Core {
    pub files: OpenFiles,
    pub wal: Arc<WalQueue>,
    pub memory: Memory,
    pub signals: Signals,
    pub poison: Arc<Poison>,
    pub evictable: Evictable,
    pub space: SpaceWatch,
    pub counters: Counters,
    pub damage: Arc<DamageSignal>,
    /// The WAL says that files may have been made since the last orderly end.
    pub has_announced_files: AtomicBool,
    /// Of a log that is made: higher than any of the deleted ones. What is left of those, such as a
    /// reader, or a copy that nobody goes on with, may yet open, write and remove files under its names.
    pub first_generation: AtomicU32,
    pub unfinished: Unfinished,
    pub segment_bytes: u64,
    /// There are no threads: a driver does their work.
    pub is_driven: bool,
}

impl Core {
    /// Writes a piece of a file that no log refers to yet.
    pub fn write_file(
        &self,
        group: RaftGroupId,
        id: SegmentId,
        kind: FileKind,
        position: u64,
        bytes: &[u8],
    ) -> Result<(), StorageError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let file = self.files.open(group, id, kind, true);
        let written = file.and_then(|file| file.write_at(&[IoSlice::new(bytes)], position));
        written.map_err(|e| self.write_failed(&self.files.path(group, id, kind), e))
    }

    /// What was written can be made anew; the disk may be full.
    pub fn write_failed(&self, file: &Path, error: io::Error) -> StorageError {
        let error = StorageError::io("cannot write", file, error);
        if error.is_out_of_room() {
            self.space.found_no_room();
            return self.space.check(0).err().unwrap_or(error);
        }
        error
    }

    /// Fsyncs a segment's file; a failure stops the storage. Not for a file that could not be opened:
    /// its log may have been deleted.
    pub fn sync_file(
        &self,
        group: RaftGroupId,
        id: SegmentId,
        kind: FileKind,
    ) -> Result<(), StorageError> {
        let path = self.files.path(group, id, kind);
        let file = self.files.open(group, id, kind, false);
        let file = file.map_err(|e| StorageError::io("cannot open", &path, e))?;
        file.sync_data().map_err(|e| self.sync_failed(&path, e))
    }

    /// Nobody knows any more what is on the disk, and the next fsync would not tell. A folder that is
    /// gone with its log is no such failure.
    pub fn sync_failed(&self, file: &Path, error: io::Error) -> StorageError {
        let is_gone = error.kind() == io::ErrorKind::NotFound;
        let error = StorageError::io(CANNOT_SYNC, file, error);
        match is_gone {
            true => error,
            false => self.poison.set(&error.to_string()),
        }
    }

    /// To be called before files are made that no log refers to yet: after a crash the start then
    /// looks for them, which it leaves out if the WAL says nothing since the last orderly end.
    pub fn announce_files(&self) -> Result<(), StorageError> {
        if self.has_announced_files.load(Ordering::Acquire) {
            return Ok(());
        }
        let (answer, receiver) = sync_channel(1);
        let done: Done = Box::new(move |written| {
            let _ = answer.send(written);
        });
        self.wal.reserve_small(0)?.push(Record::mark(), done);
        receiver.recv().unwrap_or(Err(StorageError::Closed))?;
        self.has_announced_files.store(true, Ordering::Release);
        Ok(())
    }

    /// Drops copies of flushed entries as far as there are too many; the log that was flushed
    /// longest ago goes first. Called by those who append too, so that memory cannot outgrow its
    /// budget while the flusher is busy.
    pub fn evict(&self) {
        loop {
            let wanted = self.memory.excess();
            if wanted == 0 {
                return;
            }
            let Some(log) = self.evictable.pop() else {
                return;
            };
            let mut state = log.lock();
            self.memory.evicted(state.evict(wanted));
            let has_more = state.tail_first < state.flushed_next && !state.is_deleted;
            state.is_evict_queued = has_more;
            drop(state);
            if has_more {
                self.evictable.push_front(log);
            }
        }
    }
}

/// Logs with copies of flushed entries in memory, oldest flush first.
#[derive(Default)]
pub struct Evictable {
    logs: Mutex<VecDeque<Arc<Log>>>,
}

impl Evictable {
    pub fn push(&self, log: Arc<Log>) {
        lock(&self.logs).push_back(log);
    }

    /// Breaks the circle of logs that hold what holds this.
    pub fn clear(&self) {
        let logs = std::mem::take(&mut *lock(&self.logs));
        drop(logs);
    }

    fn pop(&self) -> Option<Arc<Log>> {
        lock(&self.logs).pop_front()
    }

    fn push_front(&self, log: Arc<Log>) {
        lock(&self.logs).push_front(log);
    }
}

/// All logs by group.
#[derive(Default)]
pub struct Logs {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    by_group: HashMap<RaftGroupId, Arc<Log>>,
    /// Groups that were deleted: a new log of the same group begins after this record of the WAL.
    deleted_at: HashMap<RaftGroupId, u64>,
}

impl Logs {
    pub fn new(
        logs: HashMap<RaftGroupId, Arc<Log>>,
        deleted_at: HashMap<RaftGroupId, u64>,
    ) -> Self {
        Logs {
            inner: Mutex::new(Inner {
                by_group: logs,
                deleted_at,
            }),
        }
    }

    pub fn group_ids(&self) -> Vec<RaftGroupId> {
        let mut ids: Vec<_> = lock(&self.inner).by_group.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    pub fn all(&self) -> Vec<Arc<Log>> {
        lock(&self.inner).by_group.values().cloned().collect()
    }

    pub fn get(&self, group: RaftGroupId) -> Option<Arc<Log>> {
        lock(&self.inner).by_group.get(&group).cloned()
    }

    pub fn get_or_make(&self, group: RaftGroupId, core: &Arc<Core>) -> Arc<Log> {
        let mut inner = lock(&self.inner);
        let replay_from_record = inner.deleted_at.get(&group).map_or(0, |record| record + 1);
        inner
            .by_group
            .entry(group)
            .or_insert_with(|| Arc::new(Log::new(core.clone(), group, replay_from_record)))
            .clone()
    }

    pub fn remove(&self, group: RaftGroupId, record_number: u64) {
        let mut inner = lock(&self.inner);
        inner.by_group.remove(&group);
        inner.deleted_at.insert(group, record_number);
    }

    /// Forgets deletions whose records are no longer in the WAL.
    pub fn forget_deleted_before(&self, record_number: u64) {
        lock(&self.inner)
            .deleted_at
            .retain(|_, record| *record >= record_number);
    }
}
