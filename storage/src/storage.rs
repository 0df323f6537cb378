//! The storage of one broker. Skeleton: in memory only.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use chronik_types::id::RaftGroupId;
use uuid::Uuid;

use crate::disk::Disk;
use crate::error::{OpenError, StorageError};
use crate::partition_log::PartitionLog;

/// Settings of the storage.
#[derive(Debug, Clone)]
pub struct StorageConfig {
    /// Folder that belongs to this storage alone.
    pub dir: PathBuf,
    /// Size of one WAL file.
    pub wal_file_size_bytes: u64,
    /// How many WAL files may be in use before the oldest are emptied.
    pub wal_files_max: usize,
    /// Budget for entries in memory, over all partitions.
    pub memory_max_bytes: usize,
    /// A segment is sealed when it has grown to this size.
    pub segment_bytes: u64,
    /// How many segment files may be open at a time.
    pub open_files_max: usize,
}

impl Default for StorageConfig {
    fn default() -> Self {
        StorageConfig {
            dir: PathBuf::from("data"),
            wal_file_size_bytes: 64 << 20,
            wal_files_max: 4,
            memory_max_bytes: 256 << 20,
            segment_bytes: 1 << 30,
            open_files_max: 1024,
        }
    }
}

/// All logs of one broker. Cheap to clone.
#[derive(Clone)]
pub struct Storage {
    shared: Arc<Shared>,
}

struct Shared {
    storage_id: Uuid,
    logs: Mutex<BTreeMap<RaftGroupId, PartitionLog>>,
}

/// Resolves with the reason when the storage is poisoned; the process must then stop.
pub struct Failed {
    _shared: Arc<Shared>,
}

impl Future for Failed {
    type Output = StorageError;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<StorageError> {
        Poll::Pending
    }
}

impl Storage {
    /// Opens or creates the storage in `config.dir`, and recovers all logs.
    pub fn open(_config: StorageConfig, _disk: Arc<dyn Disk>) -> Result<Storage, OpenError> {
        let shared = Shared {
            storage_id: Uuid::new_v4(),
            logs: Mutex::new(BTreeMap::new()),
        };
        Ok(Storage {
            shared: Arc::new(shared),
        })
    }

    /// Made when the folder was first used.
    pub fn storage_id(&self) -> Uuid {
        self.shared.storage_id
    }

    /// The logs that exist.
    pub fn group_ids(&self) -> Vec<RaftGroupId> {
        self.shared
            .logs
            .lock()
            .expect("no panic under lock")
            .keys()
            .copied()
            .collect()
    }

    /// The group's log, made if new; the same one for every caller.
    pub fn open_log(&self, group: RaftGroupId) -> Result<PartitionLog, StorageError> {
        let mut logs = self.shared.logs.lock().expect("no panic under lock");
        Ok(logs
            .entry(group)
            .or_insert_with(|| PartitionLog::new(group))
            .clone())
    }

    /// Deletes the log; it stays deleted after a restart. Blocks on the disk.
    pub fn delete_log(&self, group: RaftGroupId) -> Result<(), StorageError> {
        self.shared
            .logs
            .lock()
            .expect("no panic under lock")
            .remove(&group);
        Ok(())
    }

    /// Resolves when a write or fsync has failed.
    pub fn failed(&self) -> Failed {
        Failed {
            _shared: self.shared.clone(),
        }
    }

    /// Flushes everything and ends the threads. Blocks on the disk.
    pub fn close(&self) -> Result<(), StorageError> {
        Ok(())
    }
}
