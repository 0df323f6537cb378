//! openraft's type parameters for the controllers' group.

use std::fmt;
use std::sync::Arc;

use openraft::impls::{BoxedErrorSource, InlineBatch, OneshotResponder, Vote, leader_id_std};

use crate::command::{Command, Outcome};

/// The controllers' Raft group. A node id is a controller id; addresses come from configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TypeConfig;

impl openraft::RaftTypeConfig for TypeConfig {
    type D = Proposal;
    type R = Outcome;
    type NodeId = u64;
    type Node = ();
    type Term = u64;
    // One leader per term, so that (term, index) names an entry.
    type LeaderId = leader_id_std::LeaderId<u64, u64>;
    type Vote = Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Self::D, Self::NodeId, Self::Node>;
    type Entry = openraft::alias::DefaultEntryOf<Self>;
    type AsyncRuntime = openraft_runtime::Runtime;
    type Responder<T>
        = OneshotResponder<Self, T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = BoxedErrorSource;
}

mod openraft_runtime {
    // Re-exported by openraft under a deprecated name; its own crate is not a dependency of ours.
    #[allow(deprecated)]
    pub use openraft::impls::TokioRuntime as Runtime;
}

pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub type RaftVote = openraft::alias::VoteOf<TypeConfig>;
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
pub type Membership = openraft::Membership<u64, ()>;
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;

/// An encoded command: encoded once by the proposer, stored and sent as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal(pub Arc<str>);

impl Proposal {
    pub fn encode(command: &Command) -> Result<Self, serde_json::Error> {
        Ok(Self(serde_json::to_string(command)?.into()))
    }

    pub fn decode(&self) -> Result<Command, serde_json::Error> {
        serde_json::from_str(&self.0)
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {} bytes", self.0.len())
    }
}
