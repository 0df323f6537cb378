//! The storage against a simple model, over random operations, power failures at every step, and
//! restarts. What was confirmed must be there, in order; what comes back must have been written.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

mod common;

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
                    let vote = Some(Bytes::from(vote));
                    let state = State {
                        vote,
                        ..model.last()
                    };
                    let number = model.push(state);
                    self.pending.push((*group, number, receiver));
                }
            }
            Op::Commit(group, back) => {
                let Some(log) = self.log(*group) else { return };
                let model = self.models.entry(*group).or_default();
                if let Some(last) = model.last().entries.last().map(|entry| entry.index) {
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
            Op::Purge(group, back) => self.purge(*group, *back),
            Op::LogStart(group, back) => self.set_log_start(*group, *back),
            Op::Roll(group) => {
                if let Some(log) = self.log(*group) {
                    let _ = log.roll();
                }
            }
            Op::Copy(from, to, back) => self.copy(*from, *to, *back),
            Op::Delete(group_id) => {
                let Some(storage) = &self.storage else { return };
                let result = storage.delete_log(group(*group_id));
                self.wait();
                let model = self.models.entry(*group_id).or_default();
                let number = model.push(State::default());
                if result.is_ok() {
                    model.confirm(number);
                    model.committed = None;
                }
            }
            Op::Wait => self.wait(),
            Op::Close => {
                if let Some(storage) = self.storage.take() {
                    let logs: Vec<_> = (1..4).filter_map(|id| self.log(id)).collect();
                    let result = storage.close();
                    self.wait();
                    if result.is_ok() {
                        self.check_files(&logs);
                    }
                    drop(logs);
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
        let mut state = model.last();
        let index = state
            .entries
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
                state.entries.extend(new);
                let number = model.push(state);
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
        let mut state = model.last();
        let entries = &mut state.entries;
        let keep = entries.len().saturating_sub(usize::from(back % 6));
        let committed = model.committed.map_or(0, |index| {
            entries.iter().filter(|entry| entry.index <= index).count()
        });
        entries.truncate(keep.max(committed));
        let index = entries.last().map(|entry| entry.index);
        let (done, receiver) = callback();
        if log.truncate_after(index, done).is_ok() {
            model.term += 1;
            let number = model.push(state);
            self.pending.push((group, number, receiver));
        }
    }

    fn purge(&mut self, group: u64, back: u8) {
        let Some(log) = self.log(group) else { return };
        let model = self.models.entry(group).or_default();
        let Some(committed) = model.committed else {
            return;
        };
        log.save_replica_state(committed, Bytes::from(committed.to_le_bytes().to_vec()));
        let index = committed.saturating_sub(u64::from(back % 5));
        let (done, receiver) = callback();
        match log.purge(index, done) {
            Ok(()) => {
                let mut state = model.last();
                state.purged = state.purged.max(Some(index));
                let number = model.push(state);
                self.pending.push((group, number, receiver));
            }
            Err(error) => assert!(
                matches!(
                    error,
                    StorageError::IndexOutOfRange { .. }
                        | StorageError::Poisoned { .. }
                        | StorageError::Io { .. }
                ),
                "{error}"
            ),
        }
    }

    fn set_log_start(&mut self, group: u64, back: u8) {
        let Some(log) = self.log(group) else { return };
        let model = self.models.entry(group).or_default();
        let Some(committed) = model.committed else {
            return;
        };
        let mut state = model.last();
        let offset = (state.end_of(committed) - i64::from(back % 7)).max(0);
        state.log_start = state.log_start.max(offset);
        let (done, receiver) = callback();
        match log.set_log_start(Offset(offset), done) {
            Ok(()) => {
                assert_eq!(log.log_start_offset().0, state.log_start);
                let number = model.push(state);
                self.pending.push((group, number, receiver));
            }
            Err(error) => assert!(matches!(error, StorageError::Poisoned { .. }), "{error}"),
        }
    }

    fn wait(&mut self) {
        for (group, number, receiver) in std::mem::take(&mut self.pending) {
            if answer(&receiver).is_ok() {
                self.models.entry(group).or_default().confirm(number);
            }
        }
    }

    fn copy(&mut self, from: u64, to: u64, back: u8) {
        let source = self.log(from).zip(self.models.get(&from));
        let Some((log, source)) = source.filter(|_| from != to) else {
            return;
        };
        let Some(committed) = source.committed else {
            return;
        };
        let index = committed.saturating_sub(u64::from(back % 3));
        let (mut state, term) = (source.last(), source.term);
        state.entries.retain(|entry| entry.index <= index);
        // A power failure or purged entries end it early, and then nothing must have changed.
        let Ok(export) = log.export(index) else {
            return;
        };
        let Some(installer) = self.send(&export, to) else {
            return;
        };
        // What was not answered yet is answered before the content changes.
        self.wait();
        let model = self.models.entry(to).or_default();
        let before = model.last();
        state.vote = before.vote.clone();
        model.term = model.term.max(term);
        state.purged = Some(index);
        state.log_start = state.log_start.min(state.end_of(index));
        let number = model.push(state);
        // If it fails, nobody knows which one it is until the next start.
        let committed = installer.commit(Bytes::from(index.to_le_bytes().to_vec()));
        match committed {
            Ok(()) => {
                model.committed = Some(index);
                model.confirm(number);
            }
            Err(_) => {
                model.committed = model.committed.max(Some(index));
                model.push(before);
            }
        }
    }

    /// Receives all; `None` if the power fails.
    fn send(&self, export: &Export, to: u64) -> Option<Installer> {
        let manifest = LogManifest::decode(&export.manifest().encode()).unwrap();
        let installer = self.storage.as_ref()?.install(group(to), manifest).ok()?;
        for segment in 0..installer.manifest().segments.len() {
            for file in [SegmentFile::Log, SegmentFile::Sidecar] {
                loop {
                    let position = installer.received(segment, file);
                    let bytes = export.read_chunk(segment, file, position, 700).ok()?;
                    if bytes.is_empty() {
                        break;
                    }
                    installer.write(segment, file, position, &bytes).ok()?;
                }
            }
            if let Err(error) = installer.check_segment(segment) {
                let is_power = matches!(
                    error,
                    StorageError::Io { .. } | StorageError::Poisoned { .. }
                );
                assert!(is_power, "{error}");
                return None;
            }
        }
        Some(installer)
    }

    /// There are exactly the files of the segments there are.
    fn check_files(&self, logs: &[PartitionLog]) {
        let known = |log: &PartitionLog| {
            let parts = log.segments().into_iter();
            let sized = parts.filter(|part| part.size_bytes > 0);
            let in_files = sized.filter(|part| part.state != SegmentState::Unflushed);
            in_files.map(|part| part.base_offset.0).collect::<Vec<_>>()
        };
        for log in logs {
            let part = format!("partitions/{}/", log.group_id().0);
            let paths = paths_with(&self.disk, &part).into_iter();
            let found = paths.filter(|path| path.extension().unwrap() == "log");
            let name = |path: std::path::PathBuf| path.file_name().unwrap().to_owned();
            let base = |name: std::ffi::OsString| name.to_str().unwrap()[..20].parse().unwrap();
            let found: Vec<i64> = found.map(name).map(base).collect();
            assert_eq!(found, known(log));
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
            if model.states.is_empty() {
                model.states.push(State::default());
            }
            let purged = log.purged().map(|purged| purged.index);
            let log_start = log.log_start_offset();
            let is_it = |state: &&State| {
                state.visible() == found && state.purged == purged && state.log_start == log_start.0
            };
            let Some(state) = model.states.iter().rev().find(is_it) else {
                panic!(
                    "group {group_id} has {found:?}, purged {purged:?}, from {log_start}, but could have {:?}",
                    model.states
                );
            };
            let mut state = state.clone();
            match log.read(log_start, log.log_end_offset(), usize::MAX) {
                Ok(read) => assert_eq!(read, state.batches()),
                Err(error) => {
                    assert!(
                        power_may_fail && matches!(error, StorageError::Io { .. }),
                        "{error}"
                    );
                    return;
                }
            }
            let vote = log.vote();
            assert!(model.states.iter().any(|state| state.vote == vote));
            state.vote = vote;
            assert!(log.committed() <= model.committed);
            assert!(purged <= log.committed());
            assert!(purged <= log.replica_state().map(|(index, _)| index));
            assert_eq!(
                log.durable_index(),
                log.last_entry_id().map(|(index, _)| index)
            );
            if let Some((index, state)) = log.replica_state() {
                assert_eq!(state[..], index.to_le_bytes());
                assert!(Some(index) <= log.durable_index());
            }
            let last = state.entries.last().map(|entry| entry.index);
            model.committed = model.committed.min(last);
            model.states = vec![state];
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
