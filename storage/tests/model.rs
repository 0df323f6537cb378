//! The storage against a simple model, over random operations, power failures at every step, and
//! restarts. What was confirmed must be there, in order; what comes back must have been written.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

use std::collections::BTreeMap;

use bytes::Bytes;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::{LogEntry, OpenError, PartitionLog, Payload, Storage, StorageError};
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
    Delete(u64),
    Wait,
    Close,
    Crash(u64),
}

/// What a log may look like after a crash: any of the states since the last one that is confirmed.
#[derive(Default)]
struct Model {
    states: Vec<(Vec<LogEntry>, Option<Bytes>)>,
    /// Number of the first of `states`.
    base: usize,
    committed: Option<u64>,
    term: u64,
}

impl Model {
    fn last(&self) -> (Vec<LogEntry>, Option<Bytes>) {
        self.states.last().cloned().unwrap_or_default()
    }

    fn push(&mut self, entries: Vec<LogEntry>, vote: Option<Bytes>) -> usize {
        if self.states.is_empty() {
            self.states.push(Default::default());
        }
        self.states.push((entries, vote));
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

impl World {
    fn new(disk: FaultyDisk) -> Self {
        World {
            storage: open_tight(&disk).ok(),
            disk,
            models: BTreeMap::new(),
            pending: Vec::new(),
            next_vote: 0,
        }
    }

    fn log(&self, group_id: u64) -> Option<PartitionLog> {
        self.storage.as_ref()?.open_log(group(group_id)).ok()
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Append(group, kinds) => self.append(*group, kinds),
            Op::Truncate(group, back) => self.truncate(*group, *back),
            Op::Vote(group, size) => {
                let Some(log) = self.log(*group) else { return };
                self.next_vote += 1;
                let mut vote = self.next_vote.to_le_bytes().to_vec();
                vote.resize(8 + usize::from(*size % 100), 1);
                let (done, receiver) = callback();
                if log.save_vote(Bytes::from(vote.clone()), done).is_ok() {
                    let model = self.models.entry(*group).or_default();
                    let entries = model.last().0;
                    let number = model.push(entries, Some(Bytes::from(vote)));
                    self.pending.push((*group, number, receiver));
                }
            }
            Op::Commit(group, back) => {
                let Some(log) = self.log(*group) else { return };
                let model = self.models.entry(*group).or_default();
                if let Some(last) = model.last().0.last().map(|entry| entry.index) {
                    let index = last.saturating_sub(u64::from(*back % 4));
                    model.committed = model.committed.max(Some(index));
                    log.set_committed(index);
                }
            }
            Op::ReplicaState(group) => {
                let Some(log) = self.log(*group) else { return };
                let model = self.models.entry(*group).or_default();
                if let Some(index) = model.committed {
                    log.save_replica_state(index, Bytes::from(index.to_le_bytes().to_vec()));
                }
            }
            Op::Delete(group_id) => {
                let Some(storage) = &self.storage else { return };
                let result = storage.delete_log(group(*group_id));
                self.wait();
                let model = self.models.entry(*group_id).or_default();
                let number = model.push(Vec::new(), None);
                if result.is_ok() {
                    model.confirm(number);
                    model.committed = None;
                }
            }
            Op::Wait => self.wait(),
            Op::Close => {
                if let Some(storage) = self.storage.take() {
                    let result = storage.close();
                    self.wait();
                    drop(storage);
                    if result.is_ok() {
                        match open_tight(&self.disk) {
                            Ok(storage) => self.check(storage, true),
                            // The power failed while opening; the crash is still to come.
                            Err(error) => assert!(
                                matches!(error, OpenError::Io { .. } | OpenError::Storage(_)),
                                "{error}"
                            ),
                        }
                    }
                }
            }
            Op::Crash(seed) => self.crash(*seed),
        }
    }

    fn append(&mut self, group: u64, kinds: &[(u8, u16)]) {
        let Some(log) = self.log(group) else { return };
        let model = self.models.entry(group).or_default();
        let (mut all, vote) = model.last();
        let index = all
            .last()
            .map_or(log.first_index(), |entry| entry.index + 1);
        let mut offset = log.log_end_offset().0;
        let mut new = Vec::new();
        for (index, (kind, size)) in (index..).zip(kinds) {
            let body = vec![index as u8; usize::from(*size % 900)];
            model.term += u64::from(*kind == 0);
            let entry = match kind {
                0 | 1 => blank(index, model.term),
                2 => membership(index, model.term, &body[..body.len() % 90]),
                _ => batches(
                    index,
                    model.term,
                    offset,
                    &[(1, 5, &body), (2, 6, b"second")],
                ),
            };
            if let Payload::Batches { next_offset, .. } = &entry.payload {
                offset = next_offset.0;
            }
            new.push(entry);
        }
        let (done, receiver) = callback();
        match log.append(new.clone(), done) {
            Ok(()) => {
                all.extend(new);
                let number = model.push(all, vote);
                self.pending.push((group, number, receiver));
            }
            Err(error) => assert!(
                matches!(
                    error,
                    StorageError::Overloaded { .. } | StorageError::Poisoned { .. }
                ),
                "{error}"
            ),
        }
    }

    fn truncate(&mut self, group: u64, back: u8) {
        let Some(log) = self.log(group) else { return };
        let model = self.models.entry(group).or_default();
        let (mut entries, vote) = model.last();
        let keep = entries.len().saturating_sub(usize::from(back % 6));
        let committed = model.committed.map_or(0, |index| {
            entries.iter().filter(|entry| entry.index <= index).count()
        });
        entries.truncate(keep.max(committed));
        let index = entries.last().map(|entry| entry.index);
        let (done, receiver) = callback();
        if log.truncate_after(index, done).is_ok() {
            model.term += 1;
            let number = model.push(entries, vote);
            self.pending.push((group, number, receiver));
        }
    }

    fn wait(&mut self) {
        for (group, number, receiver) in std::mem::take(&mut self.pending) {
            if answer(&receiver).is_ok() {
                self.models.entry(group).or_default().confirm(number);
            }
        }
    }

    /// Loses power and starts again. What was answered before the failure counts as confirmed.
    fn crash(&mut self, seed: u64) {
        let mut random = Random(seed | 1);
        let mut keep = || match seed % 4 {
            0 => false,
            1 => true,
            _ => !random.next().is_multiple_of(3),
        };
        let disk = self.disk.crash(&mut keep);
        // All callbacks come: those the disk did not hear of with an error.
        self.wait();
        self.storage = None;
        self.disk = disk;
        self.check(open_tight(&self.disk).unwrap(), false);
    }

    /// Compares what was recovered with what may be there.
    fn check(&mut self, storage: Storage, power_may_fail: bool) {
        for (group_id, model) in &mut self.models {
            let log = storage.open_log(group(*group_id)).ok();
            let found = log.and_then(|log| Some((try_entries(&log)?, log)));
            let Some((found, log)) = found else {
                assert!(power_may_fail);
                return;
            };
            let known = |entries: &Vec<LogEntry>| model.states.iter().any(|(e, _)| e == entries);
            assert!(
                known(&found) || (found.is_empty() && model.states.is_empty()),
                "group {group_id} has {found:?}, but could have {:?}",
                model.states
            );
            let vote = log.vote();
            let known = |vote: &Option<Bytes>| model.states.iter().any(|(_, v)| v == vote);
            assert!(known(&vote) || (vote.is_none() && model.states.is_empty()));
            assert!(log.committed() <= model.committed);
            assert_eq!(
                log.durable_index(),
                log.last_entry_id().map(|(index, _)| index)
            );
            if let Some((index, state)) = log.replica_state() {
                assert_eq!(state[..], index.to_le_bytes());
                assert!(Some(index) <= log.durable_index());
            }
            model.committed = model.committed.min(found.last().map(|entry| entry.index));
            model.states = vec![(found, vote)];
            model.base = 0;
        }
        self.storage = Some(storage);
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
        match random.next() % 12 {
            0 => ops.push(Op::Truncate(group, 2)),
            1 => ops.push(Op::Vote(group, 20)),
            2 => ops.push(Op::ReplicaState(group)),
            3 if step > 20 => ops.push(Op::Delete(group)),
            4 if step > 30 => ops.push(Op::Close),
            5 | 6 => ops.push(Op::Wait),
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
