//! What happened in a run, line by line: the simulation's own events and the log of the brokers.
//!
//! Invariant: two runs of one seed write the same lines.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;

use tracing_subscriber::fmt::MakeWriter;

/// Lines that are kept for a report.
const KEPT_MAX: usize = 400;

#[derive(Default)]
struct Trace {
    now_ms: u64,
    /// Whose turn it is.
    actor: String,
    kept: VecDeque<String>,
    count: u64,
    hash: DefaultHasher,
    prints: bool,
}

thread_local! {
    static TRACE: RefCell<Trace> = RefCell::new(Trace::default());
}

/// Which run this was: equal only if all lines are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint {
    line_count: u64,
    hash: u64,
}

pub fn start(prints: bool) {
    TRACE.set(Trace {
        prints,
        ..Trace::default()
    });
}

pub fn set_time(now_ms: u64) {
    TRACE.with_borrow_mut(|trace| trace.now_ms = now_ms);
}

pub fn set_actor(actor: String) {
    TRACE.with_borrow_mut(|trace| trace.actor = actor);
}

pub fn note(line: &str) {
    TRACE.with_borrow_mut(|trace| {
        let line = format!("{:>6} {:<8} {}", trace.now_ms, trace.actor, line);
        line.hash(&mut trace.hash);
        trace.count += 1;
        if trace.prints {
            println!("{line}");
        }
        if trace.kept.len() == KEPT_MAX {
            trace.kept.pop_front();
        }
        trace.kept.push_back(line);
    });
}

/// A run that is over.
pub struct Ended {
    pub fingerprint: Fingerprint,
    /// The last lines, oldest first.
    pub tail: Vec<String>,
}

pub fn finish() -> Ended {
    let trace = TRACE.take();
    Ended {
        fingerprint: Fingerprint {
            line_count: trace.count,
            hash: trace.hash.finish(),
        },
        tail: trace.kept.into(),
    }
}

/// Notes an event: `event!("broker {id} is killed")`.
macro_rules! event {
    ($($arguments:tt)*) => { $crate::trace::note(&format!($($arguments)*)) };
}
pub(crate) use event;

/// Takes the lines that the brokers log.
pub struct LogLines;

pub struct Line(Vec<u8>);

impl<'a> MakeWriter<'a> for LogLines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Vec::new())
    }
}

impl io::Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        note(String::from_utf8_lossy(&self.0).trim_end());
    }
}
