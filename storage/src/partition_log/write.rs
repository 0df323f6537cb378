//! What changes a log: append, truncate, vote.
//!
//! Invariant: all checks come before the first change, and the change in memory and its place in
//! the WAL's queue are one step under the log's lock.

use bytes::Bytes;
use chronik_types::offset::Offset;
use chronik_types::record_batch::batches;

use super::PartitionLog;
use super::state::{LogState, TailEntry};
use crate::entry::{LogEntry, OnDurable, Payload};
use crate::error::StorageError;
use crate::memory::size_of;
use crate::wal::{Done, Record};

const VOTE_MAX_BYTES: usize = 128;
const ENTRY_MAX_BYTES: usize = 128 << 20;
const APPEND_MAX_BYTES: usize = 1 << 30;

impl PartitionLog {
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
