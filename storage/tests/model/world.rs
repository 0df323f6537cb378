//! What is done to the storage, and to the model beside it; and the comparison of the two.

use super::*;

impl World {
    pub(super) fn new(disk: FaultyDisk) -> Self {
        World {
            storage: open_tight(&disk).ok(),
            disk,
            models: BTreeMap::new(),
            pending: Vec::new(),
            next_vote: 0,
        }
    }

    pub(super) fn log(&self, group_id: u64) -> Option<PartitionLog> {
        self.storage.as_ref()?.open_log(group(group_id)).ok()
    }

    pub(super) fn apply(&mut self, op: &Op) {
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
        let storage = self.storage.as_ref()?;
        // Copies of one group are of one log elsewhere; here each is of another.
        storage.forget_unfinished_copy(group(to));
        let installer = storage.install(group(to), manifest).ok()?;
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
    pub(super) fn crash(&mut self, seed: u64) {
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
    pub(super) fn check(&mut self, storage: Storage, power_may_fail: bool) {
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
