//! The log of one partition. Skeleton: in memory only.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::batches;

use crate::entry::{LogEntry, OnDurable, Payload, TermStart};
use crate::error::StorageError;

/// Handle on the log of one partition. Cheap to clone.
#[derive(Clone)]
pub struct PartitionLog {
    group: RaftGroupId,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    entries: Vec<LogEntry>,
    vote: Option<Bytes>,
    committed: Option<u64>,
    replica_state: Option<(u64, Bytes)>,
}

impl State {
    fn first_index(&self) -> u64 {
        self.entries.first().map_or(0, |e| e.index)
    }
    fn get(&self, index: u64) -> Option<&LogEntry> {
        self.entries
            .get(usize::try_from(index.checked_sub(self.first_index())?).ok()?)
    }
    fn end(&self) -> Offset {
        offset_of(self.entries.iter().rev())
    }
}

fn offset_of<'a>(mut entries: impl Iterator<Item = &'a LogEntry>) -> Offset {
    entries
        .find_map(|e| match &e.payload {
            Payload::Batches { next_offset, .. } => Some(*next_offset),
            _ => None,
        })
        .unwrap_or(Offset::ZERO)
}

impl PartitionLog {
    pub(crate) fn new(group: RaftGroupId) -> Self {
        PartitionLog {
            group,
            state: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under lock")
    }

    pub fn group_id(&self) -> RaftGroupId {
        self.group
    }

    /// Appends entries that continue the log; readable when it returns. An empty log may start at
    /// any index. `on_durable` is not called when this returns an error.
    pub fn append(
        &self,
        entries: Vec<LogEntry>,
        on_durable: OnDurable,
    ) -> Result<(), StorageError> {
        let mut state = self.state();
        for entry in entries {
            if let Some(last) = state.entries.last()
                && entry.index != last.index + 1
            {
                return Err(StorageError::OutOfOrder {
                    group: self.group,
                    what: "index",
                    expected: i128::from(last.index) + 1,
                    actual: i128::from(entry.index),
                });
            }
            if let Payload::Batches { base_offset, .. } = &entry.payload
                && *base_offset != state.end()
            {
                return Err(StorageError::OutOfOrder {
                    group: self.group,
                    what: "offset",
                    expected: i128::from(state.end().0),
                    actual: i128::from(base_offset.0),
                });
            }
            state.entries.push(entry);
        }
        drop(state);
        on_durable(Ok(()));
        Ok(())
    }

    /// Removes the entries above `index`, all if `None`. Refused for committed entries.
    pub fn truncate_after(
        &self,
        index: Option<u64>,
        on_durable: OnDurable,
    ) -> Result<(), StorageError> {
        let mut state = self.state();
        if let Some(committed) = state.committed
            && index.is_none_or(|index| index < committed)
        {
            return Err(StorageError::TruncatesCommitted {
                group: self.group,
                index,
                committed,
            });
        }
        state
            .entries
            .retain(|e| index.is_some_and(|index| e.index <= index));
        drop(state);
        on_durable(Ok(()));
        Ok(())
    }

    /// Saves Raft's vote, opaque, at most 128 bytes; ordered with appends.
    pub fn save_vote(&self, vote: Bytes, on_durable: OnDurable) -> Result<(), StorageError> {
        self.state().vote = Some(vote);
        on_durable(Ok(()));
        Ok(())
    }

    pub fn vote(&self) -> Option<Bytes> {
        self.state().vote.clone()
    }

    /// Entries up to `index` will never be truncated. Not an fsync.
    pub fn set_committed(&self, index: u64) {
        let mut state = self.state();
        let last = state.entries.last().map(|e| e.index);
        state.committed = state.committed.max(Some(index).min(last));
    }

    /// After a restart at least what is in segments or the last checkpoint.
    pub fn committed(&self) -> Option<u64> {
        self.state().committed
    }

    pub fn first_index(&self) -> u64 {
        self.state().first_index()
    }

    /// Index and term of the last entry.
    pub fn last_entry_id(&self) -> Option<(u64, u64)> {
        self.state().entries.last().map(|e| (e.index, e.term))
    }

    /// The last entry that is fsynced here.
    pub fn durable_index(&self) -> Option<u64> {
        self.state().entries.last().map(|e| e.index)
    }

    pub fn term_at(&self, index: u64) -> Result<Option<u64>, StorageError> {
        Ok(self.state().get(index).map(|e| e.term))
    }

    /// The leader-epoch history, always in memory.
    pub fn term_starts(&self) -> Vec<TermStart> {
        let state = self.state();
        let mut starts: Vec<TermStart> = Vec::new();
        for (i, e) in state.entries.iter().enumerate() {
            if starts.last().is_none_or(|s| s.term != e.term) {
                let first_offset = offset_of(state.entries[..i].iter().rev());
                starts.push(TermStart {
                    term: e.term,
                    first_index: e.index,
                    first_offset,
                });
            }
        }
        starts
    }

    /// Log end offset after entry `index`.
    pub fn offset_at(&self, index: u64) -> Result<Option<Offset>, StorageError> {
        let state = self.state();
        Ok(state.get(index).map(|_| {
            let count = (index - state.first_index()) as usize + 1;
            offset_of(state.entries[..count].iter().rev())
        }))
    }

    /// Entries of `range`, at least one if there is any, then up to `max_bytes`. May read the disk.
    pub fn read_entries(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> Result<Vec<LogEntry>, StorageError> {
        let state = self.state();
        let mut size = 0;
        let mut out = Vec::new();
        for index in range {
            let Some(entry) = state.get(index) else { break };
            size += entry.payload.size_bytes();
            if !out.is_empty() && size > max_bytes {
                break;
            }
            out.push(entry.clone());
        }
        Ok(out)
    }

    /// As `read_entries`; `None` if the disk is needed.
    pub fn read_entries_cached(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> Option<Vec<LogEntry>> {
        self.read_entries(range, max_bytes).ok()
    }

    pub fn log_start_offset(&self) -> Offset {
        Offset::ZERO
    }

    pub fn log_end_offset(&self) -> Offset {
        self.state().end()
    }

    /// Whole batches from the one that holds `from`, none that ends above `limit`.
    pub fn read(
        &self,
        from: Offset,
        limit: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, StorageError> {
        let state = self.state();
        let log_end_offset = state.end();
        if from < Offset::ZERO || from > log_end_offset {
            let log_start_offset = Offset::ZERO;
            return Err(StorageError::OffsetOutOfRange {
                offset: from,
                log_start_offset,
                log_end_offset,
            });
        }
        let mut size = 0;
        let mut out = Vec::new();
        for e in &state.entries {
            let Payload::Batches { bytes, .. } = &e.payload else {
                continue;
            };
            for (at, header) in batches(bytes).flatten() {
                if header.next_offset() <= from {
                    continue;
                }
                size += header.size_bytes();
                if header.next_offset() > limit || (!out.is_empty() && size > max_bytes) {
                    return Ok(out);
                }
                out.push(bytes.slice(at..at + header.size_bytes()));
            }
        }
        Ok(out)
    }

    /// As `read`; `None` if the disk is needed (or the offset is out of range).
    pub fn read_cached(&self, from: Offset, limit: Offset, max_bytes: usize) -> Option<Vec<Bytes>> {
        self.read(from, limit, max_bytes).ok()
    }

    /// The first batch with a record at or after `timestamp_ms`. May read the disk.
    pub fn batch_for_timestamp(
        &self,
        timestamp_ms: i64,
        limit: Offset,
    ) -> Result<Option<Bytes>, StorageError> {
        let all = self.read(Offset::ZERO, limit, usize::MAX)?;
        Ok(all.into_iter().find(|b| {
            batches(b)
                .flatten()
                .next()
                .is_some_and(|(_, h)| h.max_timestamp >= timestamp_ms)
        }))
    }

    /// The first batch with the largest timestamp. May read the disk.
    pub fn max_timestamp_batch(&self, limit: Offset) -> Result<Option<Bytes>, StorageError> {
        let all = self.read(Offset::ZERO, limit, usize::MAX)?;
        Ok(all.into_iter().rev().max_by_key(|b| {
            batches(b)
                .flatten()
                .next()
                .map_or(i64::MIN, |(_, h)| h.max_timestamp)
        }))
    }

    /// Keeps the replica's opaque state as of `index`; written by checkpoint and close. After a
    /// crash an older one may come back, never one ahead of the durable log.
    pub fn save_replica_state(&self, index: u64, state: Bytes) {
        self.state().replica_state = Some((index, state));
    }

    pub fn replica_state(&self) -> Option<(u64, Bytes)> {
        self.state().replica_state.clone()
    }

    /// Bytes of record batches in the log.
    pub fn size_bytes(&self) -> u64 {
        self.state()
            .entries
            .iter()
            .map(|e| e.payload.size_bytes() as u64)
            .sum()
    }

    /// From now on segments of this log are sealed at this size.
    pub fn set_segment_bytes(&self, _segment_bytes: u64) {}
}
