//! Deletes what is below a log's start, and seals segments.

use std::sync::Arc;

use super::Flusher;
use crate::counters::Counters;
use crate::error::StorageError;
use crate::partition_log::Log;

impl Flusher {
    /// Deletes segments and entries that are durably below the log start and purged.
    pub(super) fn trim(&self, log: &Arc<Log>) -> Result<(), StorageError> {
        self.core.poison.check()?;
        let gone = {
            let mut state = log.lock();
            state.is_trim_queued = false;
            if !state.has_to_trim() {
                return Ok(());
            }
            let mut gone = state.trim(&self.core.memory);
            let bytes = gone.iter().map(|segment| segment.log_bytes).sum();
            Counters::add(&self.core.counters.segments_deleted, gone.len() as u64);
            Counters::add(&self.core.counters.segment_bytes_deleted, bytes);
            // So that the next checkpoint makes it durable that the names are gone.
            state.has_new_files |= !gone.is_empty();
            gone.retain(|segment| state.doom(segment.id()));
            if state.forget_damage() {
                self.core.damage.tell();
            }
            gone
        };
        for segment in gone {
            self.core.files.remove(log.group, segment.id());
        }
        Ok(())
    }

    /// A clean start does not look for files that nothing refers to, so none may be left.
    pub(super) fn trim_all(&self) -> Result<(), StorageError> {
        for log in self.logs.all() {
            self.trim(&log)?;
            let doomed = log.lock().take_doomed();
            for id in doomed {
                self.core.files.remove(log.group, id);
            }
        }
        Ok(())
    }

    /// Flushes all that is committed, and seals the active segment.
    pub(super) fn roll(&self, log: &Arc<Log>) -> Result<(), StorageError> {
        self.core.poison.check()?;
        self.flush(log)?;
        let mut state = log.lock();
        // A segment without batches would have its successor's name.
        if let Some(last) = state.segments.last_mut().filter(|last| last.log_bytes > 0) {
            last.is_sealed = true;
        }
        Ok(())
    }
}
