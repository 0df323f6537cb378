//! Takes old WAL files out of use, writes checkpoints, deletes logs.
//!
//! The order, so that a crash after any step loses nothing:
//!
//! ```text
//! 1. committed entries in the old files go to segments     not named by the old checkpoint: cut off
//!                                                          after a crash, and replayed from the WAL
//! 2. what cannot (or is too little) is appended to the     replayed twice after a crash, the second
//!    WAL once more; wait until that is durable             time without effect
//! 3. segments are fsynced
//! 4. the checkpoint is replaced                            from here on the old files are superfluous
//! 5. the old files become spares                           a leftover is recycled at the next start
//! ```

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, sync_channel};

use chronik_types::id::RaftGroupId;

use super::Flusher;
use crate::checkpoint::{Checkpoint, GroupCheckpoint};
use crate::entry::LogEntry;
use crate::error::StorageError;
use crate::memory::size_of;
use crate::partition_log::Log;
use crate::segment::dir_of;
use crate::sync::lock;
use crate::transfer::forget_left;
use crate::wal::queue::Item;
use crate::wal::recovery::WalStart;
use crate::wal::{Done, Record, WalFile, Written};

/// A log with less than this in old WAL files is not flushed: writing a few bytes again costs less
/// than syncing files of its own. So an idle partition has no files.
const RELOCATE_BELOW_BYTES: usize = 64 << 10;
const RELOCATE_BELOW_BYTES_AT_CLOSE: usize = 4 << 10;
/// Bytes of one relocated record.
const RELOCATE_PART_BYTES: usize = 4 << 20;

pub(super) type Answer = Receiver<Result<Written, StorageError>>;

/// A log whose entries were appended to the WAL once more, and the answers for each part.
struct Relocated {
    log: Arc<Log>,
    answers: Vec<Answer>,
}

impl Flusher {
    /// Empties the older half of the WAL's files if there are too many.
    pub(super) fn recycle_if_due(&mut self) -> Result<(), StorageError> {
        self.core.poison.check()?;
        let file_size = self.wal_files.file_size_bytes().max(1);
        let extra = (2 * self.relocated_bytes as u64).div_ceil(file_size) as usize;
        let live = self.wal_files.live();
        if live.len() > self.wal_files_max + extra {
            let keep = (self.wal_files_max / 2).max(1).min(live.len());
            let first_kept = live[live.len() - keep];
            self.recycle(first_kept, RELOCATE_BELOW_BYTES, false)?;
        }
        if self.wal_files.wants_spare() {
            self.core.signals.prepare_spare();
        }
        Ok(())
    }

    /// Flushes all, and leaves a WAL with next to nothing in it.
    pub fn close(&mut self) -> Result<(), StorageError> {
        self.core.poison.check()?;
        let mark = self.push(Record::mark(), true);
        let sequence = self.wait_for(mark)?.file_sequence;
        let live = self.wal_files.live();
        let first_kept = live.into_iter().find(|file| file.sequence == sequence);
        let first_kept = first_kept.expect("the mark's file is in use until it is recycled");
        self.trim_all()?;
        self.recycle(first_kept, RELOCATE_BELOW_BYTES_AT_CLOSE, true)
    }

    /// Makes the WAL files before `first_kept` superfluous and takes them out of use.
    fn recycle(
        &mut self,
        first_kept: WalFile,
        relocate_below: usize,
        is_close: bool,
    ) -> Result<(), StorageError> {
        let mut old: Vec<(usize, Arc<Log>)> = Vec::new();
        for log in self.logs.all() {
            let state = log.lock();
            if state.needs_files_before(first_kept.sequence) {
                let bytes = state.pinned_bytes();
                drop(state);
                old.push((bytes, log));
            }
        }
        // The smallest first, as long as writing them again is little against what is gained.
        old.sort_unstable_by_key(|(bytes, _)| *bytes);
        let mut budget =
            usize::try_from(self.wal_files.file_size_bytes() / 4).unwrap_or(usize::MAX);
        let mut relocated = Vec::new();
        self.relocated_bytes = 0;
        for (bytes, log) in old {
            let is_small = bytes < relocate_below && bytes <= budget;
            if is_small {
                budget -= bytes;
            } else {
                self.flush(&log)?;
            }
            self.relocate(log, first_kept.sequence, &mut relocated);
        }
        for Relocated { log, answers } in relocated {
            let written: Vec<Written> = answers
                .into_iter()
                .map(|answer| self.wait_for(answer))
                .collect::<Result<_, _>>()?;
            if let Some(first) = written.first() {
                log.lock()
                    .relocated(first.record_number, first.file_sequence);
            }
        }
        self.sync_all(is_close)?;
        self.write_checkpoint(first_kept, is_close)?;
        self.wal_files.retire_before(first_kept.sequence)?;
        self.logs.forget_deleted_before(first_kept.first_record);
        Ok(())
    }

    /// Appends all entries of a log that are in no segment to the WAL once more, so that what the
    /// WAL says of the log before that is not needed. The log stays locked meanwhile, so that they
    /// keep their place among its other records.
    ///
    /// A log that was cut has to go through this even if nothing of it is in an old file:
    /// ```text
    /// file 1: entries 0, 1, 2     file 2: entry 3, truncate to 1     (entry 0 is in a segment)
    /// ```
    /// Without file 1 entry 3 would follow a gap, though nothing is missing.
    fn relocate(&mut self, log: Arc<Log>, first_kept: u64, relocated: &mut Vec<Relocated>) {
        let mut state = log.lock();
        if !state.needs_files_before(first_kept) {
            return;
        }
        state.was_cut = false;
        let from = (state.flushed_next - state.tail_first) as usize;
        let mut parts: Vec<Vec<&LogEntry>> = vec![Vec::new()];
        let mut size = 0;
        for entry in state.tail.range(from..) {
            if size >= RELOCATE_PART_BYTES {
                parts.push(Vec::new());
                size = 0;
            }
            size += size_of(&entry.entry);
            self.relocated_bytes += size_of(&entry.entry);
            if let Some(part) = parts.last_mut() {
                part.push(&entry.entry);
            }
        }
        let answers = parts.into_iter().map(|part| {
            let entries = part.into_iter();
            self.push(
                Record::entries(log.group, true, state.committed_next, entries),
                false,
            )
        });
        let answers = answers.collect();
        drop(state);
        relocated.push(Relocated { log, answers });
    }

    pub(super) fn push(&self, record: Record, in_new_file: bool) -> Answer {
        let (answer, receiver) = sync_channel(1);
        let done: Done = Box::new(move |written| {
            let _ = answer.send(written);
        });
        self.core.wal.push_unbounded(Item {
            record,
            done,
            in_new_file,
        });
        receiver
    }

    pub(super) fn wait_for(&self, answer: Answer) -> Result<Written, StorageError> {
        if let Some(wal) = &self.driven_wal {
            while lock(wal).step() {}
        }
        answer.recv().unwrap_or(Err(StorageError::Closed))
    }

    /// Makes all that is in segments now part of the checkpoint; the WAL stays as it is.
    pub(super) fn checkpoint_now(&self) -> Result<(), StorageError> {
        let live = self.wal_files.live();
        let first = *live.first().expect("the WAL always has a file in use");
        self.sync_all(false)?;
        self.write_checkpoint(first, false)
    }

    fn write_checkpoint(&self, first_kept: WalFile, is_close: bool) -> Result<(), StorageError> {
        let (confirmed_frame, next_record) = self.wal_files.confirmed();
        let mut groups = Vec::new();
        let mut recorded = Vec::new();
        for log in self.logs.all() {
            let mut state = log.lock();
            if !state.is_deleted {
                groups.push(GroupCheckpoint::capture(log.group, &mut state));
                recorded.push((state.flushed_next, log.clone()));
            }
        }
        let wal = WalStart {
            sequence: first_kept.sequence,
            frame: first_kept.first_frame,
            record: first_kept.first_record,
            confirmed_frame,
        };
        // The next start looks at the folders if it has to find unfinished copies there.
        let is_clean = is_close && !self.core.unfinished.has_any();
        let clean_at_record = is_clean.then_some(next_record);
        let checkpoint = Checkpoint {
            storage_id: self.storage_id,
            wal,
            clean_at_record,
            groups,
        };
        checkpoint.write(&*self.disk, &self.dir)?;
        for (next, log) in recorded {
            log.lock().recorded_next = next;
        }
        Ok(())
    }

    /// Deletes a log: durable in the WAL first, then its files go. What a process before has left of a
    /// copy goes at once, whether there is a log or not.
    pub fn delete(&mut self, group: RaftGroupId) -> Result<(), StorageError> {
        self.core.poison.check()?;
        forget_left(&self.core, group);
        let Some(log) = self.logs.get(group) else {
            return Ok(());
        };
        let answer = {
            let mut state = log.lock();
            state.is_deleted = true;
            let unused = state.next_generation;
            self.core
                .first_generation
                .fetch_max(unused, Ordering::AcqRel);
            self.release_memory(&mut state);
            self.push(Record::delete(group), false)
        };
        let written = self.wait_for(answer)?;
        self.core.files.forget(group);
        remove_files(&*self.disk, self.core.files.partitions(), group)
            .map_err(|e| StorageError::io("cannot delete", &self.dir, e))?;
        // Whoever was reading may have opened one again.
        self.core.files.forget(group);
        self.logs.remove(group, written.record_number);
        Ok(())
    }
}

/// Times that a folder is looked through for files that came meanwhile.
const REMOVE_ROUNDS: usize = 100;

/// Removes the folder of a log; durable when this returns. Whoever works beside the log, such as a
/// compaction or a copy, hears of the deletion with its next step, and may make and remove files until
/// then.
pub fn remove_files(
    disk: &dyn crate::disk::Disk,
    partitions: &std::path::Path,
    group: RaftGroupId,
) -> std::io::Result<()> {
    let dir = dir_of(partitions, group);
    let mut round = 1;
    loop {
        for name in disk.list(&dir)? {
            unless_gone(disk.remove_file(&dir.join(name)))?;
        }
        match unless_gone(disk.remove_dir(&dir)) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && round < REMOVE_ROUNDS => {
                round += 1;
            }
            removed => break removed?,
        }
    }
    disk.sync_dir(partitions)
}

fn unless_gone(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
