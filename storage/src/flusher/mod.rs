//! The flusher thread: moves committed entries from memory to segments, keeps memory within its
//! budget, empties old WAL files, and deletes logs and segments. It alone changes which segments a
//! log has, and writes checkpoints.
//!
//! Invariant: it works only when told to; an idle storage has no timer and no polling.

mod flush;
mod install;
mod recycle;
mod replace;
mod trim;

pub use recycle::remove_files;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use chronik_types::id::RaftGroupId;
use uuid::Uuid;

use crate::core::{Core, Logs};
use crate::counters::Counters;
use crate::disk::Disk;
use crate::error::StorageError;
use crate::partition_log::{Log, Replacement};
use crate::sync::{lock, wait, wait_at_most};
use crate::transfer::InstallRequest;
use crate::wal::WalFiles;
use crate::wal::writer::WalWriter;

/// How often a write that found no room is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

type Reply = SyncSender<Result<(), StorageError>>;

/// What the flusher is asked to do.
#[derive(Default)]
pub struct Signals {
    inner: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Default)]
struct Pending {
    to_flush: VecDeque<Arc<Log>>,
    to_delete: VecDeque<(RaftGroupId, Reply)>,
    to_trim: VecDeque<Arc<Log>>,
    to_roll: VecDeque<(Arc<Log>, Reply)>,
    to_flush_now: VecDeque<(Arc<Log>, Reply)>,
    to_install: VecDeque<(InstallRequest, Reply)>,
    to_replace: VecDeque<(Arc<Log>, Replacement, Reply)>,
    recycle_wal: bool,
    free_memory: bool,
    prepare_spare: bool,
    close: Option<Reply>,
    /// Something found no room on the disk and is to be tried again.
    retry: bool,
    stop: bool,
}

enum Work {
    Delete(RaftGroupId, Reply),
    Trim(Arc<Log>),
    Roll(Arc<Log>, Reply),
    FlushNow(Arc<Log>, Reply),
    Install(Box<InstallRequest>, Reply),
    Replace(Arc<Log>, Box<Replacement>, Reply),
    RecycleWal,
    FreeMemory,
    Flush(Arc<Log>),
    PrepareSpare,
    Retry,
    Close(Reply),
    Stop,
}

impl Pending {
    /// What is to be done first.
    fn take(&mut self) -> Option<Work> {
        if self.stop {
            return Some(Work::Stop);
        }
        if let Some((group, reply)) = self.to_delete.pop_front() {
            return Some(Work::Delete(group, reply));
        }
        if let Some(log) = self.to_trim.pop_front() {
            return Some(Work::Trim(log));
        }
        if std::mem::take(&mut self.recycle_wal) {
            return Some(Work::RecycleWal);
        }
        if std::mem::take(&mut self.free_memory) {
            return Some(Work::FreeMemory);
        }
        if let Some((request, reply)) = self.to_install.pop_front() {
            return Some(Work::Install(Box::new(request), reply));
        }
        if let Some((log, replacement, reply)) = self.to_replace.pop_front() {
            return Some(Work::Replace(log, Box::new(replacement), reply));
        }
        if let Some((log, reply)) = self.to_flush_now.pop_front() {
            return Some(Work::FlushNow(log, reply));
        }
        if let Some((log, reply)) = self.to_roll.pop_front() {
            return Some(Work::Roll(log, reply));
        }
        if let Some(log) = self.to_flush.pop_front() {
            return Some(Work::Flush(log));
        }
        if std::mem::take(&mut self.prepare_spare) {
            return Some(Work::PrepareSpare);
        }
        self.close.take().map(Work::Close)
    }
}

impl Signals {
    fn tell(&self, change: impl FnOnce(&mut Pending)) {
        let mut pending = lock(&self.inner);
        change(&mut pending);
        drop(pending);
        self.changed.notify_one();
    }

    pub fn flush(&self, log: Arc<Log>) {
        self.tell(|pending| {
            if !pending.stop {
                pending.to_flush.push_back(log);
            }
        });
    }

    /// Called for every append while memory is tight.
    pub fn free_memory(&self) {
        let mut pending = lock(&self.inner);
        if !std::mem::replace(&mut pending.free_memory, true) {
            drop(pending);
            self.changed.notify_one();
        }
    }

    pub fn recycle_wal(&self) {
        self.tell(|pending| pending.recycle_wal = true);
    }

    pub fn prepare_spare(&self) {
        self.tell(|pending| pending.prepare_spare = true);
    }

    pub fn trim(&self, log: Arc<Log>) {
        self.tell(|pending| {
            if !pending.stop {
                pending.to_trim.push_back(log);
            }
        });
    }

    /// Waits until all that is committed is in segments, and the last one is sealed.
    pub fn roll(&self, log: Arc<Log>) -> Result<(), StorageError> {
        self.ask(|pending, reply| pending.to_roll.push_back((log, reply)))
    }

    /// Waits until all that is committed is in segments, though not fsynced.
    pub fn flush_now(&self, log: Arc<Log>) -> Result<(), StorageError> {
        self.ask(|pending, reply| pending.to_flush_now.push_back((log, reply)))
    }

    /// Waits until the log's content is replaced.
    pub fn install(&self, request: InstallRequest) -> Result<(), StorageError> {
        self.ask(|pending, reply| pending.to_install.push_back((request, reply)))
    }

    /// Waits until segments have taken the place of others.
    pub fn replace(&self, log: Arc<Log>, replacement: Replacement) -> Result<(), StorageError> {
        self.ask(|pending, reply| pending.to_replace.push_back((log, replacement, reply)))
    }

    /// Waits until the log is deleted.
    pub fn delete(&self, group: RaftGroupId) -> Result<(), StorageError> {
        self.ask(|pending, reply| pending.to_delete.push_back((group, reply)))
    }

    /// Waits until all is flushed and checkpointed.
    pub fn close(&self) -> Result<(), StorageError> {
        self.ask(|pending, reply| pending.close = Some(reply))
    }

    pub fn stop(&self) {
        self.tell(|pending| pending.stop = true);
    }

    fn ask(&self, request: impl FnOnce(&mut Pending, Reply)) -> Result<(), StorageError> {
        let (reply, answer) = sync_channel(1);
        self.tell(|pending| {
            // A flusher that has stopped would never answer; the dropped reply says so.
            if !pending.stop {
                request(pending, reply);
            }
        });
        answer.recv().unwrap_or(Err(StorageError::Closed))
    }

    fn next(&self) -> Work {
        let mut pending = lock(&self.inner);
        loop {
            if let Some(work) = pending.take() {
                return work;
            }
            if !pending.retry {
                pending = wait(&self.changed, pending);
                continue;
            }
            let (guard, is_over) = wait_at_most(&self.changed, pending, RETRY_INTERVAL);
            pending = guard;
            if is_over {
                pending.retry = false;
                return Work::Retry;
            }
        }
    }

    /// Breaks the circle of logs that wait here and hold what holds this.
    fn clear(&self) {
        let stopped = Pending {
            stop: true,
            ..Pending::default()
        };
        let pending = std::mem::replace(&mut *lock(&self.inner), stopped);
        drop(pending);
    }
}

/// Lets go of all that waits when the flusher ends, also by a panic, so that nobody waits for it.
pub struct Clear(pub Arc<Core>);

impl Drop for Clear {
    fn drop(&mut self) {
        self.0.signals.clear();
        self.0.evictable.clear();
    }
}

/// State of the flusher thread.
pub struct Flusher {
    pub core: Arc<Core>,
    pub logs: Arc<Logs>,
    pub wal_files: Arc<WalFiles>,
    pub disk: Arc<dyn Disk>,
    pub dir: PathBuf,
    pub storage_id: Uuid,
    pub wal_files_max: usize,
    /// The WAL's writer, if it has no thread of its own: the flusher then runs it itself whenever it
    /// waits for the WAL, and does all its work alone.
    pub driven_wal: Option<Arc<Mutex<WalWriter>>>,
    /// Bytes that the last recycling had to write again; with many of them it pays less often.
    pub relocated_bytes: usize,
}

impl Flusher {
    /// Runs until told to stop. After a failure nothing more is written.
    pub fn run(mut self) {
        let _clear = Clear(self.core.clone());
        loop {
            let work = self.core.signals.next();
            if let Work::Stop = work {
                return;
            }
            self.work(work);
        }
    }

    /// One round of `run` without waiting. False: there was nothing to do.
    pub fn step(&mut self) -> bool {
        let work = lock(&self.core.signals.inner).take();
        match work {
            None | Some(Work::Stop) => false,
            Some(work) => {
                self.work(work);
                true
            }
        }
    }

    fn work(&mut self, work: Work) {
        let (result, reply) = match work {
            Work::Delete(group, reply) => (self.delete(group), Some(reply)),
            Work::Close(reply) => (self.close(), Some(reply)),
            Work::Trim(log) => (self.trim(&log), None),
            Work::Roll(log, reply) => (self.roll(&log), Some(reply)),
            Work::FlushNow(log, reply) => (self.flush(&log), Some(reply)),
            Work::Install(request, reply) => (self.install(*request), Some(reply)),
            Work::Replace(log, replacement, reply) => {
                (self.replace(&log, *replacement), Some(reply))
            }
            Work::RecycleWal => (self.recycle_if_due(), None),
            Work::FreeMemory => (self.free_memory(), None),
            Work::Flush(log) => (self.flush_due(&log), None),
            Work::PrepareSpare => (self.prepare_spare(), None),
            Work::Retry => (self.retry(), None),
            Work::Stop => (Ok(()), None),
        };
        let result = result.map_err(|error| match error {
            StorageError::Poisoned { .. } | StorageError::Closed => error,
            // Only who asked for it has to know, and what was given up can be done again.
            StorageError::Deleted(_) | StorageError::Superseded => error,
            error if error.is_out_of_room() => {
                self.core.space.found_no_room();
                lock(&self.core.signals.inner).retry = true;
                error
            }
            other => self.core.poison.set(&other.to_string()),
        });
        if let Some(reply) = reply {
            // The asker waits; if it is gone nobody wants the answer.
            let _ = reply.send(result);
        }
    }

    /// Does again what found no room on the disk: all that is due.
    fn retry(&mut self) -> Result<(), StorageError> {
        self.core.poison.check()?;
        Counters::add(&self.core.counters.flush_retries, 1);
        for log in self.logs.all() {
            self.flush_due(&log)?;
        }
        self.free_memory()?;
        self.recycle_if_due()
    }

    fn prepare_spare(&self) -> Result<(), StorageError> {
        if self.wal_files.wants_spare()
            && let Err(error) = self.wal_files.prepare_spare()
        {
            tracing::warn!(%error, "cannot prepare a WAL file ahead; writes will be slower");
        }
        Ok(())
    }
}
