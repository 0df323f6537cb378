//! Our encodings of openraft's values: rows of the database and messages of controller_raft.proto.
//!
//! Invariant: what was encoded decodes to an equal value, and no bytes from outside can panic.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use chronik_proto::v1;
use openraft::EntryPayload;
use openraft::raft::{AppendEntriesRequest, VoteRequest, VoteResponse};
use openraft::vote::leader_id_std::CommittedLeaderId;
use serde::{Deserialize, Serialize};

use super::type_config::{
    Entry, LogId, Membership, Proposal, RaftVote, StoredMembership, TypeConfig,
};
use crate::db::backup::RaftStart;
use crate::db::{
    AppliedRow, DbError, KIND_BLANK, KIND_COMMAND, KIND_MEMBERSHIP, LogPosition, LogRow, VoteRow,
};
use crate::founding::NodeId;

/// A message of another controller that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{what} is malformed: {why}")]
    Malformed { what: &'static str, why: String },
}

/// A membership as the database holds it.
#[derive(Serialize, Deserialize)]
struct MembershipJson {
    voters: Vec<BTreeSet<u64>>,
    nodes: BTreeSet<u64>,
}

pub fn position(log_id: &LogId) -> LogPosition {
    LogPosition {
        term: log_id.leader_id.term,
        index: log_id.index,
    }
}

pub fn log_id(position: LogPosition) -> LogId {
    LogId::new(CommittedLeaderId::new(position.term), position.index)
}

pub fn vote_row(vote: &RaftVote) -> VoteRow {
    VoteRow {
        term: vote.leader_id.term,
        voted_for: vote.leader_id.voted_for,
        committed: vote.committed,
    }
}

pub fn vote_from_row(row: VoteRow) -> RaftVote {
    if row.committed {
        RaftVote::new_committed(row.term, row.voted_for)
    } else {
        RaftVote::new(row.term, row.voted_for)
    }
}

pub fn log_row(entry: &Entry) -> Result<LogRow, serde_json::Error> {
    let (kind, payload) = match &entry.payload {
        EntryPayload::Blank => (KIND_BLANK, "null".into()),
        EntryPayload::Normal(proposal) => (KIND_COMMAND, proposal.0.clone()),
        EntryPayload::Membership(membership) => {
            (KIND_MEMBERSHIP, membership_json(membership)?.into())
        }
    };
    let LogPosition { term, index } = position(&entry.log_id);
    Ok(LogRow {
        log_index: index,
        term,
        kind,
        payload,
    })
}

pub fn entry_from_row(row: LogRow) -> Result<Entry, DbError> {
    let payload = match row.kind {
        KIND_COMMAND => EntryPayload::Normal(Proposal(row.payload)),
        KIND_MEMBERSHIP => EntryPayload::Membership(membership_from_json(&row.payload)?),
        _ => EntryPayload::Blank,
    };
    let log_id = log_id(LogPosition {
        term: row.term,
        index: row.log_index,
    });
    Ok(Entry { log_id, payload })
}

pub fn applied_row(
    applied: Option<&LogId>,
    membership: &StoredMembership,
) -> Result<AppliedRow, serde_json::Error> {
    Ok(AppliedRow {
        position: applied.map(position),
        membership_position: membership.log_id().as_ref().map(position),
        membership: membership_json(membership.membership())?,
    })
}

pub fn applied_from_row(row: &AppliedRow) -> Result<(Option<LogId>, StoredMembership), DbError> {
    let membership = membership_from_json(&row.membership)?;
    let membership_log_id = row.membership_position.map(log_id);
    Ok((
        row.position.map(log_id),
        StoredMembership::new(membership_log_id, membership),
    ))
}

/// What Raft finds where a controller begins with a restored state: as if a group of these voters had
/// taken everything into a snapshot and purged its log. So a new member gets the state, and not an
/// empty log to begin from.
pub fn restored_start(voters: &BTreeSet<NodeId>) -> Result<RaftStart, serde_json::Error> {
    let start = LogPosition { term: 1, index: 1 };
    let ids: BTreeSet<u64> = voters.iter().map(|voter| voter.to_raft()).collect();
    let lowest = ids.first().copied().unwrap_or_default();
    Ok(RaftStart {
        applied: AppliedRow {
            position: Some(start),
            membership_position: Some(start),
            membership: membership_json(&new_membership(vec![ids], BTreeSet::new()))?,
        },
        purged: start,
        // Of a vote that nobody has won, so that elections begin with the term after it.
        vote: VoteRow {
            term: start.term,
            voted_for: lowest,
            committed: false,
        },
    })
}

fn membership_json(membership: &Membership) -> Result<String, serde_json::Error> {
    serde_json::to_string(&MembershipJson {
        voters: membership.get_joint_config().clone(),
        nodes: membership.nodes().map(|(id, ())| *id).collect(),
    })
}

fn membership_from_json(json: &str) -> Result<Membership, DbError> {
    let corrupt = |why: String| DbError::Corrupt {
        what: "membership",
        why,
    };
    let stored: MembershipJson =
        serde_json::from_str(json).map_err(|error| corrupt(error.to_string()))?;
    Ok(new_membership(stored.voters, stored.nodes))
}

fn new_membership(voters: Vec<BTreeSet<u64>>, nodes: BTreeSet<u64>) -> Membership {
    Membership::new_with_defaults(voters, nodes)
}

pub fn log_id_to_wire(log_id: &LogId) -> v1::ControllerLogId {
    let LogPosition { term, index } = position(log_id);
    v1::ControllerLogId { term, index }
}

pub fn log_id_from_wire(wire: v1::ControllerLogId) -> LogId {
    log_id(LogPosition {
        term: wire.term,
        index: wire.index,
    })
}

pub fn vote_to_wire(vote: &RaftVote) -> v1::ControllerVote {
    let VoteRow {
        term,
        voted_for,
        committed,
    } = vote_row(vote);
    v1::ControllerVote {
        term,
        voted_for,
        committed,
    }
}

pub fn vote_from_wire(wire: Option<v1::ControllerVote>) -> Result<RaftVote, DecodeError> {
    let wire = wire.ok_or(DecodeError::Missing("vote"))?;
    Ok(vote_from_row(VoteRow {
        term: wire.term,
        voted_for: wire.voted_for,
        committed: wire.committed,
    }))
}

pub fn membership_to_wire(membership: &Membership) -> v1::ControllerMembership {
    v1::ControllerMembership {
        voters: membership
            .get_joint_config()
            .iter()
            .map(|voters| v1::ControllerVoters {
                node_ids: voters.iter().copied().collect(),
            })
            .collect(),
        nodes: membership.nodes().map(|(id, ())| *id).collect(),
    }
}

pub fn membership_from_wire(wire: v1::ControllerMembership) -> Membership {
    let voters = wire
        .voters
        .into_iter()
        .map(|set| set.node_ids.into_iter().collect())
        .collect();
    new_membership(voters, wire.nodes.into_iter().collect())
}

pub fn append_to_wire(
    to: u64,
    request: &AppendEntriesRequest<TypeConfig>,
) -> v1::ControllerAppendRequest {
    v1::ControllerAppendRequest {
        to,
        vote: Some(vote_to_wire(&request.vote)),
        prev_log_id: request.prev_log_id.as_ref().map(log_id_to_wire),
        entries: request.entries.iter().map(entry_to_wire).collect(),
        leader_commit: request.leader_commit.as_ref().map(log_id_to_wire),
    }
}

pub fn append_from_wire(
    wire: v1::ControllerAppendRequest,
) -> Result<AppendEntriesRequest<TypeConfig>, DecodeError> {
    Ok(AppendEntriesRequest {
        vote: vote_from_wire(wire.vote)?,
        prev_log_id: wire.prev_log_id.map(log_id_from_wire),
        entries: wire
            .entries
            .into_iter()
            .map(entry_from_wire)
            .collect::<Result<_, _>>()?,
        leader_commit: wire.leader_commit.map(log_id_from_wire),
    })
}

fn entry_to_wire(entry: &Entry) -> v1::ControllerLogEntry {
    use v1::controller_log_entry::Payload;
    let payload = match &entry.payload {
        EntryPayload::Blank => None,
        EntryPayload::Normal(proposal) => Some(Payload::Command(Bytes::copy_from_slice(
            proposal.0.as_bytes(),
        ))),
        EntryPayload::Membership(membership) => {
            Some(Payload::Membership(membership_to_wire(membership)))
        }
    };
    v1::ControllerLogEntry {
        log_id: Some(log_id_to_wire(&entry.log_id)),
        payload,
    }
}

fn entry_from_wire(wire: v1::ControllerLogEntry) -> Result<Entry, DecodeError> {
    use v1::controller_log_entry::Payload;
    let log_id = wire
        .log_id
        .map(log_id_from_wire)
        .ok_or(DecodeError::Missing("log id"))?;
    let payload = match wire.payload {
        None => EntryPayload::Blank,
        Some(Payload::Command(bytes)) => {
            let text = std::str::from_utf8(&bytes).map_err(|error| DecodeError::Malformed {
                what: "command",
                why: error.to_string(),
            })?;
            EntryPayload::Normal(Proposal(Arc::from(text)))
        }
        Some(Payload::Membership(membership)) => {
            EntryPayload::Membership(membership_from_wire(membership))
        }
    };
    Ok(Entry { log_id, payload })
}

pub fn vote_request_to_wire(
    to: u64,
    request: &VoteRequest<TypeConfig>,
) -> v1::ControllerVoteRequest {
    v1::ControllerVoteRequest {
        to,
        vote: Some(vote_to_wire(&request.vote)),
        last_log_id: request.last_log_id.as_ref().map(log_id_to_wire),
        leadership_transfer: request.leadership_transfer,
    }
}

pub fn vote_request_from_wire(
    wire: v1::ControllerVoteRequest,
) -> Result<VoteRequest<TypeConfig>, DecodeError> {
    let last_log_id = wire.last_log_id.map(log_id_from_wire);
    let mut request = VoteRequest::new(vote_from_wire(wire.vote)?, last_log_id);
    request.leadership_transfer = wire.leadership_transfer;
    Ok(request)
}

pub fn vote_response_to_wire(response: &VoteResponse<TypeConfig>) -> v1::ControllerVoteResponse {
    v1::ControllerVoteResponse {
        vote: Some(vote_to_wire(&response.vote)),
        vote_granted: response.vote_granted,
        last_log_id: response.last_log_id.as_ref().map(log_id_to_wire),
    }
}

pub fn vote_response_from_wire(
    wire: v1::ControllerVoteResponse,
) -> Result<VoteResponse<TypeConfig>, DecodeError> {
    let last_log_id = wire.last_log_id.map(log_id_from_wire);
    Ok(VoteResponse::new(
        vote_from_wire(wire.vote)?,
        last_log_id,
        wire.vote_granted,
    ))
}
