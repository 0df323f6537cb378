//! The storage against a simple model, over random operations, power failures at every step, and
//! restarts. What was confirmed must be there, in order; what comes back must have been written.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

#[path = "../common/mod.rs"]
mod common;
mod world;

use std::collections::BTreeMap;

use bytes::Bytes;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::{
    Export, Installer, LogEntry, LogManifest, OpenError, PartitionLog, Payload, SegmentFile,
    SegmentState, Storage, StorageError,
};
use chronik_types::offset::Offset;
use chronik_types::record_batch::batches as batches_in;
use common::*;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    /// Entries of these kinds and sizes, appended together.
    Append(u64, Vec<(u8, u16)>),
    /// Back from the end, not below what is committed.
    Truncate(u64, u8),
    Vote(u64, u8),
    /// So many entries before the end.
    Commit(u64, u8),
    ReplicaState(u64),
    /// So many entries before what is committed.
    Purge(u64, u8),
    /// So many offsets before what is committed.
    LogStart(u64, u8),
    Roll(u64),
    /// The content of one log becomes that of another, up to so many entries before what is
    /// committed.
    Copy(u64, u64, u8),
    Delete(u64),
    Wait,
    Close,
    Crash(u64),
}

/// All that was ever appended and not truncated, and what is hidden of it.
#[derive(Debug, Clone, Default)]
struct State {
    entries: Vec<LogEntry>,
    vote: Option<Bytes>,
    purged: Option<u64>,
    log_start: i64,
}

impl State {
    fn visible(&self) -> &[LogEntry] {
        let is_hidden = |entry: &LogEntry| Some(entry.index) <= self.purged;
        &self.entries[self.entries.partition_point(is_hidden)..]
    }

    /// The batches that hold offsets from the log start on.
    fn batches(&self) -> Vec<Bytes> {
        let mut out = Vec::new();
        for entry in &self.entries {
            if let Payload::Batches { bytes, .. } = &entry.payload {
                for (at, header) in batches_in(bytes).map(Result::unwrap) {
                    if header.next_offset().0 > self.log_start {
                        out.push(bytes.slice(at..at + header.size_bytes()));
                    }
                }
            }
        }
        out
    }

    fn end_of(&self, index: u64) -> i64 {
        let below = self.entries.iter().filter(|entry| entry.index <= index);
        let offsets = below.filter_map(|entry| match &entry.payload {
            Payload::Batches { next_offset, .. } => Some(next_offset.0),
            _ => None,
        });
        offsets.max().unwrap_or(0)
    }
}

/// What a log may look like after a crash: any of the states since the last one that is confirmed.
#[derive(Default)]
struct Model {
    states: Vec<State>,
    /// Number of the first of `states`.
    base: usize,
    committed: Option<u64>,
    term: u64,
}

impl Model {
    fn last(&self) -> State {
        self.states.last().cloned().unwrap_or_default()
    }

    fn push(&mut self, state: State) -> usize {
        if self.states.is_empty() {
            self.states.push(Default::default());
        }
        self.states.push(state);
        self.base + self.states.len() - 1
    }

    fn confirm(&mut self, number: usize) {
        if number > self.base {
            self.states.drain(..number - self.base);
            self.base = number;
        }
    }
}

struct World {
    disk: FaultyDisk,
    storage: Option<Storage>,
    models: BTreeMap<u64, Model>,
    pending: Vec<(u64, usize, Answer)>,
    next_vote: u64,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn op() -> impl Strategy<Value = Op> {
    let group = 1u64..4;
    prop_oneof![
        10 => (group.clone(), proptest::collection::vec((0u8..12, any::<u16>()), 1..5))
            .prop_map(|(group, kinds)| Op::Append(group, kinds)),
        2 => (group.clone(), any::<u8>()).prop_map(|(group, back)| Op::Truncate(group, back)),
        2 => (group.clone(), any::<u8>()).prop_map(|(group, size)| Op::Vote(group, size)),
        6 => (group.clone(), any::<u8>()).prop_map(|(group, back)| Op::Commit(group, back)),
        1 => group.clone().prop_map(Op::ReplicaState),
        2 => (group.clone(), any::<u8>()).prop_map(|(group, back)| Op::Purge(group, back)),
        2 => (group.clone(), any::<u8>()).prop_map(|(group, back)| Op::LogStart(group, back)),
        1 => group.clone().prop_map(Op::Roll),
        2 => (group.clone(), group.clone(), any::<u8>())
            .prop_map(|(from, to, back)| Op::Copy(from, to, back)),
        1 => group.prop_map(Op::Delete),
        4 => Just(Op::Wait),
        1 => Just(Op::Close),
        2 => any::<u64>().prop_map(Op::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn what_was_confirmed_survives_and_nothing_is_invented(
        ops in proptest::collection::vec(op(), 1..150),
        last in any::<u64>(),
    ) {
        let mut world = World::new(FaultyDisk::new());
        ops.iter().for_each(|op| world.apply(op));
        world.crash(last);
        world.apply(&Op::Close);
    }
}

/// A fixed run that appends, truncates, votes, commits, flushes, rolls, recycles, deletes, closes.
fn script(seed: u64) -> Vec<Op> {
    let mut random = Random(seed * 77 + 13);
    let mut ops = Vec::new();
    for step in 0..60 {
        let group = 1 + random.next() % 2;
        let kinds = (0..1 + random.next() % 3).map(|_| {
            let number = random.next();
            ((number % 12) as u8, (number >> 8) as u16)
        });
        ops.push(Op::Append(group, kinds.collect()));
        match random.next() % 15 {
            0 => ops.push(Op::Truncate(group, 2)),
            1 => ops.push(Op::Vote(group, 20)),
            2 => ops.push(Op::ReplicaState(group)),
            3 if step > 20 => ops.push(Op::Delete(group)),
            4 if step > 30 => ops.push(Op::Close),
            5 | 6 => ops.push(Op::Wait),
            7 => ops.push(Op::Purge(group, (random.next() % 4) as u8)),
            8 => ops.push(Op::LogStart(group, (random.next() % 5) as u8)),
            9 => ops.push(Op::Roll(group)),
            10 => ops.push(Op::Copy(group, 3 - group, (random.next() % 3) as u8)),
            _ => ops.push(Op::Commit(group, (random.next() % 3) as u8)),
        }
    }
    ops.push(Op::Close);
    ops
}

#[test]
fn the_power_may_fail_at_every_step() {
    let mut failures = 0;
    for seed in 0..3 {
        let ops = script(seed);
        let mut whole = World::new(FaultyDisk::new());
        ops.iter().for_each(|op| whole.apply(op));
        let calls = whole.disk.changing_calls();
        assert!(calls > 100, "{calls}");
        // The flusher runs beside, so a step may be reached a little earlier or later.
        for step in 0..calls + 5 {
            let disk = FaultyDisk::new();
            disk.fail_power_after(step);
            let mut world = World::new(disk);
            ops.iter().for_each(|op| world.apply(op));
            failures += 1;
            world.crash(seed * 1000 + step as u64);
            // And once more, right after the recovery, and then all still works.
            world.crash(step as u64);
            world.apply(&Op::Append(1, vec![(5, 100)]));
            world.apply(&Op::Close);
        }
    }
    assert!(failures > 300);
}
