//! Moves entries of one log from memory to its segments, and drops copies that memory has no room for.

use std::sync::Arc;

use super::Flusher;
use crate::entry::LogEntry;
use crate::error::StorageError;
use crate::memory::size_of;
use crate::partition_log::{FLUSH_FROM_BYTES, Log};
use crate::segment::appender::Appender;
use crate::segment::{FileKind, Segment, dir_of};

/// Bytes that are written at a time.
const FLUSH_MAX_BYTES: usize = 8 << 20;

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

    /// Gives whether there was anything to flush.
    fn flush_some(&self, log: &Arc<Log>) -> Result<bool, StorageError> {
        let (mut appender, next, active_at) = {
            let state = log.lock();
            if state.is_deleted || state.flushed_next >= state.ready_next {
                return Ok(false);
            }
            // The flushed part never changes but here, so its end is known without the lock.
            let base_offset = match state.flushed_next.checked_sub(1).and_then(|i| state.get(i)) {
                Some(entry) => entry.next_offset,
                None => state
                    .segments
                    .last()
                    .map_or(state.tail_base, |s| s.next_offset),
            };
            let appender = Appender::new(
                &self.core.files,
                log.group,
                state.segment_bytes,
                state.segments.last().copied(),
                state.flushed_next,
                base_offset,
            );
            (
                appender,
                state.flushed_next,
                state.segments.len().saturating_sub(1),
            )
        };
        let entries = entries_from(log, next);
        for entry in &entries {
            appender.append(entry)?;
        }
        let segments = appender.finish()?;
        self.publish(log, segments, active_at, next + entries.len() as u64);
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
        state.first_dirty_segment.get_or_insert(active_at);
        let bytes = state.set_flushed(next);
        self.core.memory.flushed(bytes);
        if !state.is_evict_queued {
            state.is_evict_queued = true;
            drop(state);
            self.core.signals.evictable(log.clone());
        }
    }

    /// Fsyncs what was flushed. Sealed segments are synced with their indexes; those of the active
    /// one may be lost, since lookups can do without.
    pub(super) fn sync(&self, log: &Arc<Log>, with_indexes: bool) -> Result<(), StorageError> {
        let (first_dirty, segments, has_new_files) = {
            let state = log.lock();
            match state.first_dirty_segment {
                Some(first) if !state.is_deleted => {
                    (first, state.segments.clone(), state.has_new_files)
                }
                _ => return Ok(()),
            }
        };
        let last = segments.len() - 1;
        for (at, segment) in segments.iter().enumerate().skip(first_dirty) {
            for kind in FileKind::ALL {
                let is_index = matches!(kind, FileKind::OffsetIndex | FileKind::TimeIndex);
                if segment.file_bytes(kind) == 0 || (is_index && at == last && !with_indexes) {
                    continue;
                }
                let file = self
                    .core
                    .files
                    .open(log.group, segment.base_offset, kind, false);
                file.and_then(|file| file.sync_data()).map_err(|e| {
                    let path = self.core.files.path(log.group, segment.base_offset, kind);
                    StorageError::io("cannot sync", &path, e)
                })?;
            }
        }
        if has_new_files {
            let dir = dir_of(self.core.files.partitions(), log.group);
            self.disk
                .sync_dir(&dir)
                .map_err(|e| StorageError::io("cannot sync", &dir, e))?;
        }
        let mut state = log.lock();
        state.first_dirty_segment = None;
        state.has_new_files = false;
        Ok(())
    }

    /// Drops copies of flushed entries until memory is within its budget, and flushes if that is
    /// not enough.
    pub(super) fn free_memory(&mut self) -> Result<(), StorageError> {
        self.core.poison.check()?;
        self.evict();
        let memory = &self.core.memory;
        // With little to flush the rest waits for its commit, and nothing can be done.
        if memory.is_over_budget() && memory.ready() > memory.max_bytes / 16 {
            let with_ready_bytes = |log: Arc<Log>| {
                let bytes = log.lock().ready_bytes;
                (bytes, log)
            };
            let mut logs: Vec<_> = self.logs.all().into_iter().map(with_ready_bytes).collect();
            logs.sort_unstable_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
            for (bytes, log) in logs {
                if bytes == 0 || !self.core.memory.is_over_budget() {
                    break;
                }
                self.flush(&log)?;
                self.evict();
            }
        }
        Ok(())
    }

    /// Goes below the budget by an eighth, so as not to be called for every append.
    fn evict(&self) {
        let memory = &self.core.memory;
        if !memory.is_over_budget() {
            return;
        }
        let target = memory.max_bytes - memory.max_bytes / 8;
        while let Some(wanted) = memory
            .total()
            .checked_sub(target)
            .filter(|wanted| *wanted > 0)
        {
            let Some(log) = self.core.signals.next_evictable() else {
                return;
            };
            let mut state = log.lock();
            memory.evicted(state.evict(wanted));
            let has_more = state.tail_first < state.flushed_next && !state.is_deleted;
            state.is_evict_queued = has_more;
            drop(state);
            if has_more {
                self.core.signals.still_evictable(log);
            }
        }
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
