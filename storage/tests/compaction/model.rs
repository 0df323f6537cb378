//! Random writes, compactions, copies and power failures, against what the log should hold.

use super::*;

#[derive(Debug, Clone)]
enum Op {
    /// Keys (few) and whether it is a tombstone; compressed or not.
    Write(Vec<(u8, bool)>, bool),
    /// By one of two producers: a record, then later its end.
    Transaction(u8, u8),
    End(u8, bool),
    Roll,
    Purge,
    LogStart(u8),
    Compact(u8, bool),
    /// The log's content goes to another log and back.
    Move,
    Crash(u64),
}

/// What was appended, by offset.
#[derive(Default)]
struct Model {
    records: BTreeMap<i64, (Pair, Fate)>,
    open: HashMap<u8, Vec<i64>>,
    log_start: i64,
    /// Tombstones before it may be gone.
    now_ms: i64,
    value: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Committed,
    Open,
    Aborted,
}

impl Model {
    fn check(&self, log: &PartitionLog) {
        let found = records(log).unwrap();
        let found: BTreeMap<i64, Pair> = found.into_iter().collect();
        for (offset, pair) in &found {
            assert_eq!(
                Some(pair),
                self.records.get(offset).map(|(pair, _)| pair),
                "at {offset}"
            );
        }
        let mut newest: HashMap<&[u8], i64> = HashMap::new();
        for (offset, ((key, _), fate)) in &self.records {
            if *fate == Fate::Committed {
                newest.insert(key, *offset);
            }
        }
        for (key, offset) in newest {
            let ((_, value), _) = &self.records[&offset];
            let may_be_gone = value.is_none() || offset < self.log_start;
            assert!(
                may_be_gone || found.contains_key(&offset),
                "{key:?} is not at {offset}"
            );
        }
        for (offset, (_, fate)) in &self.records {
            let must_be = *fate == Fate::Open && *offset >= self.log_start;
            assert!(
                !must_be || found.contains_key(offset),
                "open record at {offset}"
            );
        }
    }
}

struct World {
    disk: FaultyDisk,
    storage: Option<Storage>,
    model: Model,
}

fn open_log(disk: &FaultyDisk) -> Option<Storage> {
    let config = StorageConfig {
        segment_bytes: 1500,
        ..small_config()
    };
    Storage::open(config, Arc::new(disk.clone()) as Arc<dyn Disk>).ok()
}

impl World {
    fn new(disk: FaultyDisk) -> Self {
        World {
            storage: open_log(&disk),
            disk,
            model: Model::default(),
        }
    }

    fn log(&self) -> Option<PartitionLog> {
        self.storage.as_ref()?.open_log(group(1)).ok()
    }

    fn append(&mut self, producer: Option<u8>, attributes: i16, pairs: &[Pair]) -> bool {
        let Some(log) = self.log() else { return false };
        let (time, id) = (self.model.now_ms, producer.map_or(-1, i64::from));
        let base = log.log_end_offset().0;
        let appended = append_batch(&log, |base| keyed(base, time, attributes, id, pairs));
        if attributes & CONTROL == 0 {
            let fate = if producer.is_some() {
                Fate::Open
            } else {
                Fate::Committed
            };
            for (offset, pair) in (base..).zip(pairs) {
                if appended.is_ok() {
                    self.model.records.insert(offset, (pair.clone(), fate));
                    let open = self.model.open.entry(producer.unwrap_or(0)).or_default();
                    open.extend(producer.map(|_| offset));
                }
            }
        }
        appended.is_ok()
    }

    fn value(&mut self) -> Option<Vec<u8>> {
        self.model.value += 1;
        Some(format!("value {} {}", self.model.value, "x".repeat(40)).into_bytes())
    }

    fn apply(&mut self, op: &Op) {
        let Some(log) = self.log() else { return };
        self.model.now_ms += 100;
        match op {
            Op::Write(keys, is_compressed) => {
                let pairs: Vec<Pair> = keys
                    .iter()
                    .map(|(key, is_tombstone)| {
                        let value = self.value().filter(|_| !is_tombstone);
                        (vec![key % 6], value)
                    })
                    .collect();
                self.append(None, i16::from(*is_compressed), &pairs);
            }
            Op::Transaction(producer, key) => {
                let value = self.value();
                self.append(
                    Some(1 + producer % 2),
                    TRANSACTIONAL,
                    &[(vec![key % 6], value)],
                );
            }
            Op::End(producer, is_abort) => {
                let producer = 1 + producer % 2;
                let attributes = TRANSACTIONAL | CONTROL;
                if self.append(Some(producer), attributes, &marker_pair(*is_abort)) {
                    let fate = if *is_abort {
                        Fate::Aborted
                    } else {
                        Fate::Committed
                    };
                    for offset in self.model.open.remove(&producer).unwrap_or_default() {
                        self.model.records.get_mut(&offset).unwrap().1 = fate;
                    }
                }
            }
            Op::Roll => drop(log.roll()),
            Op::Purge => drop(purge_all(&log)),
            Op::LogStart(back) => {
                let offset = Offset((log.log_end_offset().0 - i64::from(*back)).max(0));
                let (done, receiver) = callback();
                if log.set_log_start(offset, done).is_ok() {
                    // Whether or not it is durable, what is below need not be there.
                    self.model.log_start = self.model.log_start.max(offset.0);
                    let _ = answer(&receiver);
                }
            }
            Op::Compact(memory, is_cancelled) => {
                let mut left = if *is_cancelled { 2 } else { usize::MAX };
                let request = CompactionRequest {
                    settings: SETTINGS,
                    now_ms: self.model.now_ms,
                    limit: log.log_end_offset(),
                    active_producers: HashMap::new(),
                    map_max_bytes: usize::from(*memory) * 10,
                };
                let result = log.compact(&request, &mut |_| {
                    left = left.saturating_sub(1);
                    if left == 0 {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                });
                if let Err(error) = result {
                    let is_power = matches!(
                        error,
                        StorageError::Io { .. } | StorageError::Poisoned { .. }
                    );
                    assert!(is_power, "{error}");
                }
                self.check_running();
            }
            Op::Move => {
                let _ = self.transfer(1, 2).and_then(|()| self.transfer(2, 1));
            }
            Op::Crash(seed) => self.crash(*seed),
        }
    }

    fn check_running(&self) {
        if let Some(log) = self.log()
            && log
                .read(log.log_start_offset(), log.log_end_offset(), 1)
                .is_ok()
            && records(&log).is_ok()
        {
            self.model.check(&log);
        }
    }

    fn transfer(&self, from: u64, to: u64) -> Result<(), StorageError> {
        let storage = self.storage.as_ref().ok_or(StorageError::Closed)?;
        let log = storage.open_log(group(from))?;
        let Some((last, _)) = log.last_entry_id() else {
            return Err(StorageError::Closed);
        };
        let export = log.export(last)?;
        let installer = storage.install(group(to), export.manifest().clone())?;
        for (number, segment) in export.manifest().segments.iter().enumerate() {
            for file in [SegmentFile::Log, SegmentFile::Sidecar] {
                let size = segment.file_bytes(file) as usize;
                installer.write(number, file, 0, &export.read_chunk(number, file, 0, size)?)?;
            }
            if let Err(error) = installer.check_segment(number) {
                assert!(!error.is_damage(), "{error}");
                return Err(error);
            }
        }
        installer.commit(Bytes::new())
    }

    fn crash(&mut self, seed: u64) {
        let mut state = seed | 1;
        let mut keep = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match seed % 4 {
                0 => false,
                1 => true,
                _ => !state.is_multiple_of(3),
            }
        };
        let disk = self.disk.crash(&mut keep);
        self.storage = None;
        self.disk = disk;
        let storage = open_log(&self.disk).unwrap();
        assert!(storage.damaged().is_empty(), "{:?}", storage.damaged());
        let log = storage.open_log(group(1)).unwrap();
        // What was not confirmed may be there all the same; it is taken over as it is found.
        for (offset, pair) in records(&log).unwrap() {
            self.model
                .records
                .entry(offset)
                .or_insert((pair, Fate::Open));
        }
        let end = log.log_end_offset().0;
        assert!(self.model.records.keys().all(|offset| *offset < end));
        self.model.check(&log);
        // An orderly end here or there, so that both kinds of start are seen.
        self.storage = Some(storage);
        if seed.is_multiple_of(5) {
            let storage = self.storage.as_ref().unwrap();
            // The files of a copy are not the log's.
            storage.forget_unfinished_copy(group(1));
            storage.close().unwrap();
            self.storage = open_log(&self.disk);
            self.model.check(&self.log().unwrap());
            let names = paths_with(&self.disk, "partitions/1/").into_iter();
            let logs = names
                .filter(|name| name.extension().unwrap() == "log")
                .count();
            let parts = self.log().unwrap().segments().into_iter();
            let in_files = parts.filter(|part| part.state != SegmentState::Unflushed);
            assert_eq!(logs, in_files.filter(|part| part.size_bytes > 0).count());
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let keys = proptest::collection::vec((any::<u8>(), proptest::bool::weighted(0.2)), 1..5);
    prop_oneof![
        10 => (keys, any::<bool>()).prop_map(|(keys, gzip)| Op::Write(keys, gzip)),
        4 => (any::<u8>(), any::<u8>()).prop_map(|(producer, key)| Op::Transaction(producer, key)),
        3 => (any::<u8>(), any::<bool>()).prop_map(|(producer, abort)| Op::End(producer, abort)),
        3 => Just(Op::Roll),
        3 => Just(Op::Purge),
        1 => any::<u8>().prop_map(Op::LogStart),
        4 => (any::<u8>(), proptest::bool::weighted(0.2)).prop_map(|(m, c)| Op::Compact(m, c)),
        1 => Just(Op::Move),
        1 => any::<u64>().prop_map(Op::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 150,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn the_last_value_of_each_key_survives_everything(
        ops in proptest::collection::vec(op(), 1..120),
        last in any::<u64>(),
    ) {
        let mut world = World::new(FaultyDisk::new());
        ops.iter().for_each(|op| world.apply(op));
        world.check_running();
        world.crash(last);
    }
}

/// A fixed run with everything in it.
fn script(seed: u64) -> Vec<Op> {
    let mut state = seed * 77 + 13;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut ops = Vec::new();
    for step in 0..45u64 {
        let number = next();
        let keys = (0..1 + number % 4).map(|i| ((number >> (8 * i)) as u8, (number >> i) & 7 == 0));
        ops.push(Op::Write(keys.collect(), number & 1 == 0));
        match next() % 7 {
            0 => ops.push(Op::Transaction(step as u8, number as u8)),
            1 => ops.push(Op::End(step as u8, number & 2 == 0)),
            2 => ops.extend([Op::Roll, Op::Purge]),
            3 if step > 30 => ops.push(Op::Move),
            _ => {}
        }
        if step % 11 == 10 {
            ops.extend([Op::Roll, Op::Purge, Op::Compact(40, false)]);
        }
    }
    ops
}

#[test]
fn the_power_may_fail_at_every_step_of_a_compaction() {
    for seed in 1..3 {
        let ops = script(seed);
        let mut whole = World::new(FaultyDisk::new());
        ops.iter().for_each(|op| whole.apply(op));
        let removed = whole.storage.as_ref().unwrap().stats();
        assert!(removed.compactions >= 4 && removed.compaction_written_bytes > 0);
        let calls = whole.disk.changing_calls();
        for step in 0..calls + 5 {
            let disk = FaultyDisk::new();
            disk.fail_power_after(step);
            let mut world = World::new(disk);
            ops.iter().for_each(|op| world.apply(op));
            world.crash(seed * 1000 + step as u64);
            world.apply(&Op::Compact(100, false));
            world.crash(step as u64);
        }
    }
}
