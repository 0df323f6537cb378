//! The bounded queue between those who append and the WAL thread.
//!
//! Invariant: nobody waits for room. Records of data are refused beyond the bound, and their callers
//! try again; those of Raft's own always fit, since each group has few of them under way. They are
//! small, but for the state that a purge takes along: that is in memory anyway.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::record::Record;
use crate::error::StorageError;
use crate::poison::Poison;
use crate::sync::{lock, wait, wait_at_most};

const QUEUED_BYTES_MAX: usize = 64 << 20;
const QUEUED_RECORDS_MAX: usize = 64 << 10;

/// Where a record came to lie.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    pub file_sequence: u64,
    pub record_number: u64,
}

/// Whether the WAL gets on with what it has to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalProgress {
    /// Group commits that have ended since the storage was opened.
    pub groups: u64,
    /// Something is being written, or waits for it; and not for room on the disk.
    pub has_work: bool,
}

/// Called once from the WAL thread.
pub type Done = Box<dyn FnOnce(Result<Written, StorageError>) + Send>;

pub struct Item {
    pub record: Record,
    pub done: Done,
    /// The record must lie in a newer file than any before it.
    pub in_new_file: bool,
}

pub struct WalQueue {
    state: Mutex<State>,
    work: Condvar,
    poison: Arc<Poison>,
}

#[derive(Default)]
struct State {
    items: VecDeque<Item>,
    /// Bytes and records in `items`, and reserved.
    bytes: usize,
    records: usize,
    /// A group was taken and is not on the disk yet.
    is_writing: bool,
    waits_for_room: bool,
    groups: u64,
    is_closed: bool,
    is_finished: bool,
    is_abandoned: bool,
}

/// Room for one record; given back on drop if not used.
pub struct Reservation<'a> {
    queue: &'a WalQueue,
    bytes: usize,
    is_used: bool,
}

impl WalQueue {
    pub fn new(poison: Arc<Poison>) -> Self {
        WalQueue {
            state: Mutex::default(),
            work: Condvar::new(),
            poison,
        }
    }

    /// Room for a record of data; `Overloaded` while the disk does not keep up. A record larger than
    /// the whole queue fits an empty one.
    pub fn reserve(&self, bytes: usize) -> Result<Reservation<'_>, StorageError> {
        let state = lock(&self.state);
        let fits = state.bytes.saturating_add(bytes) <= QUEUED_BYTES_MAX
            && state.records < QUEUED_RECORDS_MAX;
        if !fits && state.records > 0 && !state.is_closed {
            return Err(StorageError::Overloaded {
                pinned_bytes: state.bytes,
                max_bytes: QUEUED_BYTES_MAX,
            });
        }
        self.reserved(state, bytes)
    }

    /// Room for a small record without data, whatever is queued. A purge reserves nothing for the
    /// state that it takes along: that is in memory anyway.
    pub fn reserve_small(&self, bytes: usize) -> Result<Reservation<'_>, StorageError> {
        self.reserved(lock(&self.state), bytes)
    }

    /// Fails if nothing is taken any more.
    pub fn check_open(&self) -> Result<(), StorageError> {
        match lock(&self.state).is_closed {
            true => Err(StorageError::Closed),
            false => Ok(()),
        }
    }

    fn reserved(
        &self,
        mut state: MutexGuard<'_, State>,
        bytes: usize,
    ) -> Result<Reservation<'_>, StorageError> {
        self.poison.check()?;
        if state.is_closed {
            return Err(StorageError::Closed);
        }
        state.bytes += bytes;
        state.records += 1;
        Ok(Reservation {
            queue: self,
            bytes,
            is_used: false,
        })
    }

    /// Queues a record of the storage itself, beyond the bound, even while closing: its callers
    /// send little and wait for it.
    pub fn push_unbounded(&self, item: Item) {
        let mut state = lock(&self.state);
        if state.is_abandoned {
            // Dropping the callback tells whoever waits for it.
            return;
        }
        state.bytes += item.record.size_bytes();
        state.records += 1;
        state.items.push_back(item);
        drop(state);
        self.work.notify_one();
    }

    /// The group that was taken last is on the disk, or has failed.
    pub fn group_ended(&self) {
        let mut state = lock(&self.state);
        state.is_writing = false;
        state.groups += 1;
    }

    pub fn set_waits_for_room(&self, waits: bool) {
        lock(&self.state).waits_for_room = waits;
    }

    pub fn progress(&self) -> WalProgress {
        let state = lock(&self.state);
        WalProgress {
            groups: state.groups,
            has_work: !state.waits_for_room && (state.is_writing || !state.items.is_empty()),
        }
    }

    /// From now on nothing is taken from outside; what is queued is still written.
    pub fn close(&self) {
        lock(&self.state).is_closed = true;
        self.work.notify_all();
    }

    /// Waits for a while; false: the queue is closed.
    pub fn wait_while_open(&self, time: Duration) -> bool {
        let state = lock(&self.state);
        if state.is_closed {
            return false;
        }
        let (state, _) = wait_at_most(&self.work, state, time);
        !state.is_closed
    }

    /// The WAL thread ends when it has written what is queued.
    pub fn finish(&self) {
        let mut state = lock(&self.state);
        state.is_closed = true;
        state.is_finished = true;
        drop(state);
        self.work.notify_all();
    }

    /// The WAL thread is gone: nobody will take anything any more.
    pub fn abandon(&self) {
        let mut state = lock(&self.state);
        state.is_closed = true;
        state.is_finished = true;
        state.is_abandoned = true;
        let items = std::mem::take(&mut state.items);
        drop(state);
        drop(items);
    }

    /// Waits for records and takes the next ones in order: at least one, up to `max_bytes`. Nothing
    /// when the queue is finished and empty.
    pub fn take_group(&self, max_bytes: usize) -> Vec<Item> {
        let mut state = lock(&self.state);
        while state.items.is_empty() {
            // Room that is reserved will be filled in a moment, so its holder still gets an answer.
            if state.is_finished && state.records == 0 {
                return Vec::new();
            }
            state = wait(&self.work, state);
        }
        self.pop_group(state, max_bytes)
    }

    /// As `take_group`, but gives nothing instead of waiting.
    pub fn try_take_group(&self, max_bytes: usize) -> Vec<Item> {
        self.pop_group(lock(&self.state), max_bytes)
    }

    pub fn is_empty(&self) -> bool {
        lock(&self.state).items.is_empty()
    }

    fn pop_group(&self, mut state: MutexGuard<'_, State>, max_bytes: usize) -> Vec<Item> {
        let mut group = Vec::new();
        let mut size = 0;
        while let Some(item) = state.items.front() {
            let bytes = item.record.size_bytes();
            if !group.is_empty() && (size + bytes > max_bytes || item.in_new_file) {
                break;
            }
            size += bytes;
            state.bytes -= bytes;
            state.records -= 1;
            group.extend(state.items.pop_front());
        }
        state.is_writing = !group.is_empty();
        group
    }
}

impl Reservation<'_> {
    pub fn push(mut self, record: Record, done: Done) {
        let mut state = lock(&self.queue.state);
        // The record's framing is a little more than what was reserved for its payload.
        state.bytes = state.bytes - self.bytes + record.size_bytes();
        state.items.push_back(Item {
            record,
            done,
            in_new_file: false,
        });
        self.is_used = true;
        let was_empty = state.items.len() == 1;
        drop(state);
        if was_empty {
            self.queue.work.notify_one();
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.is_used {
            let mut state = lock(&self.queue.state);
            state.bytes -= self.bytes;
            state.records -= 1;
            drop(state);
            self.queue.work.notify_all();
        }
    }
}
