//! Does the work of a storage's two threads one step at a time, on the thread that calls it, so that
//! a simulation decides when a write is durable and when segments are written.
//!
//! Invariant: a step is one round of the thread it stands for, by the same code.

use std::sync::{Arc, Mutex};

use chronik_types::id::RaftGroupId;

use crate::error::StorageError;
use crate::flusher::{Clear, Flusher};
use crate::sync::lock;
use crate::wal::writer::{Abandon, WalWriter};

/// What makes a storage move that was opened with `Storage::open_driven`. Dropped, it leaves the
/// storage as a crash would.
pub struct Driver {
    wal: Arc<Mutex<WalWriter>>,
    flusher: Flusher,
    _abandon: Abandon,
    _clear: Clear,
}

impl Driver {
    pub(crate) fn new(writer: WalWriter, mut flusher: Flusher) -> Driver {
        let abandon = Abandon(flusher.core.wal.clone());
        let clear = Clear(flusher.core.clone());
        let wal = Arc::new(Mutex::new(writer));
        flusher.driven_wal = Some(wal.clone());
        Driver {
            wal,
            flusher,
            _abandon: abandon,
            _clear: clear,
        }
    }

    /// Something waits to be written to the WAL.
    pub fn has_wal_work(&self) -> bool {
        !self.flusher.core.wal.is_empty()
    }

    /// One group commit, callbacks included. False: there was nothing to write.
    pub fn step_wal(&mut self) -> bool {
        lock(&self.wal).step()
    }

    /// One piece of the flusher's work; it may write to the WAL too. False: there was none.
    pub fn step_flusher(&mut self) -> bool {
        self.flusher.step()
    }

    /// As `Storage::delete_log`.
    pub fn delete_log(&mut self, group: RaftGroupId) -> Result<(), StorageError> {
        self.flusher.delete(group)
    }

    /// As `Storage::close`: flushes everything; later calls fail with `Closed`.
    pub fn close(mut self) -> Result<(), StorageError> {
        self.flusher.core.wal.close();
        self.flusher.close()
    }
}
