//! The one table from the broker's errors about partitions to the wire's `PartitionError`.
//!
//! Invariant: every match names every variant, so a new error cannot be forgotten here.

use chronik_proto::v1::{self, PartitionError};
use chronik_types::record_batch::InvalidBatch;

use crate::replica::{AppendError, LeaderHint, LogStartError, ReadError, is_corrupt};

/// What a partition's result says about its error.
#[derive(Debug, Clone, PartialEq)]
pub struct WireError {
    pub error: PartitionError,
    pub message: String,
    /// Who leads, where the error is that this broker does not.
    pub leader: Option<v1::Leader>,
}

impl WireError {
    /// This broker has no replica of the partition.
    pub fn unknown_partition() -> WireError {
        WireError {
            error: PartitionError::UnknownPartition,
            message: "this broker has no replica of the partition".to_owned(),
            leader: None,
        }
    }
}

pub fn leader(hint: &LeaderHint) -> v1::Leader {
    v1::Leader {
        broker_id: hint.broker_id.0,
        leader_epoch: hint.leader_epoch.0,
    }
}

fn invalid_batch(invalid: &InvalidBatch) -> PartitionError {
    match invalid {
        InvalidBatch::UnsupportedMagic(_) => PartitionError::UnsupportedMagic,
        corrupt if is_corrupt(corrupt) => PartitionError::CorruptBatch,
        _ => PartitionError::InvalidBatch,
    }
}

impl From<&AppendError> for WireError {
    fn from(append_error: &AppendError) -> WireError {
        let mut hint = None;
        let error = match append_error {
            AppendError::NotLeader { leader } => {
                hint = *leader;
                PartitionError::NotLeader
            }
            AppendError::TimedOut => PartitionError::TimedOut,
            AppendError::NotEnoughReplicas { .. } => PartitionError::NotEnoughReplicas,
            AppendError::NotEnoughReplicasAfterAppend { .. } => {
                PartitionError::NotEnoughReplicasAfterAppend
            }
            AppendError::InvalidBatch(invalid) => invalid_batch(invalid),
            AppendError::TooLarge { .. } => PartitionError::BatchTooLarge,
            AppendError::Empty
            | AppendError::ControlBatch
            | AppendError::SeveralIdempotentBatches
            | AppendError::MissingKey
            | AppendError::UnreadableRecords(_)
            | AppendError::InvalidProducerFields { .. } => PartitionError::InvalidBatch,
            AppendError::TransactionsUnsupported => PartitionError::TransactionsUnsupported,
            AppendError::OutOfOrderSequence { .. } => PartitionError::OutOfOrderSequence,
            AppendError::InvalidProducerEpoch { .. } => PartitionError::InvalidProducerEpoch,
            AppendError::Overloaded => PartitionError::Overloaded,
            AppendError::Storage => PartitionError::Storage,
        };
        WireError {
            error,
            message: append_error.to_string(),
            leader: hint.as_ref().map(leader),
        }
    }
}

impl From<&LogStartError> for WireError {
    fn from(error: &LogStartError) -> WireError {
        match error {
            LogStartError::NotProposed(error) => WireError::from(error),
            LogStartError::OutOfRange { .. } => WireError {
                error: PartitionError::OffsetOutOfRange,
                message: error.to_string(),
                leader: None,
            },
        }
    }
}

impl From<&ReadError> for WireError {
    fn from(read_error: &ReadError) -> WireError {
        let mut hint = None;
        let error = match read_error {
            ReadError::NotLeader { leader } => {
                hint = *leader;
                PartitionError::NotLeader
            }
            ReadError::OffsetOutOfRange { .. } => PartitionError::OffsetOutOfRange,
            ReadError::FencedLeaderEpoch { .. } => PartitionError::FencedLeaderEpoch,
            ReadError::UnknownLeaderEpoch { .. } => PartitionError::UnknownLeaderEpoch,
            ReadError::UnsupportedTimestamp(_) => PartitionError::InvalidTimestamp,
            ReadError::Corrupt(_) | ReadError::Storage(_) => PartitionError::Storage,
        };
        WireError {
            error,
            message: read_error.to_string(),
            leader: hint.as_ref().map(leader),
        }
    }
}

#[cfg(test)]
mod tests {
    use chronik_types::epoch::LeaderEpoch;
    use chronik_types::id::BrokerId;

    use super::*;

    #[test]
    fn not_leader_carries_the_hint() {
        let hint = LeaderHint {
            broker_id: BrokerId(2),
            leader_epoch: LeaderEpoch(9),
        };
        let wire = WireError::from(&AppendError::NotLeader { leader: Some(hint) });
        assert_eq!(wire.error, PartitionError::NotLeader);
        assert_eq!(
            wire.leader,
            Some(v1::Leader {
                broker_id: 2,
                leader_epoch: 9
            })
        );
    }

    #[test]
    fn damage_and_bad_content_are_told_apart() {
        let damaged = InvalidBatch::ChecksumMismatch {
            expected: 1,
            actual: 2,
        };
        assert_eq!(invalid_batch(&damaged), PartitionError::CorruptBatch);
        assert_eq!(
            invalid_batch(&InvalidBatch::UnsupportedMagic(1)),
            PartitionError::UnsupportedMagic
        );
        assert_eq!(
            invalid_batch(&InvalidBatch::UnknownCompression(7)),
            PartitionError::InvalidBatch
        );
    }
}
