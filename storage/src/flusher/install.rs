//! Replaces all content of a log at once.
//!
//! ```text
//! 1. all files of the new content are fsynced, and their names    an unfinished copy: a start keeps it
//! 2. memory says what the new log is, and the WAL gets a record   one step for everybody else
//!    with the same
//! 3. the record is durable                                         from here on it is the new log
//! 4. the old log's files go                                        unknown files: a start removes them
//! ```

use super::Flusher;
use crate::error::StorageError;
use crate::memory::size_of;
use crate::partition_log::state::LogState;
use crate::segment::SegmentId;
use crate::transfer::InstallRequest;
use crate::wal::Record;

impl Flusher {
    pub(super) fn install(&self, request: InstallRequest) -> Result<(), StorageError> {
        self.core.poison.check()?;
        let InstallRequest { log, content } = request;
        let body = content.encode_alone();
        let (answer, old) = {
            let mut state = log.lock();
            if state.is_deleted {
                // The files went with the folder, or go with it.
                return Err(StorageError::Deleted(log.group));
            }
            self.release_memory(&mut state);
            let old: Vec<SegmentId> = state.segments.iter().map(|s| s.id()).collect();
            let new = content.into_state(state.segment_bytes);
            let was_damaged = state.damage().is_some();
            state.replace_content(new);
            if was_damaged {
                self.core.damage.tell();
            }
            // The record is queued under the lock: appends to the new log come after it.
            (self.push(Record::install(log.group, &body), false), old)
        };
        let written = self.wait_for(answer)?;
        let gone: Vec<SegmentId> = {
            let mut state = log.lock();
            // It need not be replayed on top of a checkpoint that has more than it says.
            state.replay_from_record = written.record_number + 1;
            old.into_iter().filter(|id| state.doom(*id)).collect()
        };
        for id in gone {
            self.core.files.remove(log.group, id);
        }
        Ok(())
    }

    /// Counts a log's entries out of memory.
    pub(super) fn release_memory(&self, state: &mut LogState) {
        let memory = &self.core.memory;
        let all: usize = state.tail.iter().map(|entry| size_of(&entry.entry)).sum();
        let pinned = state.pinned_bytes();
        memory.remove_ready(state.ready_bytes);
        memory.remove(pinned);
        memory.evicted(all - pinned);
        state.tail.clear();
        state.tail_first = state.flushed_next;
        state.ready_next = state.flushed_next;
        state.ready_bytes = 0;
    }
}
