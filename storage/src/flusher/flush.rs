//! Moves entries of one log from memory to its segments, and drops copies that memory has no room for.

use std::io::ErrorKind;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use chronik_types::id::RaftGroupId;

use super::Flusher;
use crate::clock::now_ms;
use crate::entry::LogEntry;
use crate::error::{CANNOT_SYNC, StorageError};
use crate::memory::size_of;
use crate::partition_log::{FLUSH_FROM_BYTES, Log};
use crate::segment::appender::Appender;
use crate::segment::{FileKind, Segment, SegmentId, dir_of};
use crate::wal::Record;

/// Bytes that are written at a time.
const FLUSH_MAX_BYTES: usize = 8 << 20;
const SYNCS_PER_THREAD: usize = 4;
const SYNC_THREADS_MAX: usize = 8;

impl Flusher {
    /// Flushes a log that said it has enough.
    pub(super) fn flush_due(&mut self, log: &Arc<Log>) -> Result<(), StorageError> {
        self.core.poison.check()?;
        log.lock().is_flush_queued = false;
        if log.lock().ready_bytes >= FLUSH_FROM_BYTES {
            self.flush(log)?;
        }
        Ok(())
    }

    /// Writes all ready entries to segments. They are not fsynced.
    pub(super) fn flush(&self, log: &Arc<Log>) -> Result<(), StorageError> {
        while self.flush_some(log)? {}
        Ok(())
    }

    /// As `Core::announce_files`, for the thread that may have to run the WAL itself.
    fn announce_files(&self) -> Result<(), StorageError> {
        if !self.core.has_announced_files.load(Ordering::Acquire) {
            let mark = self.push(Record::mark(), false);
            self.wait_for(mark)?;
            self.core.has_announced_files.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Gives whether there was anything to flush.
    fn flush_some(&self, log: &Arc<Log>) -> Result<bool, StorageError> {
        let now_ms = now_ms();
        let (mut appender, next, active_at) = {
            let mut state = log.lock();
            if state.is_deleted || state.flushed_next >= state.ready_next {
                return Ok(false);
            }
            // What nobody will ever read needs no segment.
            if state.segments.is_empty() && state.has_to_trim() {
                state.trim(&self.core.memory);
                return Ok(true);
            }
            // The flushed part never changes but here, so its end is known without the lock.
            let active = state
                .segments
                .last()
                .filter(|last| !last.is_sealed)
                .copied();
            let active_at = state.segments.len() - usize::from(active.is_some());
            let segment = active.unwrap_or_else(|| {
                let id = SegmentId {
                    base_offset: state.flushed_offset(),
                    generation: state.generation,
                };
                Segment::new(id, state.flushed_next, now_ms)
            });
            let appender = Appender::new(
                &self.core.files,
                log.group,
                state.segment_bytes,
                segment,
                state.generation,
                now_ms,
            );
            (appender, state.flushed_next, active_at)
        };
        self.announce_files()?;
        let entries = entries_from(log, next);
        let appended = entries
            .iter()
            .try_for_each(|entry| appender.append(entry))
            .and_then(|()| appender.finish());
        let segments = match appended {
            Ok(segments) => segments,
            Err(error) => match self.seal_if_missing(log, &error)? {
                true => return Ok(true),
                false => return Err(error),
            },
        };
        self.publish(log, segments, active_at, next + entries.len() as u64);
        Ok(true)
    }

    /// Somebody has removed a file of the segment that is written: nothing may be written behind the
    /// hole, so a new one is begun. One without records is gone on with, hole and all, since the next
    /// would have its name. False: it is another error.
    fn seal_if_missing(&self, log: &Log, error: &StorageError) -> Result<bool, StorageError> {
        let StorageError::Io { file, source, .. } = error else {
            return Ok(false);
        };
        let mut state = log.lock();
        let active = state.segments.last().copied();
        let Some(active) = active.filter(|last| !last.is_sealed) else {
            return Ok(false);
        };
        let mut kinds = FileKind::ALL.into_iter();
        let kind = kinds.find(|kind| self.core.files.path(log.group, active.id(), *kind) == *file);
        let Some(kind) = kind.filter(|_| source.kind() == ErrorKind::NotFound) else {
            return Ok(false);
        };
        if let Some(last) = state.segments.last_mut() {
            last.is_sealed = active.log_bytes > 0;
        }
        state.has_new_files |= active.log_bytes == 0;
        drop(state);
        if active.log_bytes == 0 {
            let made = self.core.files.open(log.group, active.id(), kind, true);
            made.map_err(|e| StorageError::io("cannot make", file, e))?;
        }
        self.found_missing(log.group, active.id(), kind, file);
        Ok(true)
    }

    fn publish(&self, log: &Arc<Log>, segments: Vec<Segment>, active_at: usize, next: u64) {
        let mut state = log.lock();
        let had_file = |kind| {
            state
                .segments
                .get(active_at)
                .is_some_and(|s| s.file_bytes(kind) > 0)
        };
        let has_new_file =
            |kind| !had_file(kind) && segments.first().is_some_and(|s| s.file_bytes(kind) > 0);
        let has_new_files = segments.len() > 1 || FileKind::ALL.into_iter().any(has_new_file);
        state.has_new_files |= has_new_files;
        state.segments.truncate(active_at);
        state.segments.extend(segments);
        let first_new = state.flushed_next;
        state.dirty_from.get_or_insert(first_new);
        let bytes = state.set_flushed(next);
        state.unflushed_since_ms = now_ms();
        self.core.memory.flushed(bytes);
        let is_new = !std::mem::replace(&mut state.is_evict_queued, true);
        drop(state);
        if is_new {
            self.core.evictable.push(log.clone());
        }
        self.core.evict();
    }

    /// Fsyncs all that was flushed. Sealed segments are synced with their indexes; those of an active
    /// one may be lost, since lookups can do without.
    pub(super) fn sync_all(&self, with_indexes: bool) -> Result<(), StorageError> {
        let threads_max = match self.driven_wal {
            Some(_) => 1,
            None => SYNC_THREADS_MAX,
        };
        let mut dirty = Vec::new();
        let mut files = Vec::new();
        let mut dirs = Vec::new();
        for log in self.logs.all() {
            let state = log.lock();
            if state.is_deleted || (state.dirty_from.is_none() && !state.has_new_files) {
                continue;
            }
            let dirty_from = state.dirty_from.unwrap_or(u64::MAX);
            let is_dirty = |segment: &&Segment| segment.next_index > dirty_from;
            for segment in state.segments.iter().filter(is_dirty) {
                for kind in FileKind::ALL {
                    let is_index = matches!(kind, FileKind::OffsetIndex | FileKind::TimeIndex);
                    let is_needed = !is_index || segment.is_sealed || with_indexes;
                    if is_needed && segment.file_bytes(kind) > 0 {
                        files.push((log.group, segment.id(), kind));
                    }
                }
            }
            if state.has_new_files {
                dirs.push(dir_of(self.core.files.partitions(), log.group));
            }
            drop(state);
            dirty.push(log);
        }
        if !dirs.is_empty() {
            dirs.push(self.core.files.partitions().clone());
        }
        in_parallel(threads_max, &files, &|(group, id, kind)| {
            let path = self.core.files.path(*group, *id, *kind);
            let file = match self.core.files.open(*group, *id, *kind, false) {
                // Somebody has removed it: this log is damaged, the others are not.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    self.found_missing(*group, *id, *kind, &path);
                    return Ok(());
                }
                file => file,
            };
            file.and_then(|file| file.sync_data())
                .map_err(|e| StorageError::io(CANNOT_SYNC, &path, e))
        })?;
        in_parallel(threads_max, &dirs, &|dir| {
            self.disk
                .sync_dir(dir)
                .map_err(|e| StorageError::io(CANNOT_SYNC, dir, e))
        })?;
        for log in dirty {
            let mut state = log.lock();
            state.dirty_from = None;
            state.has_new_files = false;
        }
        Ok(())
    }

    fn found_missing(&self, group: RaftGroupId, id: SegmentId, kind: FileKind, path: &Path) {
        // Lookups can do without an index.
        let is_index = matches!(kind, FileKind::OffsetIndex | FileKind::TimeIndex);
        if let Some(log) = self.logs.get(group).filter(|_| !is_index) {
            let error = StorageError::corrupt(path, 0, "the file is missing");
            if log.lock().note_damage(group, id, &error) {
                self.core.damage.tell();
            }
        }
    }

    /// Flushes until memory is within its bounds. Only the flusher can make room when dropping
    /// copies is not enough.
    pub(super) fn free_memory(&mut self) -> Result<(), StorageError> {
        self.core.poison.check()?;
        self.core.evict();
        let memory = &self.core.memory;
        let (may_stay, is_refusing) = memory.room_to_make();
        // With little to flush the rest waits for its commit, and nothing can be done; but an append
        // that was refused may wait for just that little.
        let is_little = memory.excess() == 0 || memory.ready() <= memory.max_bytes / 16;
        if is_little && !is_refusing {
            return Ok(());
        }
        let with_ready_bytes = |log: Arc<Log>| {
            let bytes = log.lock().ready_bytes;
            (bytes, log)
        };
        let mut logs: Vec<_> = self.logs.all().into_iter().map(with_ready_bytes).collect();
        logs.sort_unstable_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        for (bytes, log) in logs {
            if bytes == 0 || memory.pinned() <= may_stay {
                break;
            }
            self.flush(&log)?;
        }
        Ok(())
    }
}

/// Ready entries from `next` on, as many as are written at a time.
fn entries_from(log: &Log, next: u64) -> Vec<LogEntry> {
    let state = log.lock();
    let mut entries = Vec::new();
    let mut size = 0;
    for index in next..state.ready_next {
        let Some(entry) = state.get(index) else { break };
        size += size_of(&entry.entry);
        if !entries.is_empty() && size > FLUSH_MAX_BYTES {
            break;
        }
        entries.push(entry.entry.clone());
    }
    entries
}

/// Fsyncs wait for the disk, and many that wait together cost little more than one.
fn in_parallel<T: Sync>(
    threads_max: usize,
    items: &[T],
    run: &(dyn Fn(&T) -> Result<(), StorageError> + Sync),
) -> Result<(), StorageError> {
    let threads = items.len().div_ceil(SYNCS_PER_THREAD).min(threads_max);
    if threads <= 1 {
        return items.iter().try_for_each(run);
    }
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            run(item)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}
