//! A proposal between Raft's taking it and its outcome: who gets which answer when.
//!
//! Invariant: offsets are given out only once the log store has assigned them, acks=1 only once the
//! entry is on the leader's disk.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use chronik_types::offset::Offset;
use chronik_types::record_batch;
use tokio::time::Instant;

use super::error::AppendError;
use super::queue::{Acks, Queued};

/// A proposal in flight: its items, in the order of their records in the entry.
#[derive(Debug)]
pub struct InFlight {
    state: Mutex<InFlightState>,
}

#[derive(Debug)]
struct InFlightState {
    items: Vec<Queued>,
    base_offset: Option<Offset>,
    index: Option<u64>,
}

impl InFlight {
    pub fn new(items: Vec<Queued>) -> InFlight {
        let state = InFlightState {
            items,
            base_offset: None,
            index: None,
        };
        InFlight {
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, InFlightState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives every unanswered item with `wanted` acks its place in the log.
    pub fn answer_appended(&self, wanted: impl Fn(Acks) -> bool) {
        let mut state = self.lock();
        // Set before the entry is durable, let alone applied.
        let Some(mut offset) = state.base_offset else {
            return;
        };
        for queued in &mut state.items {
            if wanted(queued.item.acks) {
                let appended = queued.appended(offset);
                queued.answer(Ok(appended));
            }
            offset = offset.plus(queued.admitted.record_count);
        }
    }

    pub fn answer_error(&self, error: &AppendError) {
        for queued in &mut self.lock().items {
            queued.answer(Err(error.clone()));
        }
    }

    /// The entry's bytes, built anew for each try: the log store wants to own them alone, to stamp
    /// offsets into them without a copy.
    pub fn build(&self) -> Bytes {
        let state = self.lock();
        let size = state.items.iter().map(|q| q.item.records.len()).sum();
        let mut buffer = BytesMut::with_capacity(size);
        for queued in &state.items {
            let start = buffer.len();
            buffer.extend_from_slice(&queued.item.records);
            if let Some(time) = queued.log_append_time_ms {
                stamp_times(&mut buffer[start..], time);
            }
        }
        buffer.freeze()
    }

    /// Index of the entry in the leader's log.
    pub fn index(&self) -> Option<u64> {
        self.lock().index
    }

    pub fn last_deadline(&self) -> Instant {
        let state = self.lock();
        state
            .items
            .iter()
            .map(|q| q.item.deadline)
            .max()
            .unwrap_or_else(Instant::now)
    }
}

/// Sets every batch in `bytes` to LogAppendTime. They passed `admission`.
fn stamp_times(bytes: &mut [u8], time_ms: i64) {
    let mut position = 0;
    while let Ok(header) = record_batch::BatchHeader::parse(&bytes[position..]) {
        let end = position + header.size_bytes();
        record_batch::stamp_log_append_time(&mut bytes[position..end], time_ms);
        position = end;
    }
}

/// Leader-local companion of a proposed entry: tells its proposer what the log store did.
#[derive(Debug)]
pub struct Pending(pub(super) Arc<InFlight>);

impl Pending {
    /// The entry got its place in the leader's log.
    pub(super) fn appended(&self, base_offset: Offset, index: u64) {
        let mut state = self.0.lock();
        state.base_offset = Some(base_offset);
        state.index = Some(index);
    }

    /// The entry is on the leader's disk. Called from the WAL thread.
    pub(super) fn durable(self) {
        #[cfg(feature = "sabotage")]
        if crate::sabotage::is(crate::sabotage::Sabotage::AckBeforeCommit) {
            return self.0.answer_appended(|_| true);
        }
        self.0.answer_appended(|acks| acks == Acks::Leader);
    }
}
