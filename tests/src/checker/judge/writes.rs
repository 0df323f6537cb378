//! What was written against what is in the log: lost, duplicated, reordered, failed and still read,
//! acknowledged at another offset.

use std::collections::{BTreeMap, HashMap};

use super::index::{Index, Outcome, Sighting};
use super::{Kind, Verdict};
use crate::checker::history::{CORRUPT, Mode, PartitionNumber, WrittenValue};

/// Where each value of a partition was seen first in the log's order, and how often.
type Places = HashMap<WrittenValue, (u64, usize)>;

pub fn check(index: &Index, verdict: &mut Verdict) {
    lost(index, verdict);
    for partition in 0..index.names.len() {
        let places = places(&index.log[partition]);
        duplicated(index, partition, verdict);
        reordered(index, partition, &places, verdict);
        numbered_in_order(index, partition, verdict);
        outcomes(index, partition, &places, verdict);
        acknowledged_offsets(index, partition, verdict);
    }
}

fn places(log: &BTreeMap<u64, Sighting>) -> Places {
    let mut places = Places::new();
    for (offset, sighting) in log {
        if sighting.value != CORRUPT {
            places.entry(sighting.value).or_insert((*offset, 0)).1 += 1;
        }
    }
    places
}

/// Every acknowledged value is in every read back.
fn lost(index: &Index, verdict: &mut Verdict) {
    for read_back in &index.read_backs {
        for (partition, sends) in index.sends.iter().enumerate() {
            for (value, send) in sends {
                let Outcome::Acked { offset, micros } = send.outcome else {
                    continue;
                };
                if !read_back.values[partition].contains(value) {
                    let what = format!(
                        "{} was acknowledged at offset {offset:?} at {:.3} s and is not there when \
                         read back ({}, reader {})",
                        index.describe(partition, *value),
                        micros as f64 / 1e6,
                        read_back.what,
                        read_back.reader,
                    );
                    verdict.add(Kind::Lost, read_back.micros, what);
                }
            }
        }
    }
}

fn duplicated(index: &Index, partition: PartitionNumber, verdict: &mut Verdict) {
    let mut first: HashMap<WrittenValue, u64> = HashMap::new();
    for (offset, sighting) in &index.log[partition] {
        let value = sighting.value;
        if value == CORRUPT {
            continue;
        }
        let Some(before) = first.insert(value, *offset) else {
            continue;
        };
        match index.modes.get(&value.client) {
            Some(Mode::Retry) => {
                verdict.note("duplicates of producers that retry without numbers");
            }
            _ => {
                let what = format!(
                    "{} is at offset {before} and at offset {offset}",
                    index.describe(partition, value)
                );
                verdict.add(Kind::Duplicated, sighting.micros, what);
            }
        }
    }
}

/// What was sent after an acknowledgement lands behind what was acknowledged, whoever sent it.
fn reordered(index: &Index, partition: PartitionNumber, places: &Places, verdict: &mut Verdict) {
    for (value, (offset, _)) in places {
        let Some(send) = index.sends[partition].get(value) else {
            continue;
        };
        if let Some(floor) = send.floor.filter(|floor| offset <= floor) {
            let what = format!(
                "{} is at offset {offset}, though offset {floor} was acknowledged before it was sent",
                index.describe(partition, *value),
            );
            verdict.add(Kind::Reordered, send.micros, what);
        }
    }
}

/// A numbering producer's values are in the log in its order, and without holes before the last.
fn numbered_in_order(index: &Index, partition: PartitionNumber, verdict: &mut Verdict) {
    // Next sequence number expected of each client.
    let mut expected: HashMap<u32, u32> = HashMap::new();
    for (offset, sighting) in &index.log[partition] {
        let value = sighting.value;
        if index.modes.get(&value.client) != Some(&Mode::Idempotent) {
            continue;
        }
        let next = expected.entry(value.client).or_default();
        let given_up = |missing| was_given_up(index, partition, value, missing);
        if value.sequence > *next && !(*next..value.sequence).all(given_up) {
            let what = format!(
                "{} is at offset {offset}, and its values {} to {} are not before it",
                index.describe(partition, value),
                next,
                value.sequence - 1
            );
            verdict.add(Kind::Hole, sighting.micros, what);
        } else if value.sequence < *next {
            // A second sighting of the same value is a duplicate and told as one.
            let what = format!(
                "{} is at offset {offset}, behind its value {}",
                index.describe(partition, value),
                *next - 1
            );
            verdict.add(Kind::Reordered, sighting.micros, what);
        }
        *next = (*next).max(value.sequence.saturating_add(1));
    }
}

/// Whether the client had told that `missing` may not be done before it sent `later` at all. A client
/// that never got its producer id, say, gives up what waits for it, and goes on with the next.
fn was_given_up(
    index: &Index,
    partition: PartitionNumber,
    later: WrittenValue,
    missing: u32,
) -> bool {
    let sends = &index.sends[partition];
    let earlier = WrittenValue {
        sequence: missing,
        ..later
    };
    match (
        sends.get(&earlier).map(|send| send.outcome),
        sends.get(&later),
    ) {
        (Some(Outcome::Unknown { micros }), Some(later)) => micros <= later.micros,
        _ => false,
    }
}

/// What certainly failed is not there.
fn outcomes(index: &Index, partition: PartitionNumber, places: &Places, verdict: &mut Verdict) {
    for (value, (offset, _)) in places {
        let Some(send) = index.sends[partition].get(value) else {
            continue;
        };
        match send.outcome {
            Outcome::Failed => {
                let what = format!(
                    "{} is at offset {offset}, though its producer was told that it was not written",
                    index.describe(partition, *value)
                );
                verdict.add(Kind::FailedRead, send.micros, what);
            }
            Outcome::Unknown { .. } => verdict.note("sends of unknown outcome that were done"),
            Outcome::Pending | Outcome::Acked { .. } => {}
        }
    }
}

/// A value is at the offset that its producer was told, and nobody was told the same offset.
fn acknowledged_offsets(index: &Index, partition: PartitionNumber, verdict: &mut Verdict) {
    let mut told: HashMap<u64, WrittenValue> = HashMap::new();
    for (value, send) in &index.sends[partition] {
        let Outcome::Acked {
            offset: Some(offset),
            micros,
        } = send.outcome
        else {
            continue;
        };
        if let Some(other) = told.insert(offset, *value) {
            let what = format!(
                "{} and {} were both acknowledged at offset {offset}",
                index.describe(partition, *value),
                index.describe(partition, other),
            );
            verdict.add(Kind::InconsistentOffset, micros, what);
        }
        let Some(there) = index.log[partition].get(&offset) else {
            continue;
        };
        if there.value != *value {
            let what = format!(
                "{} was acknowledged at offset {offset}, where {} is",
                index.describe(partition, *value),
                index.describe(partition, there.value),
            );
            verdict.add(Kind::InconsistentOffset, micros, what);
        }
    }
}
