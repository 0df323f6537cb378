//! What changes a log: append, truncate, vote, purge, log start.
//!
//! Invariant: all checks come before the first change, and the change in memory and its place in
//! the WAL's queue are one step under the log's lock.

use bytes::Bytes;
use chronik_types::offset::Offset;
use chronik_types::record_batch::batches;

use super::PartitionLog;
use super::state::{LogState, TailEntry};
use crate::clock::now_ms;
use crate::entry::{LogEntry, OnDurable, Payload, Purged};
use crate::error::StorageError;
use crate::memory::size_of;
use crate::wal::{Done, Record};

const VOTE_MAX_BYTES: usize = 128;
const ENTRY_MAX_BYTES: usize = 128 << 20;
const CONTROL_MAX_BYTES: usize = 64 << 10;
/// Largest replica state that a purge can take along.
const STATE_MAX_BYTES: usize = 256 << 20;
const APPEND_MAX_BYTES: usize = 1 << 30;

impl PartitionLog {
    /// Appends entries that continue the log, in index and in offset; readable when it returns. An
    /// empty log may start at any index. `on_durable` is called once from the WAL thread, after
    /// the fsync that covers them; not at all if this returns an error. `Overloaded`: later. Whether the
    /// disk has room is the caller's to ask before (`check_room`): what was taken then goes, into the reserve.
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

            // That nothing is taken any more is the reason to give, before any want of room.
            let refused = |error| core.wal.check_open().err().unwrap_or(error);
            let has_uncommitted = {
                let state = self.log.lock();
                state.next_index() > state.committed_next
            };
            core.memory
                .check(bytes, has_uncommitted)
                .inspect_err(|_| core.signals.free_memory())
                .map_err(refused)?;
        }
        let reservation = match has_batches {
            true => core.wal.reserve(bytes)?,
            false => core.wal.reserve_small(bytes)?,
        };
        let mut state = self.log.lock();
        self.log.check_usable(&state)?;
        if let Some(first) = prepared.first() {
            self.check_continues(&state, first.entry.index, &prepared)?;
            if state.may_start_anywhere() {
                state.start_at(first.entry.index);
            }
        }
        let entries = prepared.iter().map(|prepared| &prepared.entry);
        let record = Record::entries(self.log.group, false, state.committed_next, entries);
        let first = state.next_index();
        let mut next_offset = state.log_end_offset();
        let now_ms = now_ms();
        for mut entry in prepared {
            match entry.entry.payload {
                Payload::Batches { .. } => next_offset = entry.next_offset,
                _ => entry.next_offset = next_offset,
            }
            state.push(entry, now_ms);
        }
        let next = state.next_index();
        core.memory.add(bytes);
        let done = self.when_durable(state.incarnation, first, next, on_durable);
        reservation.push(record, done);
        drop(state);
        core.evict();
        if core.memory.excess() > 0 {
            core.signals.free_memory();
        }
        Ok(())
    }

    fn when_durable(&self, incarnation: u64, first: u64, next: u64, on_durable: OnDurable) -> Done {
        let log = self.log.clone();
        Box::new(move |written| {
            let written = written.map(|written| {
                let mut state = log.lock();
                if !state.is_deleted && state.incarnation == incarnation {
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
            let max_bytes = match entry.payload {
                Payload::Control(_) => CONTROL_MAX_BYTES,
                _ => ENTRY_MAX_BYTES,
            };
            if size > max_bytes {
                return Err(too_large("entry", size, max_bytes));
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
        if !state.may_start_anywhere() && first_index != state.next_index() {
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
        let reservation = core.wal.reserve_small(0)?;
        let mut state = self.log.lock();
        self.log.check_usable(&state)?;
        let next = index
            .map_or(0, |index| index.saturating_add(1))
            .max(state.first_visible_index());
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
        let incarnation = state.incarnation;
        let done: Done = Box::new(move |written| {
            let mut state = log.lock();
            if state.incarnation == incarnation {
                state.pending_truncations.pop_front();
            }
            drop(state);
            on_durable(written.map(drop));
        });
        reservation.push(Record::truncate(self.log.group, next), done);
        Ok(())
    }

    /// Hides the entries up to `upto_index`, which must be committed, from Raft. The replica state
    /// that was saved last must be as of that index or a later one: both survive together. May read
    /// the disk. `on_durable` is called also if nothing is left to purge.
    pub fn purge(&self, upto_index: u64, on_durable: OnDurable) -> Result<(), StorageError> {
        let core = &self.log.core;
        core.poison.check()?;
        // What is committed never changes, so it can be looked up before the log is locked.
        let known = self.lookup_purge(upto_index)?;
        let reservation = core.wal.reserve_small(0)?;
        let mut state = self.log.lock();
        self.log.check_usable(&state)?;
        let purged = match state.purged {
            Some(purged) if known.is_none_or(|known| known.index <= purged.index) => purged,
            _ => known.ok_or_else(|| self.log.index_out_of_range(&state, upto_index))?,
        };
        let saved = state.replica_state.clone();
        let saved = saved.filter(|saved| saved.index >= purged.index);
        let saved = saved.ok_or(StorageError::PurgeAheadOfState {
            group: self.log.group,
            index: purged.index,
        })?;
        if saved.state.len() > STATE_MAX_BYTES {
            let size = saved.state.len();
            return Err(too_large("replica state", size, STATE_MAX_BYTES));
        }
        state.purged = Some(purged);
        let record = Record::purge(self.log.group, purged, saved.index, &saved.state);
        let log = self.log.clone();
        let incarnation = state.incarnation;
        let done: Done = Box::new(move |written| {
            let mut state = log.lock();
            if written.is_ok() && state.incarnation == incarnation {
                state.made_purge_durable(purged, saved);
                log.trim_if_due(state);
            } else {
                drop(state);
            }
            on_durable(written.map(drop));
        });
        reservation.push(record, done);
        Ok(())
    }

    /// Term and offset of an entry that is to be purged; `None` if it is purged already.
    fn lookup_purge(&self, index: u64) -> Result<Option<Purged>, StorageError> {
        let term = {
            let state = self.log.lock();
            self.log.check_usable(&state)?;
            if state.purged.is_some_and(|purged| index <= purged.index) {
                return Ok(None);
            }
            if index < state.first_index || index >= state.committed_next {
                return Err(self.log.index_out_of_range(&state, index));
            }
            state.term_at(index)
        };
        let next_offset = self.log.offset_at(index)?;
        // Both are gone if it was purged meanwhile.
        Ok(term.zip(next_offset).map(|(term, next_offset)| Purged {
            index,
            term,
            next_offset,
        }))
    }

    /// Makes `offset` the first one that can be read; a lower one than now changes nothing. It must
    /// not be above the log's end. `on_durable` is called in any case.
    pub fn set_log_start(&self, offset: Offset, on_durable: OnDurable) -> Result<(), StorageError> {
        let core = &self.log.core;
        core.poison.check()?;
        let reservation = core.wal.reserve_small(0)?;
        let mut state = self.log.lock();
        self.log.check_usable(&state)?;
        if offset > state.log_end_offset() {
            return Err(StorageError::OffsetOutOfRange {
                offset,
                log_start_offset: state.log_start,
                log_end_offset: state.log_end_offset(),
            });
        }
        state.log_start = state.log_start.max(offset);
        let log_start = state.log_start;
        let record = Record::log_start(self.log.group, log_start);
        let log = self.log.clone();
        let incarnation = state.incarnation;
        let done: Done = Box::new(move |written| {
            let mut state = log.lock();
            if written.is_ok() && state.incarnation == incarnation {
                state.durable_log_start = state.durable_log_start.max(log_start);
                log.trim_if_due(state);
            } else {
                drop(state);
            }
            on_durable(written.map(drop));
        });
        reservation.push(record, done);
        Ok(())
    }

    /// Saves Raft's vote, opaque, at most 128 bytes; ordered with appends.
    pub fn save_vote(&self, vote: Bytes, on_durable: OnDurable) -> Result<(), StorageError> {
        let core = &self.log.core;
        core.poison.check()?;
        if vote.len() > VOTE_MAX_BYTES {
            return Err(too_large("vote", vote.len(), VOTE_MAX_BYTES));
        }
        let reservation = core.wal.reserve_small(vote.len())?;
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
