//! Why a replica refused or could not finish a request: facts that the RPC layer turns into the
//! wire's error codes.
//!
//! Invariant: `AppendError::TimedOut` is the only "may or may not be in the log"; every other
//! variant except `NotEnoughReplicasAfterAppend` means that nothing was appended.

use chronik_storage::StorageError;
use chronik_types::epoch::{LeaderEpoch, ProducerEpoch};
use chronik_types::id::{BrokerId, ProducerId};
use chronik_types::offset::Offset;
use chronik_types::record_batch::InvalidBatch;

/// Who leads, for a client that asked the wrong replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderHint {
    pub broker_id: BrokerId,
    pub leader_epoch: LeaderEpoch,
}

/// Why a replica could not be opened or set up.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("raft does not start: {0}")]
    Raft(String),
    #[error("the group cannot be initialized: {0}")]
    Initialize(String),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("saved state of the replica is unreadable: {0}")]
    State(#[from] super::codec::DecodeError),
}

/// Why records were not appended, or not known to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    #[error("this replica does not lead the partition")]
    NotLeader { leader: Option<LeaderHint> },
    #[error("the outcome is unknown")]
    TimedOut,
    #[error("{in_sync} replicas are in sync, {required} are required")]
    NotEnoughReplicas { in_sync: usize, required: usize },
    #[error("appended, but only {in_sync} replicas are in sync, {required} are required")]
    NotEnoughReplicasAfterAppend { in_sync: usize, required: usize },
    #[error(transparent)]
    InvalidBatch(#[from] InvalidBatch),
    #[error("record batch has {size_bytes} bytes, {max_bytes} are allowed")]
    TooLarge { size_bytes: usize, max_bytes: usize },
    #[error("there is no record batch")]
    Empty,
    #[error("control batches are not accepted from producers")]
    ControlBatch,
    #[error("an idempotent producer sends one batch per partition and request")]
    SeveralIdempotentBatches,
    #[error("an idempotent batch has producer epoch {epoch} and base sequence {base_sequence}")]
    InvalidProducerFields {
        epoch: ProducerEpoch,
        base_sequence: i32,
    },
    /// Of a compacted topic, whose records live as long as their key.
    #[error("a compacted topic takes records with a key only")]
    MissingKey,
    #[error("the batch's records cannot be read: {0}")]
    UnreadableRecords(String),
    #[error("transactional batches are not supported yet")]
    TransactionsUnsupported,
    #[error("producer {producer_id} sent sequence {sequence}, expected {expected}")]
    OutOfOrderSequence {
        producer_id: ProducerId,
        sequence: i32,
        expected: i32,
    },
    #[error("producer {producer_id} has epoch {current}, the batch has {epoch}")]
    InvalidProducerEpoch {
        producer_id: ProducerId,
        epoch: ProducerEpoch,
        current: ProducerEpoch,
    },
    #[error("the partition's queue is full")]
    Overloaded,
    #[error("the partition's storage failed")]
    Storage,
}

/// Why the log start offset was not raised, or is not known to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogStartError {
    #[error("offset {offset} is above the high watermark {high_watermark}, or negative")]
    OutOfRange {
        offset: Offset,
        high_watermark: Offset,
    },
    #[error(transparent)]
    NotProposed(#[from] AppendError),
}

/// Why a read was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("this replica does not lead the partition")]
    NotLeader { leader: Option<LeaderHint> },
    #[error("offset {offset} is not in {log_start_offset}..={log_end_offset}")]
    OffsetOutOfRange {
        offset: Offset,
        log_start_offset: Offset,
        log_end_offset: Offset,
    },
    #[error("leader epoch {requested} is older than {current}")]
    FencedLeaderEpoch {
        requested: LeaderEpoch,
        current: LeaderEpoch,
    },
    #[error("leader epoch {requested} is newer than {current}")]
    UnknownLeaderEpoch {
        requested: LeaderEpoch,
        current: LeaderEpoch,
    },
    #[error("timestamp {0} is not supported")]
    UnsupportedTimestamp(i64),
    #[error("a stored record batch cannot be read: {0}")]
    Corrupt(String),
    #[error("the partition's storage failed: {0}")]
    Storage(String),
}

impl ReadError {
    /// The client has read more than there is here.
    pub fn is_beyond_end(&self) -> bool {
        match self {
            ReadError::OffsetOutOfRange {
                offset,
                log_end_offset,
                ..
            } => offset > log_end_offset,
            _ => false,
        }
    }
}
