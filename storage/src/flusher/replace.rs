//! Puts segments in the place of others.
//!
//! ```text
//! 1. the new segments' files are fsynced, and their names     unknown files: removed at a start
//! 2. the segments to be replaced are in the checkpoint         so that replay finds them
//! 3. a record of the WAL says what takes whose place, durable  from here on it has the new ones
//! 4. memory says so too, and the old files go                  unknown files, as in 1
//! ```

use std::sync::Arc;

use super::Flusher;
use crate::error::StorageError;
use crate::partition_log::{Log, Origin, Replacement};
use crate::segment::SegmentId;
use crate::wal::Record;

impl Flusher {
    pub(super) fn replace(
        &self,
        log: &Arc<Log>,
        mut replacement: Replacement,
    ) -> Result<(), StorageError> {
        self.core.poison.check()?;
        let (incarnation, is_recorded) = {
            let state = log.lock();
            log.check_usable(&state)?;
            let place = state
                .place_of(&replacement.old)
                .ok_or(StorageError::Superseded)?;
            // Compaction knows what it has read; another replica's files were chosen a while ago.
            if replacement.origin == Origin::Replica {
                replacement.cleaned_offset = state
                    .cleaned_with(&place, &replacement)
                    .ok_or(StorageError::Superseded)?;
            }
            let last = state.segments[place].last();
            let is_recorded = last.is_none_or(|last| last.next_index <= state.recorded_next);
            (state.incarnation, is_recorded)
        };
        if !is_recorded {
            self.checkpoint_now()?;
        }
        let record = Record::replace(log.group, &replacement.encode());
        // Nobody but this thread changes which segments there are.
        let answer = self.push(record, false);
        self.wait_for(answer)?;
        let gone: Vec<SegmentId> = {
            let mut state = log.lock();
            log.check_usable(&state)?;
            assert_eq!(
                state.incarnation, incarnation,
                "content changed beside the flusher"
            );
            let gone = state.apply_replacement(&replacement);
            state.has_new_files |= !gone.is_empty();
            // Copies in memory still have what was removed.
            let next = replacement.new.last().map_or(0, |new| new.next_index);
            self.core.memory.evicted(state.evict_below(next));
            if state.forget_damage() {
                self.core.damage.tell();
            }
            let gone = gone.into_iter().filter(|id| state.doom(*id)).collect();
            log.trim_if_due(state);
            gone
        };
        for id in gone {
            self.core.files.remove(log.group, id);
        }
        Ok(())
    }
}
