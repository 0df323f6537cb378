//! What goes into and comes out of a group's state machine.
//!
//! Invariant: values only; who waits for an answer is the type parameter `W`, which the state
//! machine hands back with the answer.

use std::time::Duration;

use bytes::Bytes;

use super::super::records::GroupValue;

/// Monotonic time since some start.
pub type Moment = Duration;

/// The current time of both kinds.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub moment: Moment,
    /// Milliseconds since the Unix epoch, for what is written down.
    pub wall_ms: i64,
}

/// Facts for which a request is refused; the RPC layer has the wire's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    #[error("this broker does not coordinate the group")]
    NotCoordinator,
    #[error("the coordinator is still reading its log")]
    Loading,
    #[error("the group has no such member")]
    UnknownMember,
    #[error("the group is in another generation")]
    IllegalGeneration,
    #[error("the member's protocols do not fit the group's")]
    InconsistentProtocol,
    #[error("the session timeout is out of range")]
    InvalidSessionTimeout,
    #[error("the group rebalances")]
    RebalanceInProgress,
    #[error("join again with the given member id")]
    MemberIdRequired,
    #[error("another member has taken over the group instance id")]
    FencedInstance,
    #[error("the group has as many members as it may")]
    GroupFull,
    #[error("the group id is not valid")]
    InvalidGroup,
    #[error("there is no such group")]
    UnknownGroup,
    #[error("metadata is larger than allowed")]
    MetadataTooLarge,
    #[error("the log did not answer in time")]
    TimedOut,
}

/// Kafka's states of a classic group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    Empty,
    PreparingRebalance,
    CompletingRebalance,
    Stable,
}

impl GroupState {
    /// Kafka's name. A group that does not exist is `Dead` there.
    pub fn name(self) -> &'static str {
        match self {
            GroupState::Empty => "Empty",
            GroupState::PreparingRebalance => "PreparingRebalance",
            GroupState::CompletingRebalance => "CompletingRebalance",
            GroupState::Stable => "Stable",
        }
    }
}

/// A JoinGroup request.
#[derive(Debug, Clone)]
pub struct Join {
    /// Empty: the client has none yet.
    pub member_id: String,
    /// What the member is called where it has no id yet; unique, chosen by the caller.
    pub new_member_id: String,
    pub group_instance_id: Option<String>,
    pub client_id: String,
    pub client_host: String,
    pub session_timeout: Duration,
    pub rebalance_timeout: Duration,
    pub protocol_type: String,
    pub protocols: Vec<(String, Bytes)>,
    pub require_known_member_id: bool,
    pub supports_skip_assignment: bool,
}

/// A member as the leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinedMember {
    pub member_id: String,
    pub group_instance_id: Option<String>,
    pub metadata: Bytes,
}

/// A successful join: the member is in this generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    pub generation: i32,
    pub protocol_type: Option<String>,
    pub protocol_name: Option<String>,
    pub leader: String,
    pub member_id: String,
    /// Only for the leader.
    pub members: Vec<JoinedMember>,
    pub skip_assignment: bool,
}

/// A refused join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinRefused {
    pub error: GroupError,
    /// The id to join again with, where there is one.
    pub member_id: String,
}

/// A SyncGroup request.
#[derive(Debug, Clone, Default)]
pub struct Sync {
    pub generation: i32,
    pub member_id: String,
    pub group_instance_id: Option<String>,
    pub protocol_type: Option<String>,
    pub protocol_name: Option<String>,
    /// Only from the leader.
    pub assignments: Vec<(String, Bytes)>,
}

/// A member's assignment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synced {
    pub protocol_type: Option<String>,
    pub protocol_name: Option<String>,
    pub assignment: Bytes,
}

/// The answer to a call that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Join(Result<Joined, JoinRefused>),
    Sync(Result<Synced, GroupError>),
}

/// Which step waits for a write of the group's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// The group has become empty; nobody waits.
    Empty,
    /// The leader's assignments of that generation.
    Assignments { generation: i32 },
    /// A static member came back under a new id, without a rebalance. `skip_assignment`: it can be
    /// told that it leads (KIP-814); else the old leader's id is told, so that it does not assign.
    StaticMember {
        generation: i32,
        member_id: String,
        skip_assignment: bool,
        told_leader: String,
    },
}

/// What the caller has to do, in order.
#[derive(Debug)]
pub enum Effect<W> {
    Reply(W, Reply),
    /// Write the group's record, and tell the outcome by `Group::stored`.
    Store(Purpose, GroupValue),
}

/// A member as it is described to operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberDescription {
    pub member_id: String,
    pub group_instance_id: Option<String>,
    pub client_id: String,
    pub client_host: String,
    pub metadata: Bytes,
    pub assignment: Bytes,
}
