//! Entries of a partition's Raft log, as the storage keeps them. A clone shares the bytes.

use bytes::Bytes;
use chronik_types::offset::Offset;

use crate::error::StorageError;

/// One entry of a partition's Raft log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub index: u64,
    pub term: u64,
    pub payload: Payload,
}

/// What an entry carries. Only batches take offsets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    Blank,
    /// Opaque here.
    Membership(Bytes),
    /// Opaque here: what the replicas of a partition agree on besides records and members.
    Control(Bytes),
    /// One or more Kafka record batches back to back, offsets stamped.
    Batches {
        bytes: Bytes,
        base_offset: Offset,
        /// Offset after the last record.
        next_offset: Offset,
    },
}

impl Payload {
    /// Bytes that the entry holds in memory beyond itself.
    pub fn size_bytes(&self) -> usize {
        match self {
            Payload::Blank => 0,
            Payload::Membership(bytes)
            | Payload::Control(bytes)
            | Payload::Batches { bytes, .. } => bytes.len(),
        }
    }
}

/// Where a term begins in the log: the leader-epoch history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TermStart {
    pub term: u64,
    pub first_index: u64,
    /// Log end offset when the term's first entry came.
    pub first_offset: Offset,
}

/// Entries up to this one are hidden from Raft; their records stay readable by offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Purged {
    pub index: u64,
    pub term: u64,
    /// Log end offset after entry `index`.
    pub next_offset: Offset,
}

/// Called once from the WAL thread, after the fsync that covers the operation. Must not block.
pub type OnDurable = Box<dyn FnOnce(Result<(), StorageError>) + Send>;
