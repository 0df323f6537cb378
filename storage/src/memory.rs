//! How much all logs together hold in memory.
//!
//! Invariant: `pinned` bytes are in no segment yet and must stay; the rest of `total` are copies that
//! may go at any time.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::entry::LogEntry;
use crate::error::StorageError;

/// What an entry costs beyond its payload.
const ENTRY_OVERHEAD_BYTES: usize = 128;

/// How far entries that bring commits may exceed the budget: more than brokers have on its way.
const EXCESS_MAX_BYTES: usize = 256 << 20;

pub fn size_of(entry: &LogEntry) -> usize {
    ENTRY_OVERHEAD_BYTES + entry.payload.size_bytes()
}

#[derive(Default)]
pub struct Memory {
    pub max_bytes: usize,
    /// Bytes of all entries in memory.
    total: AtomicUsize,
    /// Bytes of the entries that are not in segments yet.
    pinned: AtomicUsize,
    /// Bytes of the pinned entries that are committed and durable, and so may be flushed.
    ready: AtomicUsize,
    /// The largest append that was refused since room was made last.
    refused: AtomicUsize,
    /// Bytes that wait outside to be appended.
    held: AtomicUsize,
}

impl Memory {
    pub fn new(max_bytes: usize) -> Self {
        Memory {
            max_bytes,
            ..Memory::default()
        }
    }

    pub fn total(&self) -> usize {
        self.total.load(Ordering::Relaxed)
    }

    pub fn pinned(&self) -> usize {
        self.pinned.load(Ordering::Relaxed)
    }

    pub fn ready(&self) -> usize {
        self.ready.load(Ordering::Relaxed)
    }

    /// New entries came.
    pub fn add(&self, bytes: usize) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
        self.pinned.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Entries were cut off before they were flushed.
    pub fn remove(&self, bytes: usize) {
        self.total.fetch_sub(bytes, Ordering::Relaxed);
        self.pinned.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub fn make_ready(&self, bytes: usize) {
        self.ready.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn remove_ready(&self, bytes: usize) {
        self.ready.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Ready entries are in segments now.
    pub fn flushed(&self, bytes: usize) {
        self.pinned.fetch_sub(bytes, Ordering::Relaxed);
        self.ready.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Copies of flushed entries were dropped.
    pub fn evicted(&self, bytes: usize) {
        self.total.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// How much there is above what is kept while all goes well. The last eighth of the budget is for
    /// new entries, so that copies never make an append fail.
    pub fn excess(&self) -> usize {
        self.total()
            .saturating_sub(self.max_bytes - self.max_bytes / 8)
    }

    /// How much may stay pinned when room is made: half, so that it is not soon made again, and less
    /// if an append that was refused would not fit. And whether one was refused since the last time.
    pub fn room_to_make(&self) -> (usize, bool) {
        let refused = self.refused.swap(0, Ordering::Relaxed);
        let may_stay = self.max_bytes.saturating_sub(refused);
        (may_stay.min(self.max_bytes / 2), refused > 0)
    }

    /// The data that waits to be committed has used up half of the budget: the other half is for
    /// those that do get their commits.
    pub fn is_overloaded(&self) -> bool {
        self.pinned().saturating_sub(self.ready()) > self.max_bytes / 2
    }

    /// Takes account of bytes that wait to be appended; half of the budget at most, besides what is
    /// appended already. Something is always taken.
    pub fn hold(&self, bytes: usize) -> Result<(), StorageError> {
        let max_bytes = self.max_bytes / 2;
        let pinned_bytes = self.held.fetch_add(bytes, Ordering::Relaxed);
        if pinned_bytes > 0 && pinned_bytes.saturating_add(bytes) > max_bytes {
            self.release(bytes);
            return Err(StorageError::Overloaded {
                pinned_bytes,
                max_bytes,
            });
        }
        Ok(())
    }

    pub fn release(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Refuses entries beyond the bound. `has_uncommitted`: their log has earlier ones that are not
    /// committed yet. Those entries bring the commit with them, and where nothing is ready to be
    /// flushed only commits make room: logs that were all refused would wait for each other for
    /// ever. What they exceed the bound by is what the leaders have on its way.
    pub fn check(&self, new_bytes: usize, has_uncommitted: bool) -> Result<(), StorageError> {
        let pinned_bytes = self.pinned();
        let may_exceed = pinned_bytes < self.max_bytes.saturating_add(EXCESS_MAX_BYTES);
        if has_uncommitted && may_exceed && self.ready() == 0 {
            return Ok(());
        }
        // Something must always be taken, or an entry above the budget could never be stored.
        if pinned_bytes > 0 && pinned_bytes.saturating_add(new_bytes) > self.max_bytes {
            self.refused.fetch_max(new_bytes, Ordering::Relaxed);
            return Err(StorageError::Overloaded {
                pinned_bytes,
                max_bytes: self.max_bytes,
            });
        }
        Ok(())
    }
}
