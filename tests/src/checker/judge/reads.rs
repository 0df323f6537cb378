//! What each reader saw: every offset once and in order from where it began, everything by the end,
//! bytes as they were written, no error that ends reading.

use std::collections::HashMap;

use super::index::Index;
use super::{Kind, Verdict};
use crate::checker::history::{Event, PartitionNumber, Timed};

/// Words of errors that a reader or writer of these topics is never to meet: all topics exist, all
/// offsets asked for were given out before, all numbers were given in order.
const REFUSALS: &[&str] = &[
    "OFFSET_OUT_OF_RANGE",
    "data loss",
    "CORRUPT_MESSAGE",
    "INVALID_RECORD",
    "UNKNOWN_SERVER_ERROR",
    "OUT_OF_ORDER_SEQUENCE_NUMBER",
    "DUPLICATE_SEQUENCE_NUMBER",
    "UNKNOWN_PRODUCER_ID",
    "INVALID_PRODUCER_EPOCH",
    "MESSAGE_TOO_LARGE",
    "INVALID_TOPIC",
    "UNSUPPORTED_VERSION",
    "INVALID_REQUEST",
];

pub fn check(history: &[Timed], index: &Index, verdict: &mut Verdict) {
    let mut expected: HashMap<(u32, PartitionNumber), u64> = HashMap::new();
    for timed in history {
        let micros = timed.micros;
        match &timed.event {
            Event::Seek {
                reader,
                partition,
                offset,
            } => {
                expected.insert((*reader, *partition), *offset);
            }
            // Where a member begins is judged with the group's commits.
            Event::Assign { reader, partition } | Event::Revoke { reader, partition } => {
                expected.remove(&(*reader, *partition));
            }
            Event::Poll {
                reader,
                partition,
                offset,
                values,
            } => {
                let next = offset.saturating_add(values.len() as u64);
                let before = expected.insert((*reader, *partition), next);
                let kind = match before {
                    Some(before) if *offset < before => Kind::NonMonotonicRead,
                    Some(before) if *offset > before => Kind::Skipped,
                    _ => continue,
                };
                let what = format!(
                    "reader {reader} of {} was at offset {} and got offset {offset}",
                    index.name(*partition),
                    before.unwrap_or_default(),
                );
                verdict.add(kind, micros, what);
            }
            Event::Corrupt {
                reader,
                partition,
                offset,
                why,
            } => {
                let name = index.name(*partition);
                let what = format!("reader {reader} at offset {offset} of {name}: {why}");
                verdict.add(Kind::Corrupt, micros, what);
            }
            Event::Error { reader, why } => told(&format!("reader {reader}"), micros, why, verdict),
            Event::Unknown { value, why, .. } | Event::Fail { value, why, .. } => {
                told(&format!("client {}", value.client), micros, why, verdict);
            }
            Event::Uncommitted { why, .. } => told("a group member", micros, why, verdict),
            _ => {}
        }
    }
    unseen(history, index, verdict);
}

fn told(who: &str, micros: u64, why: &str, verdict: &mut Verdict) {
    if REFUSALS.iter().any(|refusal| why.contains(refusal)) {
        verdict.add(Kind::Refused, micros, format!("{who} was told: {why}"));
    } else {
        // The first words tell the kind; addresses and numbers follow.
        let kind: String = why.chars().take_while(|c| *c != ':').take(40).collect();
        verdict.note(&format!("told '{kind}'"));
    }
}

/// Those who read everything, the follower of the log and the group as a whole, saw everything that
/// the first read back found.
fn unseen(history: &[Timed], index: &Index, verdict: &mut Verdict) {
    let Some(read_back) = index.read_backs.first() else {
        return;
    };
    for kind in ["tail", "member"] {
        let mut seen: Vec<Vec<(u64, u64)>> = vec![Vec::new(); index.names.len()];
        for timed in history {
            if let Event::Poll {
                reader,
                partition,
                offset,
                values,
            } = &timed.event
                && index.kinds.get(reader).is_some_and(|found| found == kind)
            {
                seen[*partition].push((*offset, offset + values.len() as u64));
            }
        }
        let ends = ends_of(history, read_back.reader, index.names.len());
        for (partition, ranges) in seen.iter_mut().enumerate() {
            ranges.sort_unstable();
            for (from, to) in missing(ranges, ends[partition]) {
                let what = format!(
                    "offsets {from} to {} of {} were never given to any reader of kind {kind}",
                    to - 1,
                    index.name(partition)
                );
                verdict.add(Kind::Unseen, read_back.micros, what);
            }
        }
    }
}

fn ends_of(history: &[Timed], of: u32, partitions: usize) -> Vec<u64> {
    let mut ends = vec![0; partitions];
    for timed in history {
        if let Event::End {
            reader,
            partition,
            offset,
        } = &timed.event
            && *reader == of
        {
            ends[*partition] = *offset;
        }
    }
    ends
}

/// What sorted, half-open ranges leave of 0..end.
fn missing(ranges: &[(u64, u64)], end: u64) -> Vec<(u64, u64)> {
    let mut missing = Vec::new();
    let mut next = 0;
    for (from, to) in ranges {
        if *from > next {
            missing.push((next, *from));
        }
        next = next.max(*to);
    }
    if next < end {
        missing.push((next, end));
    }
    missing
}
