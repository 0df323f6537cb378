//! The one table from what went wrong inside to Kafka's error codes.
//!
//! Invariant: an unknown outcome is never told as a failure that certainly did not happen, nor as
//! success. Codes are chosen for how clients react: Java's consumer, for one, gives up on a fetch
//! error that it does not expect.

use chronik_proto::v1::{AdminError, GroupError, PartitionError};

/// Kafka's error codes, as far as the gateway uses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i16)]
pub enum ErrorCode {
    UnknownServerError = -1,
    None = 0,
    OffsetOutOfRange = 1,
    CorruptMessage = 2,
    UnknownTopicOrPartition = 3,
    LeaderNotAvailable = 5,
    NotLeaderOrFollower = 6,
    RequestTimedOut = 7,
    MessageTooLarge = 10,
    OffsetMetadataTooLarge = 12,
    CoordinatorLoadInProgress = 14,
    CoordinatorNotAvailable = 15,
    NotCoordinator = 16,
    InvalidTopic = 17,
    NotEnoughReplicas = 19,
    NotEnoughReplicasAfterAppend = 20,
    InvalidRequiredAcks = 21,
    IllegalGeneration = 22,
    InconsistentGroupProtocol = 23,
    InvalidGroupId = 24,
    UnknownMemberId = 25,
    InvalidSessionTimeout = 26,
    RebalanceInProgress = 27,
    InvalidTimestamp = 32,
    UnsupportedVersion = 35,
    TopicAlreadyExists = 36,
    InvalidPartitions = 37,
    InvalidReplicationFactor = 38,
    InvalidReplicaAssignment = 39,
    InvalidConfig = 40,
    InvalidRequest = 42,
    UnsupportedForMessageFormat = 43,
    PolicyViolation = 44,
    OutOfOrderSequenceNumber = 45,
    DuplicateSequenceNumber = 46,
    InvalidProducerEpoch = 47,
    KafkaStorageError = 56,
    NonEmptyGroup = 68,
    GroupIdNotFound = 69,
    FetchSessionIdNotFound = 70,
    InvalidFetchSessionEpoch = 71,
    FencedLeaderEpoch = 74,
    UnknownLeaderEpoch = 75,
    MemberIdRequired = 79,
    PreferredLeaderNotAvailable = 80,
    GroupMaxSizeReached = 81,
    FencedInstanceId = 82,
    ElectionNotNeeded = 84,
    NoReassignmentInProgress = 85,
    InvalidRecord = 87,
    UnknownTopicId = 100,
    BrokerIdNotRegistered = 102,
    StaleMemberEpoch = 113,
    UnsupportedEndpointType = 115,
    RebootstrapRequired = 129,
}

impl ErrorCode {
    pub const fn code(self) -> i16 {
        self as i16
    }

    pub fn is_error(self) -> bool {
        self != ErrorCode::None
    }
}

/// Why a request to a broker or a controller has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Certainly not done.
    #[error("{0} cannot be reached")]
    Unreachable(&'static str),
    /// May or may not have been done.
    #[error("the outcome of the request is unknown: {0}")]
    UnknownOutcome(String),
    /// Refused; certainly not done.
    #[error("refused: {0}")]
    Refused(String),
}

/// What to tell a producer about one partition.
pub fn produce_error(error: PartitionError) -> ErrorCode {
    match error {
        PartitionError::None => ErrorCode::None,
        PartitionError::UnknownPartition | PartitionError::NotLeader => {
            ErrorCode::NotLeaderOrFollower
        }
        // Overloaded is certain (not appended), but of the retriable codes only this one makes
        // every client back off and send again to the same leader.
        PartitionError::TimedOut | PartitionError::Overloaded => ErrorCode::RequestTimedOut,
        PartitionError::NotEnoughReplicas => ErrorCode::NotEnoughReplicas,
        PartitionError::NotEnoughReplicasAfterAppend => ErrorCode::NotEnoughReplicasAfterAppend,
        PartitionError::CorruptBatch => ErrorCode::CorruptMessage,
        PartitionError::BatchTooLarge => ErrorCode::MessageTooLarge,
        PartitionError::InvalidBatch => ErrorCode::InvalidRecord,
        PartitionError::UnsupportedMagic => ErrorCode::UnsupportedForMessageFormat,
        PartitionError::OutOfOrderSequence => ErrorCode::OutOfOrderSequenceNumber,
        PartitionError::DuplicateSequence => ErrorCode::DuplicateSequenceNumber,
        PartitionError::InvalidProducerEpoch => ErrorCode::InvalidProducerEpoch,
        PartitionError::OffsetOutOfRange => ErrorCode::OffsetOutOfRange,
        PartitionError::FencedLeaderEpoch => ErrorCode::FencedLeaderEpoch,
        PartitionError::UnknownLeaderEpoch => ErrorCode::UnknownLeaderEpoch,
        PartitionError::Storage => ErrorCode::KafkaStorageError,
        PartitionError::InvalidTimestamp => ErrorCode::InvalidTimestamp,
        PartitionError::TransactionsUnsupported => ErrorCode::UnsupportedVersion,
    }
}

/// What to tell a reader (fetch, offsets, epochs) about one partition. A read that did not happen
/// has no outcome to be unsure of: it is sent again after a look at the metadata.
pub fn read_error(error: PartitionError) -> ErrorCode {
    match error {
        PartitionError::UnknownPartition
        | PartitionError::NotLeader
        | PartitionError::TimedOut
        | PartitionError::Overloaded => ErrorCode::NotLeaderOrFollower,
        PartitionError::None
        | PartitionError::NotEnoughReplicas
        | PartitionError::NotEnoughReplicasAfterAppend
        | PartitionError::CorruptBatch
        | PartitionError::BatchTooLarge
        | PartitionError::InvalidBatch
        | PartitionError::UnsupportedMagic
        | PartitionError::OutOfOrderSequence
        | PartitionError::DuplicateSequence
        | PartitionError::InvalidProducerEpoch
        | PartitionError::OffsetOutOfRange
        | PartitionError::FencedLeaderEpoch
        | PartitionError::UnknownLeaderEpoch
        | PartitionError::Storage
        | PartitionError::InvalidTimestamp
        | PartitionError::TransactionsUnsupported => produce_error(error),
    }
}

/// What to tell a producer whose request got no answer.
pub fn produce_call_error(error: &CallError) -> ErrorCode {
    match error {
        CallError::Unreachable(_) | CallError::Refused(_) => ErrorCode::NotLeaderOrFollower,
        CallError::UnknownOutcome(_) => ErrorCode::RequestTimedOut,
    }
}

pub fn group_error(error: GroupError) -> ErrorCode {
    match error {
        GroupError::None => ErrorCode::None,
        GroupError::NotCoordinator => ErrorCode::NotCoordinator,
        GroupError::Loading => ErrorCode::CoordinatorLoadInProgress,
        GroupError::UnknownMember => ErrorCode::UnknownMemberId,
        GroupError::IllegalGeneration => ErrorCode::IllegalGeneration,
        GroupError::InconsistentProtocol => ErrorCode::InconsistentGroupProtocol,
        GroupError::InvalidSessionTimeout => ErrorCode::InvalidSessionTimeout,
        GroupError::RebalanceInProgress => ErrorCode::RebalanceInProgress,
        GroupError::MemberIdRequired => ErrorCode::MemberIdRequired,
        GroupError::FencedInstance => ErrorCode::FencedInstanceId,
        GroupError::GroupFull => ErrorCode::GroupMaxSizeReached,
        GroupError::InvalidGroup => ErrorCode::InvalidGroupId,
        GroupError::UnknownGroup => ErrorCode::GroupIdNotFound,
        GroupError::MetadataTooLarge => ErrorCode::OffsetMetadataTooLarge,
        // As Kafka's coordinators: of the retriable codes the one that every client expects in every
        // answer of a group. A member that joins gives up at REQUEST_TIMED_OUT.
        GroupError::TimedOut => ErrorCode::CoordinatorNotAvailable,
        GroupError::NonEmptyGroup => ErrorCode::NonEmptyGroup,
        GroupError::StaleMemberEpoch => ErrorCode::StaleMemberEpoch,
    }
}

/// What to tell a group member whose request got no answer from the coordinator.
pub fn group_call_error(error: &CallError) -> ErrorCode {
    match error {
        CallError::Unreachable(_) | CallError::Refused(_) | CallError::UnknownOutcome(_) => {
            ErrorCode::CoordinatorNotAvailable
        }
    }
}

pub fn admin_error(error: AdminError) -> ErrorCode {
    match error {
        AdminError::None => ErrorCode::None,
        AdminError::TopicAlreadyExists => ErrorCode::TopicAlreadyExists,
        AdminError::UnknownTopic => ErrorCode::UnknownTopicOrPartition,
        AdminError::InvalidTopicName => ErrorCode::InvalidTopic,
        AdminError::InvalidPartitions => ErrorCode::InvalidPartitions,
        AdminError::InvalidReplicationFactor => ErrorCode::InvalidReplicationFactor,
        AdminError::InvalidReplicaAssignment => ErrorCode::InvalidReplicaAssignment,
        AdminError::InvalidConfig => ErrorCode::InvalidConfig,
        AdminError::TimedOut => ErrorCode::RequestTimedOut,
        AdminError::UnknownPartition => ErrorCode::UnknownTopicOrPartition,
        AdminError::NoReassignmentInProgress => ErrorCode::NoReassignmentInProgress,
        AdminError::LeaderNotAvailable => ErrorCode::LeaderNotAvailable,
        AdminError::PreferredLeaderNotAvailable => ErrorCode::PreferredLeaderNotAvailable,
        AdminError::ElectionNotNeeded => ErrorCode::ElectionNotNeeded,
        AdminError::UnknownBroker => ErrorCode::BrokerIdNotRegistered,
        AdminError::DuplicateInRequest
        | AdminError::UncleanElectionUnsupported
        | AdminError::BrokerNeeded
        | AdminError::Changed => ErrorCode::InvalidRequest,
    }
}

/// What to tell an administrator whose request got no answer from any controller. All three are
/// retriable in Kafka's admin clients.
pub fn admin_call_error(error: &CallError) -> ErrorCode {
    match error {
        CallError::Unreachable(_) | CallError::UnknownOutcome(_) => ErrorCode::RequestTimedOut,
        CallError::Refused(_) => ErrorCode::UnknownServerError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_outcome_is_a_time_out_and_an_unsent_request_is_not() {
        let unknown = CallError::UnknownOutcome(String::new());
        assert_eq!(produce_call_error(&unknown), ErrorCode::RequestTimedOut);
        let unsent = CallError::Unreachable("leader");
        assert_eq!(produce_call_error(&unsent), ErrorCode::NotLeaderOrFollower);
    }

    #[test]
    fn reads_only_use_codes_that_consumers_expect() {
        // Java's consumer throws IllegalStateException at any other retriable code.
        for error in [PartitionError::TimedOut, PartitionError::Overloaded] {
            assert_eq!(read_error(error), ErrorCode::NotLeaderOrFollower);
        }
        assert_eq!(
            read_error(PartitionError::OffsetOutOfRange),
            ErrorCode::OffsetOutOfRange
        );
    }
}
