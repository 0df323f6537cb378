//! The scrub: reads sealed segments at a low rate and checks every byte, so that bit rot is found
//! while the other replicas still have the data.
//!
//! Invariant: what it finds it reports in the same way as a read does; it changes nothing itself.

use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::core::{Core, Logs};
use crate::counters::Counters;
use crate::partition_log::Log;
use crate::segment::Segment;
use crate::sync::lock;

/// A start has better things to do.
const FIRST_PASS_AFTER: Duration = Duration::from_secs(60);
/// What is read at a time is not more than this long waited for.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Ends the scrub.
#[derive(Default)]
pub struct Stop {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    pub fn set(&self) {
        *lock(&self.is_set) = true;
        self.changed.notify_all();
    }

    /// Waits; gives `Break` if the end came.
    fn wait(&self, time: Duration) -> ControlFlow<()> {
        let guard = lock(&self.is_set);
        let waited = self
            .changed
            .wait_timeout_while(guard, time, |is_set| !*is_set);
        let is_set = match waited {
            Ok((is_set, _)) => *is_set,
            Err(error) => *error.into_inner().0,
        };
        match is_set {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// State of the scrub's thread.
pub struct Scrub {
    pub core: Arc<Core>,
    pub logs: Arc<Logs>,
    pub stop: Arc<Stop>,
    pub bytes_per_second: u64,
    /// From the start of one pass to that of the next, if it is done by then.
    pub interval: Duration,
}

impl Scrub {
    /// Runs until it is told to stop.
    pub fn run(self) {
        let mut pause = FIRST_PASS_AFTER.min(self.interval);
        while self.stop.wait(pause).is_continue() {
            let started = Instant::now();
            if self.pass().is_break() {
                return;
            }
            Counters::add(&self.core.counters.scrub_passes, 1);
            pause = self.interval.saturating_sub(started.elapsed());
        }
    }

    fn pass(&self) -> ControlFlow<()> {
        for log in self.logs.all() {
            let segments: Vec<Segment> = {
                let state = log.lock();
                let sealed = state.segments.iter().filter(|segment| segment.is_sealed);
                sealed.copied().collect()
            };
            for segment in segments {
                self.segment(&log, segment)?;
            }
        }
        ControlFlow::Continue(())
    }

    fn segment(&self, log: &Log, segment: Segment) -> ControlFlow<()> {
        let mut pace = |bytes: u64| {
            Counters::add(&self.core.counters.scrubbed_bytes, bytes);
            let nanos =
                u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.max(1));
            let pause = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            self.stop.wait(pause.min(PAUSE_MAX))
        };
        let verified = log
            .view(segment)
            .verify(&mut |_, _, _, _| Ok(()), &mut pace);
        match log.explain(&segment, verified) {
            Ok(Some(flow)) => flow,
            // It is gone, or its damage is on record now.
            Ok(None) | Err(_) => ControlFlow::Continue(()),
        }
    }
}
