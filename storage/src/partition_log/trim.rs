//! What leaves a log at its front: segments and entries that are below the log start and purged.
//!
//! Invariant: nothing goes before both facts about it are durable, and each is a record of the WAL
//! that recovery reads again. So after a crash the same is found to be superfluous, whether its files
//! are still there or not. Run by the flusher only, as all that changes segments.

use super::state::LogState;
use crate::memory::{Memory, size_of};
use crate::segment::Segment;

impl LogState {
    /// Whether `trim` would remove anything.
    pub fn has_to_trim(&self) -> bool {
        !self.is_deleted
            && match self.segments.first() {
                Some(segment) => self.may_go(segment),
                None => self.droppable_next() > self.flushed_next,
            }
    }

    /// Takes out what is durably below the log start and purged. Gives the segments whose files are
    /// to be deleted.
    pub fn trim(&mut self, memory: &Memory) -> Vec<Segment> {
        let count = self.segments.iter().take_while(|s| self.may_go(s)).count();
        let gone: Vec<Segment> = self.segments.drain(..count).collect();
        if self.segments.is_empty() {
            // Never written to a segment, and never will be.
            let next = self.droppable_next();
            if next > self.flushed_next {
                memory.flushed(self.set_flushed(next));
            }
        }
        let first = self.segments.first().map(|segment| segment.first_index);
        self.first_index = first.unwrap_or(self.flushed_next).max(self.first_index);
        memory.evicted(self.evict_below(self.first_index));
        self.forget_terms();
        gone
    }

    fn may_go(&self, segment: &Segment) -> bool {
        let purged_next = self.durable_purged.map_or(0, |purged| purged.index + 1);
        segment.next_offset <= self.durable_log_start && segment.next_index <= purged_next
    }

    /// Up to here entries that are in no segment need never get there.
    fn droppable_next(&self) -> u64 {
        let purged_next = self.durable_purged.map_or(0, |purged| purged.index + 1);
        let end = purged_next.min(self.ready_next);
        let is_below = |index: &u64| {
            self.get(*index)
                .is_some_and(|entry| entry.next_offset <= self.durable_log_start)
        };
        let below = (self.flushed_next..end).take_while(is_below).count();
        self.flushed_next + below as u64
    }

    /// Drops the copies of entries below `index` from memory.
    pub fn evict_below(&mut self, index: u64) -> usize {
        let mut bytes = 0;
        while self.tail_first < index.min(self.flushed_next) {
            let Some(entry) = self.tail.pop_front() else {
                // No copies: the tail begins where segments end.
                break;
            };
            bytes += size_of(&entry.entry);
            self.tail_base = entry.next_offset;
            self.tail_first += 1;
        }
        bytes
    }

    /// The leader-epoch history begins with the term of the first entry that is stored.
    fn forget_terms(&mut self) {
        let is_over = |at: usize| {
            self.term_starts.get(at + 1).is_some_and(|next| {
                next.first_index <= self.first_index && next.first_offset <= self.log_start
            })
        };
        let count = (0..self.term_starts.len())
            .take_while(|at| is_over(*at))
            .count();
        self.term_starts.drain(..count);
    }
}
