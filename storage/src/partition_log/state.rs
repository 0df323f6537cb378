//! What one log holds in memory, without any I/O: the entries that are not in segments yet, copies of
//! the newest that are, and what is known of all the rest.
//!
//! ```text
//! first_index        tail_first      flushed_next     ready_next     durable_next    next_index
//!      |  segments only  |  tail: copies  |  tail: to flush |  committed, or  |  queued  |
//!      |                 |  of segments   |                 |  durable only   |          |
//! ```
//!
//! Invariant: first_index <= tail_first <= flushed_next <= ready_next <= min(durable, committed),
//! durable_next <= next_index; entries from `flushed_next` on are all in `tail`. What is purged is
//! committed and hidden from Raft, but stays where it is until the log start has passed it too.

use std::collections::VecDeque;

use bytes::Bytes;
use chronik_types::offset::Offset;

use super::damage::DamagedSegment;
use super::pins::Pins;
use crate::entry::{LogEntry, Purged, TermStart};
use crate::memory::size_of;
use crate::segment::Segment;

/// An entry in memory.
#[derive(Debug, Clone)]
pub struct TailEntry {
    pub entry: LogEntry,
    /// Log end offset after it.
    pub next_offset: Offset,
}

/// The opaque state of a replica after applying the entries up to `index`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaState {
    pub index: u64,
    pub state: Bytes,
}

#[derive(Debug, Default)]
pub struct LogState {
    pub segments: Vec<Segment>,
    /// Segments that reach beyond this index hold bytes that are not fsynced.
    pub dirty_from: Option<u64>,
    /// Segments up to this index are named by the checkpoint, or by a record of the WAL.
    pub recorded_next: u64,
    /// Files were made whose names are not fsynced.
    pub has_new_files: bool,
    pub tail: VecDeque<TailEntry>,
    pub tail_first: u64,
    /// Log end offset before the first entry of the tail.
    pub tail_base: Offset,
    /// Of the entries that are stored; Raft may see fewer, see `purged`.
    pub first_index: u64,
    pub flushed_next: u64,
    pub ready_next: u64,
    pub ready_bytes: usize,
    pub durable_next: u64,
    pub committed_next: u64,
    pub purged: Option<Purged>,
    pub durable_purged: Option<Purged>,
    pub log_start: Offset,
    pub durable_log_start: Offset,
    /// Below it compaction has removed older records of the same keys.
    pub cleaned_offset: Offset,
    pub term_starts: Vec<TermStart>,
    pub vote: Option<Bytes>,
    pub replica_state: Option<ReplicaState>,
    /// The newest one that was known not to be ahead of the durable log.
    pub durable_replica_state: Option<ReplicaState>,
    /// What truncations that are not durable yet have cut the log back to.
    pub pending_truncations: VecDeque<u64>,
    /// Which WAL file the durable entries lie in: from this index on, that file.
    pub wal_runs: VecDeque<(u64, u64)>,
    /// Records of this group below this number are superseded by the checkpoint and the segments.
    pub replay_from_record: u64,
    /// Entries were cut off since the last relocation: the WAL may have later records about them, but
    /// not the entries before them, once old files are recycled.
    pub was_cut: bool,
    pub segment_bytes: u64,
    /// Of the segments that are written here.
    pub generation: u32,
    /// For segments that are written beside others.
    pub next_generation: u32,
    /// Rises when all content is replaced: what was on its way for the old is of no use to the new.
    pub incarnation: u64,
    /// Wall clock when the first entry that is in no segment came.
    pub unflushed_since_ms: i64,
    pub appended_ms: i64,
    pub pins: Pins,
    /// In the order in which they were found.
    pub damaged: Vec<DamagedSegment>,
    pub is_deleted: bool,
    /// One compaction runs.
    pub is_compacting: bool,
    /// Waits in the flusher's queue of logs with something to delete.
    pub is_trim_queued: bool,
    /// Waits in the flusher's queue.
    pub is_flush_queued: bool,
    /// Waits in the flusher's list of logs with copies in memory.
    pub is_evict_queued: bool,
}

impl LogState {
    pub fn next_index(&self) -> u64 {
        self.tail_first + self.tail.len() as u64
    }

    /// Nothing was ever appended, or nothing of it is left and no one was told otherwise.
    pub fn may_start_anywhere(&self) -> bool {
        self.next_index() == self.first_index && self.purged.is_none() && self.segments.is_empty()
    }

    /// The first entry that Raft may read.
    pub fn first_visible_index(&self) -> u64 {
        let after_purged = self.purged.map_or(0, |purged| purged.index + 1);
        self.first_index.max(after_purged)
    }

    pub fn log_end_offset(&self) -> Offset {
        self.tail
            .back()
            .map_or(self.tail_base, |entry| entry.next_offset)
    }

    /// Log end offset after the entries that are in segments, or were.
    pub fn flushed_offset(&self) -> Offset {
        let last = self
            .flushed_next
            .checked_sub(1)
            .and_then(|index| self.get(index));
        match (last, self.segments.last()) {
            (Some(entry), _) => entry.next_offset,
            (None, Some(segment)) => segment.next_offset,
            (None, None) => self.tail_base,
        }
    }

    /// Entry `index` if it is in memory.
    pub fn get(&self, index: u64) -> Option<&TailEntry> {
        self.tail
            .get(usize::try_from(index.checked_sub(self.tail_first)?).ok()?)
    }

    pub fn term_at(&self, index: u64) -> Option<u64> {
        if index < self.first_visible_index() || index >= self.next_index() {
            let purged = self.purged.filter(|purged| purged.index == index);
            return purged.map(|purged| purged.term);
        }
        Some(self.stored_term_at(index))
    }

    /// The term of an entry that is stored, also of one that Raft does not see any more.
    pub fn stored_term_at(&self, index: u64) -> u64 {
        let after = self
            .term_starts
            .partition_point(|start| start.first_index <= index);
        let start = self.term_starts.get(after.saturating_sub(1));
        start.map_or(0, |start| start.term)
    }

    /// Position in the tail of the entry that holds `offset`, or of the first one after it.
    pub fn tail_position_of(&self, offset: Offset) -> usize {
        self.tail
            .partition_point(|entry| entry.next_offset <= offset)
    }

    /// Lets an empty log start elsewhere.
    pub fn start_at(&mut self, index: u64) {
        debug_assert!(self.may_start_anywhere());
        self.first_index = index;
        self.tail_first = index;
        self.flushed_next = index;
        self.ready_next = index;
        self.durable_next = index;
        self.committed_next = index;
    }

    /// Adds an entry that was checked to continue the log.
    pub fn push(&mut self, entry: TailEntry, now_ms: i64) {
        if self.flushed_next == self.next_index() {
            self.unflushed_since_ms = now_ms;
        }
        self.appended_ms = now_ms;
        let (term, first_index) = (entry.entry.term, entry.entry.index);
        if self
            .term_starts
            .last()
            .is_none_or(|start| start.term != term)
        {
            let first_offset = self.log_end_offset();
            self.term_starts.push(TermStart {
                term,
                first_index,
                first_offset,
            });
        }
        self.tail.push_back(entry);
    }

    /// Removes the entries from `next` on, which must not be flushed, and gives their bytes.
    pub fn cut(&mut self, next: u64) -> usize {
        self.was_cut = true;
        let keep = next.saturating_sub(self.tail_first) as usize;
        let mut bytes = 0;
        while self.tail.len() > keep {
            bytes += self
                .tail
                .pop_back()
                .map_or(0, |entry| size_of(&entry.entry));
        }
        while self
            .term_starts
            .last()
            .is_some_and(|start| start.first_index >= next)
        {
            self.term_starts.pop();
        }
        while self
            .wal_runs
            .back()
            .is_some_and(|(first, _)| *first >= next)
        {
            self.wal_runs.pop_back();
        }
        self.durable_next = self.durable_next.min(self.next_index());
        bytes
    }

    /// Entries `first..next` are durable in a WAL file now, unless they were cut off meanwhile.
    pub fn made_durable(&mut self, first: u64, next: u64, file_sequence: u64) {
        let next = self
            .pending_truncations
            .iter()
            .copied()
            .fold(next, u64::min);
        if first >= next {
            return;
        }
        if self
            .wal_runs
            .back()
            .is_none_or(|(_, sequence)| *sequence != file_sequence)
        {
            self.wal_runs.push_back((first, file_sequence));
        }
        self.durable_next = self.durable_next.max(next);
    }

    /// All entries that were not in segments were written to the WAL once more: none of them, nor any
    /// later one, lies in an older file, and what the WAL says before that record is superseded.
    pub fn relocated(&mut self, record_number: u64, file_sequence: u64) {
        self.replay_from_record = record_number;
        self.wal_runs
            .retain(|(_, sequence)| *sequence > file_sequence);
        if self.durable_next > self.flushed_next {
            self.wal_runs.push_front((self.flushed_next, file_sequence));
        }
    }

    /// Moves `ready_next` up, and gives the bytes that became ready.
    pub fn advance_ready(&mut self) -> usize {
        let next = self.committed_next.min(self.durable_next);
        let mut bytes = 0;
        while self.ready_next < next {
            bytes += self
                .get(self.ready_next)
                .map_or(0, |entry| size_of(&entry.entry));
            self.ready_next += 1;
        }
        self.ready_bytes += bytes;
        bytes
    }

    /// Whether the log needs something from the WAL files before `first_kept`, or could not be
    /// replayed without them.
    pub fn needs_files_before(&self, first_kept: u64) -> bool {
        !self.is_deleted
            && (self.was_cut || self.oldest_wal_file().is_some_and(|file| file < first_kept))
    }

    /// The oldest WAL file that holds entries which are not in segments.
    fn oldest_wal_file(&self) -> Option<u64> {
        self.wal_runs.front().map(|(_, sequence)| *sequence)
    }

    /// Entries below `next` are in segments. Gives their bytes in memory.
    pub fn set_flushed(&mut self, next: u64) -> usize {
        let mut bytes = 0;
        while self.flushed_next < next {
            bytes += self
                .get(self.flushed_next)
                .map_or(0, |entry| size_of(&entry.entry));
            self.flushed_next += 1;
        }
        self.ready_bytes -= bytes;
        while self
            .wal_runs
            .get(1)
            .is_some_and(|(first, _)| *first <= next)
        {
            self.wal_runs.pop_front();
        }
        if let Some((first, _)) = self.wal_runs.front_mut() {
            if next >= self.durable_next {
                self.wal_runs.clear();
            } else {
                *first = (*first).max(next);
            }
        }
        bytes
    }

    /// Drops copies of flushed entries, oldest first, until `wanted` bytes are gone. Gives how many.
    pub fn evict(&mut self, wanted: usize) -> usize {
        let mut bytes = 0;
        while bytes < wanted && self.tail_first < self.flushed_next {
            let Some(entry) = self.tail.pop_front() else {
                break;
            };
            bytes += size_of(&entry.entry);
            self.tail_base = entry.next_offset;
            self.tail_first += 1;
        }
        if self.tail.is_empty() {
            self.tail.shrink_to_fit();
        }
        bytes
    }

    /// Bytes of memory of the entries that are not in segments.
    pub fn pinned_bytes(&self) -> usize {
        let from = (self.flushed_next - self.tail_first) as usize;
        self.tail
            .range(from..)
            .map(|entry| size_of(&entry.entry))
            .sum()
    }

    /// Takes over the content of another log; what belongs to the group and to the handles stays.
    pub fn replace_content(&mut self, new: LogState) {
        let old = std::mem::take(self);
        *self = LogState {
            vote: old.vote,
            replay_from_record: old.replay_from_record,
            next_generation: old.next_generation.max(new.generation.saturating_add(1)),
            incarnation: old.incarnation + 1,
            has_new_files: old.has_new_files,
            pins: old.pins,
            is_compacting: old.is_compacting,
            is_flush_queued: old.is_flush_queued,
            is_trim_queued: old.is_trim_queued,
            is_evict_queued: old.is_evict_queued,
            ..new
        };
    }

    /// The purge and the state that went with it are on disk.
    pub fn made_purge_durable(&mut self, purged: Purged, saved: ReplicaState) {
        let is_newer = |old: Purged| old.index >= purged.index;
        if !self.durable_purged.is_some_and(is_newer) {
            self.durable_purged = Some(purged);
        }
        let durable = self.durable_replica_state.as_ref();
        if durable.is_none_or(|durable| durable.index < saved.index) {
            self.durable_replica_state = Some(saved);
        }
    }

    /// Keeps the replica's state, and the one before as long as this one is ahead of the disk.
    pub fn set_replica_state(&mut self, state: ReplicaState) {
        if state.index < self.durable_next {
            self.durable_replica_state = Some(state.clone());
        }
        self.replica_state = Some(state);
    }

    /// The newest replica state that is not ahead of the durable log.
    pub fn checkpointed_replica_state(&mut self) -> Option<&ReplicaState> {
        if let Some(state) = &self.replica_state
            && state.index < self.durable_next
        {
            self.durable_replica_state = Some(state.clone());
        }
        self.durable_replica_state.as_ref()
    }
}
