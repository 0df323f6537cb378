//! What is wrong with a history, if anything. Pure functions, one file per family of checks.
//!
//! Invariants: what Kafka's contract allows is never called wrong, however unlikely; every anomaly
//! names the values, offsets and times that show it. What is legal but worth knowing is counted in
//! `notes`. Transactions are not written yet: their aborted sends will end as `Event::Fail`, and
//! `reads` will have to allow for the offsets that their markers take.

mod groups;
mod index;
mod progress;
mod reads;
mod watermarks;
mod writes;

#[cfg(test)]
mod judge_test;

use std::collections::BTreeMap;

use super::history::Timed;
use index::Index;

/// The kinds of anomaly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Acknowledged, and not there at the end.
    Lost,
    /// There twice, though its producer numbers its batches or sends nothing twice.
    Duplicated,
    /// Behind a value that was sent later, or before one that was acknowledged before it was sent.
    Reordered,
    /// A later value of a numbering producer is there, an earlier one is not.
    Hole,
    /// Read, and never written.
    Phantom,
    /// Read, though its producer was told that it was certainly not written.
    FailedRead,
    /// Two values at one offset, or a value at another offset than was acknowledged.
    InconsistentOffset,
    /// A reader was given an offset again.
    NonMonotonicRead,
    /// A reader was led past an offset.
    Skipped,
    /// A reader of everything did not see a value that was there to be seen.
    Unseen,
    /// The high watermark fell, under the same leader epoch or a later one.
    WatermarkFell,
    /// A group's committed offset went back, or a commit that was acknowledged is gone.
    CommitFell,
    /// Bytes are not those that were written.
    Corrupt,
    /// A client was refused for good what it may do.
    Refused,
    /// No progress within the bound, after everything was healed.
    Stuck,
    /// The history does not show enough to be judged.
    Incomplete,
}

/// One thing that must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anomaly {
    pub kind: Kind,
    /// When it shows, in microseconds since the start of the run.
    pub micros: u64,
    pub what: String,
}

/// Examples kept per kind of anomaly; all are counted.
const EXAMPLES_MAX: usize = 20;

/// The outcome of the judge.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    pub anomalies: Vec<Anomaly>,
    pub counts: BTreeMap<Kind, usize>,
    /// What is legal, by name: duplicates of producers that retry without numbers, and the like.
    pub notes: BTreeMap<String, usize>,
    pub sends: usize,
    pub acked: usize,
    pub reads: usize,
}

impl Verdict {
    pub fn is_clean(&self) -> bool {
        self.counts.is_empty()
    }

    fn add(&mut self, kind: Kind, micros: u64, what: String) {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        if *count <= EXAMPLES_MAX {
            self.anomalies.push(Anomaly { kind, micros, what });
        }
    }

    fn note(&mut self, what: &str) {
        *self.notes.entry(what.to_owned()).or_default() += 1;
    }
}

/// Judges a whole history.
pub fn judge(history: &[Timed]) -> Verdict {
    let mut verdict = Verdict::default();
    let index = Index::of(history, &mut verdict);
    writes::check(&index, &mut verdict);
    reads::check(history, &index, &mut verdict);
    groups::check(history, &index, &mut verdict);
    watermarks::check(history, &index, &mut verdict);
    progress::check(history, &index, &mut verdict);
    verdict.anomalies.sort_by_key(|anomaly| anomaly.micros);
    verdict
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} sends, {} acknowledged, {} records read",
            self.sends, self.acked, self.reads
        )?;
        for (what, count) in &self.notes {
            writeln!(f, "  legal: {count} x {what}")?;
        }
        if self.is_clean() {
            return writeln!(f, "no anomaly");
        }
        for (kind, count) in &self.counts {
            writeln!(f, "ANOMALY {kind:?}: {count}")?;
        }
        for anomaly in &self.anomalies {
            let seconds = anomaly.micros as f64 / 1e6;
            writeln!(
                f,
                "  {:?} at {seconds:.3} s: {}",
                anomaly.kind, anomaly.what
            )?;
        }
        Ok(())
    }
}
