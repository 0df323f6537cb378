//! Traces of entries in flight.
//!
//! Invariant: bounded, in the order of the log, and empty as long as no request is sampled; then nothing is
//! locked or allocated.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use chronik_telemetry::trace::TraceContext;

/// Entries whose trace is remembered for replication.
const TRACES_MAX: usize = 256;
/// Applied entries whose trace is kept: a majority has them, but a follower behind it gets them later.
const APPLIED_KEPT: u64 = 64;

/// Traces of sampled entries from append to a while after apply: replication sends them along.
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
        // Another leader may have cut off what was there.
        while by_index.back().is_some_and(|(last, _)| *last >= index) {
            by_index.pop_back();
        }
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
        let by_index = self.lock();
        let place = by_index.binary_search_by_key(&index, |(i, _)| *i).ok()?;
        by_index.get(place).map(|(_, trace)| trace.clone())
    }

    /// Forgets what lies `APPLIED_KEPT` entries and more below the last one that is applied.
    pub fn forget_applied(&self, applied: u64) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut by_index = self.lock();
        while by_index
            .front()
            .is_some_and(|(first, _)| first.saturating_add(APPLIED_KEPT) <= applied)
        {
            by_index.pop_front();
        }
        self.count.store(by_index.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_kept_for_followers_behind_the_majority() {
        let traces = Traces::default();
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let trace = TraceContext::parse(trace).unwrap();
        for index in 1..=300 {
            traces.insert(index, trace.clone());
        }
        assert!(traces.get(44).is_none() && traces.get(45).is_some());
        // A new leader's entries take the place of those that it cut off.
        traces.insert(290, trace.clone());
        assert!(traces.get(290).is_some() && traces.get(291).is_none());
        traces.forget_applied(200);
        assert!(traces.get(136).is_none() && traces.get(137).is_some());
        assert!(traces.get(200).is_some());
        traces.forget_applied(400);
        assert!(traces.get(290).is_none());
        assert_eq!(traces.count.load(Ordering::Relaxed), 0);
    }
}
