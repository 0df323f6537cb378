//! Traces of entries in flight.
//!
//! Invariant: bounded, and empty unless requests are sampled; then nothing is locked or allocated.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use chronik_telemetry::trace::TraceContext;

/// Entries whose trace is remembered for replication.
const TRACES_MAX: usize = 256;

/// Traces of sampled entries between append and apply: replication sends them along.
#[derive(Debug, Default)]
pub struct Traces {
    count: AtomicUsize,
    by_index: Mutex<VecDeque<(u64, TraceContext)>>,
}

impl Traces {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(u64, TraceContext)>> {
        self.by_index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, index: u64, trace: TraceContext) {
        let mut by_index = self.lock();
        if by_index.len() == TRACES_MAX {
            by_index.pop_front();
        }
        by_index.push_back((index, trace));
        self.count.store(by_index.len(), Ordering::Relaxed);
    }

    pub fn get(&self, index: u64) -> Option<TraceContext> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.lock()
            .iter()
            .find(|(i, _)| *i == index)
            .map(|(_, trace)| trace.clone())
    }

    /// Forgets the entries up to `index`, which are applied.
    pub fn forget_upto(&self, index: u64) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut by_index = self.lock();
        by_index.retain(|(i, _)| *i > index);
        self.count.store(by_index.len(), Ordering::Relaxed);
    }
}
