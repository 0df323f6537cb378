//! The log of one partition: append, truncate, vote, and what the caller knows to be committed.
//!
//! Invariant: what changes a log is queued for the WAL while the log is locked, so the WAL has the
//! operations of one log in the order in which they took effect in memory.

mod read;
pub mod replay;
pub mod state;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::batches;

use self::state::{LogState, ReplicaState, TailEntry};
use crate::core::Core;
use crate::entry::{LogEntry, OnDurable, Payload, TermStart};
use crate::error::StorageError;
use crate::memory::size_of;
use crate::sync::lock;
use crate::wal::{Done, Record};

const VOTE_MAX_BYTES: usize = 128;
const ENTRY_MAX_BYTES: usize = 128 << 20;
const APPEND_MAX_BYTES: usize = 1 << 30;
/// A log is flushed when this much of it is ready.
pub const FLUSH_FROM_BYTES: usize = 1 << 20;

/// Handle on the log of one partition. Cheap to clone; all clones are the same log. Calls do not
/// wait for the disk unless they say so; `append`, `truncate_after` and `save_vote` wait when the
/// WAL's queue is full.
#[derive(Clone)]
pub struct PartitionLog {
    log: Arc<Log>,
}

/// The log itself, as the storage's threads share it.
pub struct Log {
    pub core: Arc<Core>,
    pub group: RaftGroupId,
    state: Mutex<LogState>,
}

impl Log {
    pub fn new(core: Arc<Core>, group: RaftGroupId, replay_from_record: u64) -> Self {
        let segment_bytes = core.segment_bytes;
        let state = LogState {
            replay_from_record,
            segment_bytes,
            ..LogState::default()
        };
        Log::recovered(core, group, state)
    }

    pub fn recovered(core: Arc<Core>, group: RaftGroupId, state: LogState) -> Self {
        Log {
            core,
            group,
            state: Mutex::new(state),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, LogState> {
        lock(&self.state)
    }

    /// To be called after the committed or the durable part has grown.
    pub fn advance_ready(self: &Arc<Self>, mut state: MutexGuard<'_, LogState>) {
        let bytes = state.advance_ready();
        self.core.memory.make_ready(bytes);
        let is_due = state.ready_bytes >= FLUSH_FROM_BYTES && !state.is_flush_queued;
        if is_due {
            state.is_flush_queued = true;
        }
        drop(state);
        if is_due {
            self.core.signals.flush(self.clone());
        }
    }

    fn check_usable(&self, state: &LogState) -> Result<(), StorageError> {
        if state.is_deleted {
            Err(StorageError::Deleted(self.group))
        } else {
            Ok(())
        }
    }
}

impl PartitionLog {
    pub(crate) fn new(log: Arc<Log>) -> Self {
        PartitionLog { log }
    }

    pub fn group_id(&self) -> RaftGroupId {
        self.log.group
    }

    /// Appends entries that continue the log, in index and in offset; readable when it returns. An
    /// empty log may start at any index. `on_durable` is called once from the WAL thread, after
    /// the fsync that covers them; not at all if this returns an error.
    pub fn append(
        &self,
        entries: Vec<LogEntry>,
        on_durable: OnDurable,
    ) -> Result<(), StorageError> {
        let core = &self.log.core;
        core.poison.check()?;
        let bytes: usize = entries.iter().map(size_of).sum();
        if bytes > APPEND_MAX_BYTES {
            return Err(too_large("append", bytes, APPEND_MAX_BYTES));
        }
        let has_batches = entries
            .iter()
            .any(|e| matches!(e.payload, Payload::Batches { .. }));
        let prepared = self.prepare(entries)?;
        if has_batches {
            // Blank and membership entries always go: without them nothing could be committed,
            // and the memory never be freed.
            core.memory
                .check(bytes)
                .inspect_err(|_| core.signals.free_memory())?;
        }
        let reservation = core.wal.reserve(bytes)?;
        let mut state = self.log.lock();
        self.log.check_usable(&state)?;
        if let Some(first) = prepared.first() {
            self.check_continues(&state, first.entry.index, &prepared)?;
            if state.is_empty() {
                state.start_at(first.entry.index);
            }
        }
        let entries = prepared.iter().map(|prepared| &prepared.entry);
        let record = Record::entries(self.log.group, false, state.committed_next, entries);
        let first = state.next_index();
        let mut next_offset = state.log_end_offset();
        for mut entry in prepared {
            match entry.entry.payload {
                Payload::Batches { .. } => next_offset = entry.next_offset,
                _ => entry.next_offset = next_offset,
            }
            state.push(entry);
        }
        let next = state.next_index();
        core.memory.add(bytes);
        reservation.push(record, self.when_durable(first, next, on_durable));
        drop(state);
        core.evict();
        if core.memory.excess() > 0 {
            core.signals.free_memory();
        }
        Ok(())
    }

    fn when_durable(&self, first: u64, next: u64, on_durable: OnDurable) -> Done {
        let log = self.log.clone();
        Box::new(move |written| {
            let written = written.map(|written| {
                let mut state = log.lock();
                if !state.is_deleted {
                    state.made_durable(first, next, written.file_sequence);
                    log.advance_ready(state);
                }
            });
            on_durable(written);
        })
    }

    /// Checks each entry by itself, and each but the first against the one before.
    fn prepare(&self, entries: Vec<LogEntry>) -> Result<Vec<TailEntry>, StorageError> {
        let mut prepared: Vec<TailEntry> = Vec::with_capacity(entries.len());
        let mut expected_offset: Option<Offset> = None;
        for entry in entries {
            let size = entry.payload.size_bytes();
            if size > ENTRY_MAX_BYTES {
                return Err(too_large("entry", size, ENTRY_MAX_BYTES));
            }
            if let Some(last) = prepared.last()
                && last.entry.index.checked_add(1) != Some(entry.index)
            {
                return Err(self.out_of_order("index", last.entry.index + 1, entry.index));
            }
            let mut next = Offset::ZERO;
            if let Payload::Batches {
                bytes,
                base_offset,
                next_offset,
            } = &entry.payload
            {
                if let Some(expected) = expected_offset
                    && expected != *base_offset
                {
                    return Err(self.out_of_order("offset", expected.0, base_offset.0));
                }
                check_batches(bytes, *base_offset, *next_offset).map_err(|why| {
                    let (group, index) = (self.log.group, entry.index);
                    StorageError::InvalidEntry {
                        group,
                        index,
                        why: why.into(),
                    }
                })?;
                next = *next_offset;
                expected_offset = Some(next);
            }
            prepared.push(TailEntry {
                entry,
                next_offset: next,
            });
        }
        // The offset of the first batches is checked against the log when that is locked.
        Ok(prepared)
    }

    fn check_continues(
        &self,
        state: &LogState,
        first_index: u64,
        entries: &[TailEntry],
    ) -> Result<(), StorageError> {
        if !state.is_empty() && first_index != state.next_index() {
            return Err(self.out_of_order("index", state.next_index(), first_index));
        }
        let base_offset = entries.iter().find_map(|entry| match &entry.entry.payload {
            Payload::Batches { base_offset, .. } => Some(*base_offset),
            _ => None,
        });
        let log_end_offset = state.log_end_offset();
        match base_offset {
            Some(base_offset) if base_offset != log_end_offset => {
                Err(self.out_of_order("offset", log_end_offset.0, base_offset.0))
            }
            _ => Ok(()),
        }
    }

    fn out_of_order(
        &self,
        what: &'static str,
        expected: impl Into<i128>,
        actual: impl Into<i128>,
    ) -> StorageError {
        let (expected, actual) = (expected.into(), actual.into());
        StorageError::OutOfOrder {
            group: self.log.group,
            what,
            expected,
            actual,
        }
    }

    /// Removes the entries above `index`, all if `None`. Refused for committed entries.
    pub fn truncate_after(
        &self,
        index: Option<u64>,
        on_durable: OnDurable,
    ) -> Result<(), StorageError> {
        let core = &self.log.core;
        core.poison.check()?;
        let reservation = core.wal.reserve(0)?;
        let mut state = self.log.lock();
        self.log.check_usable(&state)?;
        let next = index
            .map_or(0, |index| index.saturating_add(1))
            .max(state.first_index);
        if next < state.committed_next.min(state.next_index()) {
            let committed = state.committed_next - 1;
            return Err(StorageError::TruncatesCommitted {
                group: self.log.group,
                index,
                committed,
            });
        }
        core.memory.remove(state.cut(next));
        state.pending_truncations.push_back(next);
        let log = self.log.clone();
        let done: Done = Box::new(move |written| {
            log.lock().pending_truncations.pop_front();
            on_durable(written.map(drop));
        });
        reservation.push(Record::truncate(self.log.group, next), done);
        Ok(())
    }

    /// Saves Raft's vote, opaque, at most 128 bytes; ordered with appends.
    pub fn save_vote(&self, vote: Bytes, on_durable: OnDurable) -> Result<(), StorageError> {
        let core = &self.log.core;
        core.poison.check()?;
        if vote.len() > VOTE_MAX_BYTES {
            return Err(too_large("vote", vote.len(), VOTE_MAX_BYTES));
        }
        let reservation = core.wal.reserve(vote.len())?;
        let mut state = self.log.lock();
        self.log.check_usable(&state)?;
        let record = Record::vote(self.log.group, &vote);
        state.vote = Some(vote);
        reservation.push(
            record,
            Box::new(move |written| on_durable(written.map(drop))),
        );
        Ok(())
    }

    /// The vote that was saved last.
    pub fn vote(&self) -> Option<Bytes> {
        self.log.lock().vote.clone()
    }

    /// Entries up to `index` will never be truncated, and may move to segments. Not an fsync. What
    /// the log does not have yet does not count.
    pub fn set_committed(&self, index: u64) {
        let mut state = self.log.lock();
        let next = index.saturating_add(1).min(state.next_index());
        if next > state.committed_next {
            state.committed_next = next;
            self.log.advance_ready(state);
        }
    }

    /// After a restart at least what is in segments or was known at the last durable append.
    pub fn committed(&self) -> Option<u64> {
        let state = self.log.lock();
        (state.committed_next > state.first_index).then(|| state.committed_next - 1)
    }

    pub fn first_index(&self) -> u64 {
        self.log.lock().first_index
    }

    /// Index and term of the last entry.
    pub fn last_entry_id(&self) -> Option<(u64, u64)> {
        let state = self.log.lock();
        let last = state.next_index().checked_sub(1)?;
        Some((last, state.term_at(last)?))
    }

    /// The last entry that is fsynced here.
    pub fn durable_index(&self) -> Option<u64> {
        let state = self.log.lock();
        (state.durable_next > state.first_index).then(|| state.durable_next - 1)
    }

    /// Never reads the disk.
    pub fn term_at(&self, index: u64) -> Result<Option<u64>, StorageError> {
        let state = self.log.lock();
        self.log.check_usable(&state)?;
        Ok(state.term_at(index))
    }

    /// The leader-epoch history, always in memory.
    pub fn term_starts(&self) -> Vec<TermStart> {
        self.log.lock().term_starts.clone()
    }

    pub fn log_start_offset(&self) -> Offset {
        self.log.lock().log_start_offset()
    }

    pub fn log_end_offset(&self) -> Offset {
        self.log.lock().log_end_offset()
    }

    /// Keeps the replica's opaque state as of `index`; written by checkpoint and close. After a
    /// crash an older one may come back, never one ahead of the durable log.
    pub fn save_replica_state(&self, index: u64, state: Bytes) {
        self.log
            .lock()
            .set_replica_state(ReplicaState { index, state });
    }

    pub fn replica_state(&self) -> Option<(u64, Bytes)> {
        let state = self.log.lock();
        state
            .replica_state
            .as_ref()
            .map(|saved| (saved.index, saved.state.clone()))
    }

    /// Bytes of record batches in the log.
    pub fn size_bytes(&self) -> u64 {
        let state = self.log.lock();
        let flushed: u64 = state.segments.iter().map(|segment| segment.log_bytes).sum();
        let from = (state.flushed_next - state.tail_first) as usize;
        let batches = state
            .tail
            .range(from..)
            .filter_map(|entry| match &entry.entry.payload {
                Payload::Batches { bytes, .. } => Some(bytes.len() as u64),
                _ => None,
            });
        flushed + batches.sum::<u64>()
    }

    /// From now on segments of this log are sealed at this size.
    pub fn set_segment_bytes(&self, segment_bytes: u64) {
        self.log.lock().segment_bytes = segment_bytes;
    }

    /// Entries of `range`, at least one if there is any, then up to `max_bytes`. May read the disk.
    pub fn read_entries(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> Result<Vec<LogEntry>, StorageError> {
        self.log.read_entries(range, max_bytes)
    }

    /// As `read_entries`; `None` if the disk is needed.
    pub fn read_entries_cached(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> Option<Vec<LogEntry>> {
        self.log.read_entries_cached(range, max_bytes)
    }

    /// Log end offset after entry `index`. May read the disk.
    pub fn offset_at(&self, index: u64) -> Result<Option<Offset>, StorageError> {
        self.log.offset_at(index)
    }

    /// Whole batches in order from the one that holds `from`, none that ends above `limit`: at
    /// least one if there is any, then up to `max_bytes`. May read the disk.
    pub fn read(
        &self,
        from: Offset,
        limit: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, StorageError> {
        self.log.read(from, limit, max_bytes)
    }

    /// As `read`; `None` if the disk is needed, or if `read` would fail.
    pub fn read_cached(&self, from: Offset, limit: Offset, max_bytes: usize) -> Option<Vec<Bytes>> {
        self.log.read_cached(from, limit, max_bytes)
    }

    /// The first batch with a timestamp at or after `timestamp_ms`, if it ends at or below `limit`.
    /// May read the disk.
    pub fn batch_for_timestamp(
        &self,
        timestamp_ms: i64,
        limit: Offset,
    ) -> Result<Option<Bytes>, StorageError> {
        self.log.batch_for_timestamp(timestamp_ms, limit)
    }

    /// The first of the batches with the largest timestamp. May read the disk.
    pub fn max_timestamp_batch(&self, limit: Offset) -> Result<Option<Bytes>, StorageError> {
        self.log.max_timestamp_batch(limit)
    }
}

/// Checks that the bytes are batches without gaps from `base` to `next`, stamped by one leader.
pub fn check_batches(bytes: &Bytes, base: Offset, next: Offset) -> Result<(), String> {
    let mut offset = base;
    let mut leader_epoch = None;
    for batch in batches(bytes) {
        let (_, header) = batch.map_err(|e| e.to_string())?;
        if header.base_offset != offset {
            return Err(format!(
                "a batch has offset {}, {offset} is due",
                header.base_offset
            ));
        }
        if header.next_offset() <= offset {
            return Err("a batch has no offsets".to_owned());
        }
        if *leader_epoch.get_or_insert(header.leader_epoch) != header.leader_epoch {
            return Err("the batches have several leader epochs".to_owned());
        }
        offset = header.next_offset();
    }
    if offset != next || offset == base {
        return Err(format!("the batches end at offset {offset}, not at {next}"));
    }
    Ok(())
}

fn too_large(what: &'static str, size_bytes: usize, max_bytes: usize) -> StorageError {
    StorageError::TooLarge {
        what,
        size_bytes,
        max_bytes,
    }
}
