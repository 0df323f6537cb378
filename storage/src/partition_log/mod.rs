//! The log of one partition: what it holds, and what its callers may ask of it.
//!
//! Invariant: what changes a log is queued for the WAL while the log is locked, so the WAL has the
//! operations of one log in the order in which they took effect in memory.

pub mod damage;
mod pins;
mod read;
mod replacement;
pub mod replay;
mod segments;
pub mod state;
pub mod trim;
mod write;

pub use damage::DamageChanges;
pub use replacement::{Origin, Replacement};
pub use segments::{SegmentInfo, SegmentState};

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

use self::state::{LogState, ReplicaState};
use crate::core::Core;
use crate::entry::{LogEntry, Payload, Purged, TermStart};
use crate::error::{Damage, StorageError};
use crate::sync::lock;

/// A log is flushed when this much of it is ready.
pub const FLUSH_FROM_BYTES: usize = 1 << 20;

/// Handle on the log of one partition. Cheap to clone; all clones are the same log. Calls do not
/// wait for the disk unless they say so, and never for room: data that finds none is refused
/// (`Overloaded`).
#[derive(Clone)]
pub struct PartitionLog {
    pub(crate) log: Arc<Log>,
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
        let generation = core.first_generation.load(Ordering::Acquire);
        let state = LogState {
            replay_from_record,
            segment_bytes,
            generation,
            next_generation: generation.saturating_add(1),
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

    /// To be called after the log start or the purged part has become durable, or segments have
    /// come from another replica.
    pub fn trim_if_due(self: &Arc<Self>, mut state: MutexGuard<'_, LogState>) {
        let is_due = state.has_to_trim() && !state.is_trim_queued;
        state.is_trim_queued |= is_due;
        drop(state);
        if is_due {
            self.core.signals.trim(self.clone());
        }
    }

    pub fn index_out_of_range(&self, state: &LogState, index: u64) -> StorageError {
        StorageError::IndexOutOfRange {
            index,
            first_index: state.first_visible_index(),
            next_index: state.next_index(),
        }
    }

    /// The generation of files that are made beside the log's own: given once for a group, as long as the
    /// process runs.
    pub fn take_generation(&self) -> Result<u32, StorageError> {
        let mut state = self.lock();
        self.check_usable(&state)?;
        let generation = state.next_generation.max(1);
        state.next_generation = generation.saturating_add(1);
        Ok(generation)
    }

    pub fn check_usable(&self, state: &LogState) -> Result<(), StorageError> {
        if state.is_deleted {
            Err(StorageError::Deleted(self.group))
        } else {
            Ok(())
        }
    }
}

/// Data that waits to be appended is counted while this lives.
pub struct Held {
    core: Arc<Core>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.core.memory.release(self.bytes);
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Held").field(&self.bytes).finish()
    }
}

impl PartitionLog {
    pub(crate) fn new(log: Arc<Log>) -> Self {
        PartitionLog { log }
    }

    pub fn group_id(&self) -> RaftGroupId {
        self.log.group
    }

    /// Its storage was opened with `Storage::open_driven`: nobody else works while a call waits.
    pub fn is_driven(&self) -> bool {
        self.log.core.is_driven
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
        let has_any = state.committed_next > state.first_index || state.purged.is_some();
        has_any.then(|| state.committed_next - 1)
    }

    /// The first entry that Raft may read.
    pub fn first_index(&self) -> u64 {
        self.log.lock().first_visible_index()
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
        let has_any = state.durable_next > state.first_index || state.purged.is_some();
        has_any.then(|| state.durable_next - 1)
    }

    /// What was found to be damaged on disk first; gone when its segment is replaced or deleted. The
    /// rest of the log goes on being served.
    pub fn damage(&self) -> Option<Damage> {
        self.log.lock().damage().cloned()
    }

    pub fn is_damaged(&self) -> bool {
        self.log.lock().damage().is_some()
    }

    /// The last entry that is hidden from Raft.
    pub fn purged(&self) -> Option<Purged> {
        self.log.lock().purged
    }

    /// Never reads the disk. Knows the last purged entry too, but none before it.
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
        self.log.lock().log_start
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

    /// `Full`: the disk has no room for so many bytes of new records, which are to be refused before they
    /// are given an offset. Passes by itself when there is room again.
    pub fn check_room(&self, new_bytes: usize) -> Result<(), StorageError> {
        self.log.core.space.check(new_bytes)
    }

    /// The same for records that a leader has taken, which are to be held back: half of the reserve is for
    /// them, so that what was on its way when the disks filled up still comes to all replicas.
    pub fn check_room_to_follow(&self, new_bytes: usize) -> Result<(), StorageError> {
        self.log.core.space.check_reserve(new_bytes)
    }

    /// Data of this and other logs that waits for its commit has used up half of the memory budget:
    /// a leader should refuse new data before it assigns offsets. It is meant for all logs alike.
    pub fn is_overloaded(&self) -> bool {
        self.log.core.memory.is_overloaded()
    }

    /// Room for data that waits to be appended, for as long as the value lives: half of the memory budget,
    /// over all logs. `Overloaded`: there is none.
    pub fn hold(&self, bytes: usize) -> Result<Held, StorageError> {
        let core = self.log.core.clone();
        core.memory.hold(bytes)?;
        Ok(Held { core, bytes })
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

    /// Log end offset after entry `index`, of the purged ones the last only. May read the disk.
    pub fn offset_at(&self, index: u64) -> Result<Option<Offset>, StorageError> {
        self.log.offset_at(index)
    }

    /// Index of the entry that holds `offset`; `None` outside the log, and where that entry was
    /// compacted away. May read the disk.
    pub fn index_of_offset(&self, offset: Offset) -> Result<Option<u64>, StorageError> {
        self.log.index_of_offset(offset)
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
        let from = self.log.lock().log_start;
        self.log.batch_for_timestamp(from, timestamp_ms, limit)
    }

    /// As `batch_for_timestamp`, but not before the batch that holds `from`.
    pub fn batch_for_timestamp_from(
        &self,
        from: Offset,
        timestamp_ms: i64,
        limit: Offset,
    ) -> Result<Option<Bytes>, StorageError> {
        self.log.batch_for_timestamp(from, timestamp_ms, limit)
    }

    /// The first of the batches with the largest timestamp. May read the disk.
    pub fn max_timestamp_batch(&self, limit: Offset) -> Result<Option<Bytes>, StorageError> {
        self.log.max_timestamp_batch(limit)
    }
}
