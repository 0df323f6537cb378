//! What controllers tell each other before, and beside, Raft: who they are, and who wants to be let in.

use std::time::Duration;

use chronik_proto::v1::controller_join_response::Outcome;
use chronik_proto::v1::controller_raft_client::ControllerRaftClient;
use chronik_proto::{InvalidMessage, uuid, uuid_bytes, v1};
use tonic::Status;
use tonic::transport::Channel;

use super::membership::Admission;
use super::node::RaftNode;
use crate::founding::{Founder, Identity, NodeId, Standing};

/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Letting somebody in takes a round of Raft.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What a peer answered of itself.
#[derive(Debug, Clone)]
pub struct Introduced {
    pub standing: Standing,
    /// It answers votes.
    pub takes_part: bool,
}

/// Asks controller `to` who it is.
pub async fn describe(channel: Channel, from: u64, to: u64) -> Result<Introduced, Status> {
    let request = v1::ControllerDescribeRequest {
        to_controller: to,
        from_controller: from,
    };
    let mut client = ControllerRaftClient::new(channel);
    let description = within(ANSWER_TIMEOUT, client.describe(request)).await?;
    from_wire(description).map_err(|error| Status::internal(error.to_string()))
}

/// Asks controller `to` to let `joiner` in.
pub async fn join(channel: Channel, to: u64, joiner: NodeId) -> Result<Admission, Status> {
    let request = v1::ControllerJoinRequest {
        to_controller: to,
        node_id: joiner.to_raft(),
    };
    let mut client = ControllerRaftClient::new(channel);
    let answer = within(JOIN_TIMEOUT, client.join(request)).await?;
    Ok(match answer.outcome() {
        Outcome::Unspecified | Outcome::NotLeader => Admission::NotLeader,
        Outcome::UnderWay => Admission::UnderWay,
        Outcome::Done => Admission::Done,
        Outcome::Refused => Admission::Refused(answer.reason),
    })
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("no answer in time")),
    }
}

/// What this controller tells of itself.
pub fn to_wire(node: &RaftNode) -> v1::ControllerDescription {
    let standing = node.standing();
    v1::ControllerDescription {
        disk_id: uuid_bytes(standing.identity.disk_id),
        node_id: standing.identity.node_id.map(NodeId::to_raft),
        founders: standing
            .identity
            .founders
            .iter()
            .map(|founder| v1::ControllerFounder {
                controller_id: founder.controller_id,
                disk_id: uuid_bytes(founder.disk_id),
            })
            .collect(),
        base: standing.base,
        group: standing.group.into_iter().collect(),
        takes_part: node.member().is_some(),
    }
}

fn from_wire(wire: v1::ControllerDescription) -> Result<Introduced, InvalidMessage> {
    let founders = wire
        .founders
        .into_iter()
        .map(|founder| {
            Ok(Founder {
                controller_id: founder.controller_id,
                disk_id: uuid("disk_id", &founder.disk_id)?,
            })
        })
        .collect::<Result<_, InvalidMessage>>()?;
    Ok(Introduced {
        standing: Standing {
            identity: Identity {
                disk_id: uuid("disk_id", &wire.disk_id)?,
                node_id: wire.node_id.map(NodeId::of_raft),
                founders,
            },
            base: wire.base,
            group: wire.group.into_iter().collect(),
        },
        takes_part: wire.takes_part,
    })
}

pub fn admission_to_wire(admission: Admission) -> v1::ControllerJoinResponse {
    let (outcome, reason) = match admission {
        Admission::NotLeader => (Outcome::NotLeader, String::new()),
        Admission::UnderWay => (Outcome::UnderWay, String::new()),
        Admission::Done => (Outcome::Done, String::new()),
        Admission::Refused(reason) => (Outcome::Refused, reason),
    };
    v1::ControllerJoinResponse {
        outcome: outcome.into(),
        reason,
    }
}
