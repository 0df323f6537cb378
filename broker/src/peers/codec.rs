//! Conversions between openraft's messages and the frames of `broker_raft.proto`.
//!
//! Invariant: decoding anything a peer sends gives a message or an error, never a panic; payload
//! bytes are shared, not copied, unless they would keep a much larger frame in memory.

use bytes::Bytes;
use chronik_proto::v1;
use chronik_telemetry::trace::TraceContext;
use chronik_types::id::{RaftGroupId, ReplicaId};
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderError,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::vote::RaftLeaderId;

use crate::replica::codec::{
    decode_control, decode_membership, encode_control, encode_membership, log_id, term,
};
use crate::replica::raft_config::{
    Batches, Entry, EntryData, EntryPayload, LeaderId, LogId, TypeConfig, Vote,
};

/// A message of a peer that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPeerMessage {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("an entry is not valid: {0}")]
    Entry(#[from] crate::replica::codec::DecodeError),
    #[error("entries have log indexes {previous} and then {next}")]
    Gap { previous: u64, next: u64 },
}

/// One Raft group's two ends of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route {
    pub group: RaftGroupId,
    pub from: ReplicaId,
    pub to: ReplicaId,
}

impl From<Route> for v1::RaftRoute {
    fn from(route: Route) -> Self {
        Self {
            raft_group_id: route.group.0,
            from: Some(route.from.into()),
            to: Some(route.to.into()),
        }
    }
}

pub fn route(wire: Option<v1::RaftRoute>) -> Result<Route, InvalidPeerMessage> {
    let wire = wire.ok_or(InvalidPeerMessage::Missing("route"))?;
    Ok(Route {
        group: RaftGroupId(wire.raft_group_id),
        from: wire
            .from
            .ok_or(InvalidPeerMessage::Missing("route.from"))?
            .into(),
        to: wire
            .to
            .ok_or(InvalidPeerMessage::Missing("route.to"))?
            .into(),
    })
}

fn log_id_to_wire(id: &LogId) -> v1::RaftLogId {
    v1::RaftLogId {
        term: term(id),
        index: id.index,
    }
}

fn log_id_from_wire(wire: v1::RaftLogId) -> LogId {
    log_id(wire.term, wire.index)
}

pub fn vote_to_wire(vote: &Vote) -> v1::RaftVote {
    v1::RaftVote {
        term: vote.leader_id.term,
        voted_for: Some((*vote.leader_id.node_id()).into()),
        committed: vote.committed,
    }
}

pub fn vote_from_wire(wire: Option<v1::RaftVote>) -> Result<Vote, InvalidPeerMessage> {
    let wire = wire.ok_or(InvalidPeerMessage::Missing("vote"))?;
    let voted_for = wire
        .voted_for
        .ok_or(InvalidPeerMessage::Missing("vote.voted_for"))?;
    Ok(Vote {
        leader_id: LeaderId::new(wire.term, voted_for.into()),
        committed: wire.committed,
    })
}

/// An append of a session, and its size for the accounting of windows.
pub fn append_to_wire(
    session_id: u64,
    request: AppendEntriesRequest<TypeConfig>,
) -> (v1::AppendEntries, usize) {
    let mut size = 0usize;
    let entries = request
        .entries
        .into_iter()
        .map(|entry| {
            let wire = entry_to_wire(entry);
            size = size.saturating_add(entry_size(&wire));
            wire
        })
        .collect();
    let append = v1::AppendEntries {
        session_id,
        vote: Some(vote_to_wire(&request.vote)),
        prev_log_id: request.prev_log_id.as_ref().map(log_id_to_wire),
        leader_commit: request.leader_commit.as_ref().map(log_id_to_wire),
        entries,
    };
    (append, size)
}

fn entry_size(entry: &v1::RaftEntry) -> usize {
    const OVERHEAD: usize = 32;
    let payload = match &entry.payload {
        Some(v1::raft_entry::Payload::Batches(bytes))
        | Some(v1::raft_entry::Payload::Membership(bytes))
        | Some(v1::raft_entry::Payload::Control(bytes)) => bytes.len(),
        None => 0,
    };
    payload
        .saturating_add(entry.traceparent.len())
        .saturating_add(OVERHEAD)
}

fn entry_to_wire(entry: Entry) -> v1::RaftEntry {
    let (payload, traceparent) = match entry.payload {
        EntryPayload::Blank => (None, String::new()),
        EntryPayload::Normal(EntryData::Control(control)) => (
            Some(v1::raft_entry::Payload::Control(encode_control(control))),
            String::new(),
        ),
        EntryPayload::Normal(EntryData::Batches(batches)) => (
            Some(v1::raft_entry::Payload::Batches(batches.bytes)),
            batches
                .trace
                .map_or_else(String::new, |trace| trace.traceparent()),
        ),
        EntryPayload::Membership(membership) => (
            Some(v1::raft_entry::Payload::Membership(encode_membership(
                &membership,
            ))),
            String::new(),
        ),
    };
    v1::RaftEntry {
        term: term(&entry.log_id),
        index: entry.log_id.index,
        payload,
        traceparent,
    }
}

/// `frame_size` is the size of the frame that the message came in: a payload much smaller than
/// that is copied out, so that a cached entry does not keep the whole frame in memory.
pub fn append_from_wire(
    wire: v1::AppendEntries,
    frame_size: usize,
) -> Result<AppendEntriesRequest<TypeConfig>, InvalidPeerMessage> {
    let prev_log_id = wire.prev_log_id.map(log_id_from_wire);
    let mut previous = prev_log_id.as_ref().map(|id| id.index);
    let mut entries = Vec::with_capacity(wire.entries.len());
    for entry in wire.entries {
        match previous {
            Some(previous) if previous.checked_add(1) != Some(entry.index) => {
                return Err(InvalidPeerMessage::Gap {
                    previous,
                    next: entry.index,
                });
            }
            _ => previous = Some(entry.index),
        }
        entries.push(entry_from_wire(entry, frame_size)?);
    }
    Ok(AppendEntriesRequest {
        vote: vote_from_wire(wire.vote)?,
        prev_log_id,
        entries,
        leader_commit: wire.leader_commit.map(log_id_from_wire),
    })
}

fn entry_from_wire(wire: v1::RaftEntry, frame_size: usize) -> Result<Entry, InvalidPeerMessage> {
    let payload = match wire.payload {
        None => EntryPayload::Blank,
        Some(v1::raft_entry::Payload::Batches(bytes)) => {
            let trace = TraceContext::parse(&wire.traceparent);
            let batches = Batches::stamped(unpinned(bytes, frame_size), trace);
            EntryPayload::Normal(EntryData::Batches(batches))
        }
        Some(v1::raft_entry::Payload::Control(bytes)) => {
            EntryPayload::Normal(EntryData::Control(decode_control(&bytes)?))
        }
        Some(v1::raft_entry::Payload::Membership(bytes)) => {
            EntryPayload::Membership(decode_membership(&bytes)?)
        }
    };
    Ok(Entry {
        log_id: log_id(wire.term, wire.index),
        payload,
    })
}

fn unpinned(bytes: Bytes, frame_size: usize) -> Bytes {
    if bytes.len() < frame_size / 4 {
        Bytes::copy_from_slice(&bytes)
    } else {
        bytes
    }
}

pub fn heartbeat_to_wire(request: &AppendEntriesRequest<TypeConfig>) -> v1::RaftHeartbeat {
    v1::RaftHeartbeat {
        vote: Some(vote_to_wire(&request.vote)),
        prev_log_id: request.prev_log_id.as_ref().map(log_id_to_wire),
        leader_commit: request.leader_commit.as_ref().map(log_id_to_wire),
    }
}

pub fn heartbeat_from_wire(
    wire: v1::RaftHeartbeat,
) -> Result<AppendEntriesRequest<TypeConfig>, InvalidPeerMessage> {
    Ok(AppendEntriesRequest {
        vote: vote_from_wire(wire.vote)?,
        prev_log_id: wire.prev_log_id.map(log_id_from_wire),
        entries: Vec::new(),
        leader_commit: wire.leader_commit.map(log_id_from_wire),
    })
}

pub fn outcome_to_wire(result: &StreamAppendResult<TypeConfig>) -> v1::AppendOutcome {
    use v1::append_outcome::Outcome;
    let outcome = match result {
        Ok(matched) => Outcome::Matched(v1::MatchedLogId {
            log_id: matched.as_ref().map(log_id_to_wire),
        }),
        Err(StreamAppendError::Conflict(id)) => Outcome::Conflict(log_id_to_wire(id)),
        Err(StreamAppendError::HigherVote(vote)) => Outcome::HigherVote(vote_to_wire(vote)),
    };
    v1::AppendOutcome {
        outcome: Some(outcome),
    }
}

pub fn outcome_from_wire(
    wire: Option<v1::AppendOutcome>,
) -> Result<StreamAppendResult<TypeConfig>, InvalidPeerMessage> {
    use v1::append_outcome::Outcome;
    let outcome = wire
        .and_then(|wire| wire.outcome)
        .ok_or(InvalidPeerMessage::Missing("outcome"))?;
    Ok(match outcome {
        Outcome::Matched(matched) => Ok(matched.log_id.map(log_id_from_wire)),
        Outcome::Conflict(id) => Err(StreamAppendError::Conflict(log_id_from_wire(id))),
        Outcome::HigherVote(vote) => {
            Err(StreamAppendError::HigherVote(vote_from_wire(Some(vote))?))
        }
    })
}

/// A leader's question whether a replica has everything up to an entry, which its own log begins
/// after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotRequest {
    pub vote: Vote,
    pub last_log_id: LogId,
}

pub fn snapshot_to_wire(request: &SnapshotRequest) -> v1::RaftSnapshotRequest {
    v1::RaftSnapshotRequest {
        vote: Some(vote_to_wire(&request.vote)),
        last_log_id: Some(log_id_to_wire(&request.last_log_id)),
    }
}

pub fn snapshot_from_wire(
    wire: v1::RaftSnapshotRequest,
) -> Result<SnapshotRequest, InvalidPeerMessage> {
    let last_log_id = wire
        .last_log_id
        .ok_or(InvalidPeerMessage::Missing("snapshot.last_log_id"))?;
    Ok(SnapshotRequest {
        vote: vote_from_wire(wire.vote)?,
        last_log_id: log_id_from_wire(last_log_id),
    })
}

pub fn vote_request_to_wire(request: &VoteRequest<TypeConfig>) -> v1::RaftVoteRequest {
    v1::RaftVoteRequest {
        vote: Some(vote_to_wire(&request.vote)),
        last_log_id: request.last_log_id.as_ref().map(log_id_to_wire),
        leadership_transfer: request.leadership_transfer,
    }
}

pub fn vote_request_from_wire(
    wire: v1::RaftVoteRequest,
) -> Result<VoteRequest<TypeConfig>, InvalidPeerMessage> {
    let last_log_id = wire.last_log_id.map(log_id_from_wire);
    let mut request = VoteRequest::new(vote_from_wire(wire.vote)?, last_log_id);
    request.leadership_transfer = wire.leadership_transfer;
    Ok(request)
}

pub fn vote_answer_to_wire(response: &VoteResponse<TypeConfig>) -> v1::RaftVoteAnswer {
    v1::RaftVoteAnswer {
        vote: Some(vote_to_wire(&response.vote)),
        granted: response.vote_granted,
        last_log_id: response.last_log_id.as_ref().map(log_id_to_wire),
    }
}

pub fn vote_answer_from_wire(
    wire: v1::RaftVoteAnswer,
) -> Result<VoteResponse<TypeConfig>, InvalidPeerMessage> {
    let last_log_id = wire.last_log_id.map(log_id_from_wire);
    Ok(VoteResponse::new(
        vote_from_wire(wire.vote)?,
        last_log_id,
        wire.granted,
    ))
}

pub fn transfer_to_wire(request: &TransferLeaderRequest<TypeConfig>) -> v1::TransferLeaderRequest {
    v1::TransferLeaderRequest {
        from_leader: Some(vote_to_wire(request.from_leader())),
        to: Some((*request.to_node_id()).into()),
        last_log_id: request.last_log_id().map(log_id_to_wire),
    }
}

pub fn transfer_from_wire(
    wire: v1::TransferLeaderRequest,
) -> Result<TransferLeaderRequest<TypeConfig>, InvalidPeerMessage> {
    let to = wire
        .to
        .ok_or(InvalidPeerMessage::Missing("transfer_leader.to"))?;
    Ok(TransferLeaderRequest::new(
        vote_from_wire(wire.from_leader)?,
        to.into(),
        wire.last_log_id.map(log_id_from_wire),
    ))
}

pub fn transfer_answer_to_wire(
    response: &TransferLeaderResponse<TypeConfig>,
) -> v1::TransferLeaderAnswer {
    use v1::transfer_leader_answer::Refusal;
    let refusal = match response {
        Ok(()) => None,
        Err(TransferLeaderError::VoteChanged { actual, .. }) => {
            Some(Refusal::VoteChanged(vote_to_wire(actual)))
        }
        Err(TransferLeaderError::LogNotFlushed { actual, .. }) => {
            let log_id = actual.as_ref().map(log_id_to_wire);
            Some(Refusal::LogNotFlushed(v1::MatchedLogId { log_id }))
        }
    };
    v1::TransferLeaderAnswer { refusal }
}

pub fn transfer_answer_from_wire(
    request: &TransferLeaderRequest<TypeConfig>,
    wire: v1::TransferLeaderAnswer,
) -> Result<TransferLeaderResponse<TypeConfig>, InvalidPeerMessage> {
    use v1::transfer_leader_answer::Refusal;
    Ok(match wire.refusal {
        None => Ok(()),
        Some(Refusal::VoteChanged(vote)) => Err(TransferLeaderError::VoteChanged {
            expected: *request.from_leader(),
            actual: vote_from_wire(Some(vote))?,
        }),
        Some(Refusal::LogNotFlushed(matched)) => Err(TransferLeaderError::LogNotFlushed {
            expected: request.last_log_id().copied(),
            actual: matched.log_id.map(log_id_from_wire),
        }),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use chronik_types::id::BrokerId;
    use chronik_types::offset::Offset;
    use prost::Message;

    use super::*;
    use crate::replica::raft_config::{Control, Membership};

    fn replica(broker: i32) -> ReplicaId {
        ReplicaId {
            broker_id: BrokerId(broker),
            incarnation: 7,
        }
    }

    fn vote() -> Vote {
        Vote {
            leader_id: LeaderId::new(3, replica(1)),
            committed: true,
        }
    }

    fn entries() -> Vec<Entry> {
        let members = BTreeSet::from([replica(1), replica(2)]);
        let membership = Membership::new_with_defaults(vec![members.clone()], members);
        let batches = Batches::stamped(Bytes::from_static(b"batch bytes"), None);
        vec![
            Entry {
                log_id: log_id(2, 5),
                payload: EntryPayload::Blank,
            },
            Entry {
                log_id: log_id(3, 6),
                payload: EntryPayload::Membership(membership),
            },
            Entry {
                log_id: log_id(3, 7),
                payload: EntryPayload::Normal(EntryData::Batches(batches)),
            },
            Entry {
                log_id: log_id(3, 8),
                payload: EntryPayload::Normal(EntryData::Control(Control::LogStart(Offset(4)))),
            },
        ]
    }

    #[test]
    fn an_append_survives_the_wire() {
        let request = AppendEntriesRequest::<TypeConfig> {
            vote: vote(),
            prev_log_id: Some(log_id(2, 4)),
            entries: entries(),
            leader_commit: Some(log_id(2, 3)),
        };
        let (wire, size) = append_to_wire(9, request.clone());
        assert!(size > 11);
        let wire = v1::AppendEntries::decode(&wire.encode_to_vec()[..]).unwrap();
        assert_eq!(wire.session_id, 9);
        let back = append_from_wire(wire, 1 << 20).unwrap();
        assert_eq!(back.to_string(), request.to_string());
        let EntryPayload::Normal(EntryData::Batches(batches)) = &back.entries[2].payload else {
            panic!()
        };
        assert_eq!(&batches.bytes[..], b"batch bytes");
    }

    #[test]
    fn a_gap_between_entries_is_refused() {
        let mut all = entries();
        all.remove(1);
        let request = AppendEntriesRequest::<TypeConfig> {
            vote: vote(),
            prev_log_id: Some(log_id(2, 4)),
            entries: all,
            leader_commit: None,
        };
        let (wire, _) = append_to_wire(1, request);
        let error = append_from_wire(wire, 0).unwrap_err();
        assert_eq!(
            error,
            InvalidPeerMessage::Gap {
                previous: 5,
                next: 7
            }
        );
    }

    #[test]
    fn outcomes_and_votes_survive_the_wire() {
        let results: [StreamAppendResult<TypeConfig>; 4] = [
            Ok(None),
            Ok(Some(log_id(1, 2))),
            Err(StreamAppendError::Conflict(log_id(4, 5))),
            Err(StreamAppendError::HigherVote(vote())),
        ];
        for result in results {
            assert_eq!(
                outcome_from_wire(Some(outcome_to_wire(&result))),
                Ok(result)
            );
        }
        let mut request = VoteRequest::<TypeConfig>::new(vote(), Some(log_id(1, 1)));
        request.leadership_transfer = true;
        let back = vote_request_from_wire(vote_request_to_wire(&request));
        assert_eq!(back, Ok(request));
        let response = VoteResponse::<TypeConfig>::new(vote(), None, true);
        assert_eq!(
            vote_answer_from_wire(vote_answer_to_wire(&response)),
            Ok(response)
        );
        let transfer = TransferLeaderRequest::new(vote(), replica(2), Some(log_id(1, 9)));
        assert_eq!(
            transfer_from_wire(transfer_to_wire(&transfer)),
            Ok(transfer.clone())
        );
        let snapshot = SnapshotRequest {
            vote: vote(),
            last_log_id: log_id(1, 9),
        };
        assert_eq!(
            snapshot_from_wire(snapshot_to_wire(&snapshot)),
            Ok(snapshot)
        );
        let refused = Err(TransferLeaderError::LogNotFlushed {
            expected: Some(log_id(1, 9)),
            actual: Some(log_id(1, 8)),
        });
        let wire = transfer_answer_to_wire(&refused);
        assert_eq!(transfer_answer_from_wire(&transfer, wire), Ok(refused));
    }

    #[test]
    fn messages_without_their_parts_are_refused() {
        assert!(append_from_wire(v1::AppendEntries::default(), 0).is_err());
        assert!(route(Some(v1::RaftRoute::default())).is_err());
        assert!(outcome_from_wire(None).is_err());
        assert!(snapshot_from_wire(v1::RaftSnapshotRequest::default()).is_err());
        assert!(vote_request_from_wire(v1::RaftVoteRequest::default()).is_err());
    }
}
