//! What can go wrong, as facts a caller branches on. Errors are cheap to clone, because one failed
//! write is told to everybody who waits.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

/// What an error of an fsync says it is about.
pub const CANNOT_SYNC: &str = "cannot sync";

/// What is wrong with a log on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    pub group: RaftGroupId,
    pub file: PathBuf,
    /// In the file.
    pub position: u64,
    pub why: Arc<str>,
}

/// Why an operation on a partition's log failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageError {
    #[error(
        "offset {offset} is outside the log, which runs from {log_start_offset} to {log_end_offset}"
    )]
    OffsetOutOfRange {
        offset: Offset,
        log_start_offset: Offset,
        log_end_offset: Offset,
    },
    #[error(
        "log index {index} is outside the log, which runs from {first_index} to {next_index} (exclusive)"
    )]
    IndexOutOfRange {
        index: u64,
        first_index: u64,
        next_index: u64,
    },
    /// Never served; the replica is to be rebuilt from its peers.
    #[error("{} is corrupt at byte {position}: {why}", file.display())]
    Corrupt {
        file: PathBuf,
        position: u64,
        why: Arc<str>,
    },
    /// An earlier write or fsync failed. Nothing can be promised any more: the process must stop.
    #[error("storage stopped after a failed write: {why}")]
    Poisoned { why: Arc<str> },
    /// A read failed, or a write that promised nothing yet.
    #[error("{operation} {}: {source}", file.display())]
    Io {
        operation: &'static str,
        file: PathBuf,
        source: Arc<io::Error>,
    },
    /// Entries that do not continue the log.
    #[error("group {group}: {what} {actual} does not continue the log, which expects {expected}")]
    OutOfOrder {
        group: RaftGroupId,
        what: &'static str,
        expected: i128,
        actual: i128,
    },
    #[error(
        "group {group}: entries up to {committed} are committed and cannot be cut back to {index:?}"
    )]
    TruncatesCommitted {
        group: RaftGroupId,
        index: Option<u64>,
        committed: u64,
    },
    /// More data on its way to the disk, or to its commit, than the budget; the caller may try again
    /// later.
    #[error(
        "storage holds {pinned_bytes} bytes that are not written or committed yet, its budget is {max_bytes}"
    )]
    Overloaded {
        pinned_bytes: usize,
        max_bytes: usize,
    },
    /// Nothing was written; passes when there is room again.
    #[error("the disk has {available_bytes} bytes left, {reserve_bytes} are kept free")]
    Full {
        available_bytes: u64,
        reserve_bytes: u64,
    },
    #[error("{what} has {size_bytes} bytes, at most {max_bytes} are allowed")]
    TooLarge {
        what: &'static str,
        size_bytes: usize,
        max_bytes: usize,
    },
    #[error("group {group}: entry {index} is no valid sequence of record batches: {why}")]
    InvalidEntry {
        group: RaftGroupId,
        index: u64,
        why: Arc<str>,
    },
    /// The entries could not be replayed on the state that a restart would find.
    #[error(
        "group {group}: entries up to {index} cannot be purged before a state as of them is saved"
    )]
    PurgeAheadOfState { group: RaftGroupId, index: u64 },
    #[error("segments from another broker cannot be taken: {why}")]
    InvalidManifest { why: Arc<str> },
    /// The copy does not reach far enough, or cannot be brought together with the log; a later one may.
    #[error("group {group}: damaged segments cannot be rebuilt from this copy: {why}")]
    NotRebuilt {
        group: RaftGroupId,
        why: &'static str,
    },
    /// A batch holds bytes that are no records, so nobody knows their keys.
    #[error("group {group}: the batch at offset {offset} cannot be compacted: {why}")]
    Uncleanable {
        group: RaftGroupId,
        offset: Offset,
        why: Arc<str>,
    },
    /// What was prepared no longer fits the log, which has changed meanwhile.
    #[error("the log has changed meanwhile")]
    Superseded,
    #[error("the log of group {0} was deleted")]
    Deleted(RaftGroupId),
    #[error("storage is closed")]
    Closed,
}

impl StorageError {
    /// Bytes that were stored are not there as they were: the replica is to be rebuilt.
    pub fn is_damage(&self) -> bool {
        matches!(self, StorageError::Corrupt { .. })
    }

    /// A write found no room and changed nothing that anybody relies on; it may be tried again. Not a
    /// failed fsync, after which nobody knows what is on the disk.
    pub fn is_out_of_room(&self) -> bool {
        let no_room = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        match self {
            StorageError::Full { .. } => true,
            StorageError::Io {
                operation, source, ..
            } => *operation != CANNOT_SYNC && no_room.contains(&source.kind()),
            _ => false,
        }
    }

    /// A change of a log's segments was refused before the WAL said anything of it.
    pub(crate) fn is_refused_change(&self) -> bool {
        matches!(self, StorageError::Superseded | StorageError::Deleted(_)) || self.is_out_of_room()
    }

    pub fn io(operation: &'static str, file: &Path, source: io::Error) -> Self {
        StorageError::Io {
            operation,
            file: file.to_owned(),
            source: Arc::new(source),
        }
    }

    pub fn corrupt(file: &Path, position: u64, why: impl Into<Arc<str>>) -> Self {
        StorageError::Corrupt {
            file: file.to_owned(),
            position,
            why: why.into(),
        }
    }
}

/// Why the storage could not be opened. Nothing was changed that a later try would miss.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{} is in use by another process", dir.display())]
    Locked { dir: PathBuf },
    #[error("{} is corrupt at byte {position}: {why}", file.display())]
    Corrupt {
        file: PathBuf,
        position: u64,
        why: String,
    },
    #[error("{operation} {}: {source}", file.display())]
    Io {
        operation: &'static str,
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("storage setting {name} is {value}, {why}")]
    InvalidConfig {
        name: &'static str,
        value: u64,
        why: &'static str,
    },
    #[error("recovered logs cannot be written: {0}")]
    Storage(#[from] StorageError),
}
