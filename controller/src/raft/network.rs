//! Raft messages between controllers over gRPC, both ends.
//!
//! Invariant: a request is answered or ends in an error within its time limit; none is dropped in
//! silence, since replication to that peer would wait for its answer for ever. One append is in
//! flight per peer: what waits meanwhile goes out together in the next.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use chronik_proto::v1::controller_raft_client::ControllerRaftClient;
use chronik_proto::v1::controller_raft_server::ControllerRaft;
use chronik_proto::{MESSAGE_SIZE_MAX, v1};
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};

use super::codec;
use super::introduction;
use super::node::{ControllersRaft, RaftNode};
use super::state_machine::Snapshot;
use super::type_config::{RaftVote, SnapshotMeta, StoredMembership, TypeConfig};
use crate::founding::NodeId;
use crate::peers::Peers;
use crate::state::{SCHEMA_VERSION, StateDump};

/// Longest wait for an answer to anything but a snapshot.
const RPC_TIMEOUT: Duration = Duration::from_secs(2);
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);
const SNAPSHOT_CHUNK_BYTES: usize = 512 * 1024;
/// Largest snapshot that is accepted: some millions of partitions.
const SNAPSHOT_BYTES_MAX: usize = 2 * 1024 * 1024 * 1024;

/// Makes the client of each peer.
#[derive(Debug, Clone)]
pub struct Network {
    peers: Peers,
}

impl Network {
    pub fn new(peers: Peers) -> Self {
        Self { peers }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = PeerClient;

    async fn new_client(&mut self, target: u64, _node: &()) -> PeerClient {
        let controller_id = NodeId::of_raft(target).controller_id();
        let client = self.peers.channel(controller_id).map(|channel| {
            ControllerRaftClient::new(channel)
                .max_decoding_message_size(MESSAGE_SIZE_MAX)
                .max_encoding_message_size(MESSAGE_SIZE_MAX)
        });
        PeerClient { target, client }
    }
}

/// Client of one peer; one that no address is known of is unreachable.
#[derive(Debug)]
pub struct PeerClient {
    target: u64,
    client: Option<ControllerRaftClient<Channel>>,
}

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

impl PeerClient {
    fn client(&mut self) -> RpcResult<&mut ControllerRaftClient<Channel>> {
        let target = NodeId::of_raft(self.target);
        self.client.as_mut().ok_or_else(|| {
            let id = target.controller_id();
            unreachable(format!("controller {id} is no peer of this one"))
        })
    }
}

impl RaftNetworkV2<TypeConfig> for PeerClient {
    type SnapshotData = StateDump;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        let wire = codec::append_to_wire(self.target, &request);
        let response = within(RPC_TIMEOUT, self.client()?.append(wire)).await?;
        append_response_from_wire(response)
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let wire = codec::vote_request_to_wire(self.target, &request);
        let response = within(RPC_TIMEOUT, self.client()?.vote(wire)).await?;
        codec::vote_response_from_wire(response).map_err(network_error)
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let wire = codec::vote_request_to_wire(self.target, &request);
        let response = within(RPC_TIMEOUT, self.client()?.pre_vote(wire)).await?;
        codec::vote_response_from_wire(response).map_err(network_error)
    }

    async fn full_snapshot(
        &mut self,
        vote: RaftVote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let chunks = snapshot_chunks(self.target, &vote, snapshot)
            .map_err(network_error::<StreamingError<TypeConfig>>)?;
        let send = self
            .client()?
            .install_snapshot(futures::stream::iter(chunks));
        let response = tokio::select! {
            response = within(SNAPSHOT_TIMEOUT, send) => response?,
            closed = cancel => return Err(closed.into()),
        };
        let vote = codec::vote_from_wire(response.vote)
            .map_err(network_error::<StreamingError<TypeConfig>>)?;
        Ok(SnapshotResponse::new(vote))
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<TransferLeaderResponse<TypeConfig>> {
        let wire = v1::ControllerTransferLeaderRequest {
            to: *request.to_node_id(),
            from_leader: Some(codec::vote_to_wire(request.from_leader())),
            last_log_id: request.last_log_id().map(codec::log_id_to_wire),
        };
        let response = within(RPC_TIMEOUT, self.client()?.transfer_leader(wire)).await?;
        if response.accepted {
            return Ok(Ok(()));
        }
        Err(RPCError::Network(NetworkError::from_string(
            response.reason,
        )))
    }
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> RpcResult<T> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(unreachable(status)),
        Err(_) => Err(unreachable(format!("no answer within {limit:?}"))),
    }
}

/// openraft waits a little before it tries an unreachable peer again.
fn unreachable(why: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(why))
}

fn network_error<E: From<NetworkError<TypeConfig>>>(why: impl ToString) -> E {
    NetworkError::from_string(why).into()
}

fn append_response_from_wire(
    wire: v1::ControllerAppendResponse,
) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
    use v1::controller_append_response::Outcome;
    Ok(match wire.outcome() {
        Outcome::Success => AppendEntriesResponse::Success,
        Outcome::PartialSuccess => {
            AppendEntriesResponse::PartialSuccess(wire.last_log_id.map(codec::log_id_from_wire))
        }
        Outcome::Conflict => AppendEntriesResponse::Conflict,
        Outcome::HigherVote => AppendEntriesResponse::HigherVote(
            codec::vote_from_wire(wire.vote).map_err(network_error::<RPCError<TypeConfig>>)?,
        ),
        Outcome::Unspecified => return Err(unreachable("answer without an outcome")),
    })
}

fn append_response_to_wire(
    response: AppendEntriesResponse<TypeConfig>,
) -> v1::ControllerAppendResponse {
    use v1::controller_append_response::Outcome;
    let (outcome, last_log_id, vote) = match response {
        AppendEntriesResponse::Success => (Outcome::Success, None, None),
        AppendEntriesResponse::PartialSuccess(last) => (Outcome::PartialSuccess, last, None),
        AppendEntriesResponse::Conflict => (Outcome::Conflict, None, None),
        AppendEntriesResponse::HigherVote(vote) => (Outcome::HigherVote, None, Some(vote)),
    };
    v1::ControllerAppendResponse {
        outcome: outcome.into(),
        last_log_id: last_log_id.as_ref().map(codec::log_id_to_wire),
        vote: vote.as_ref().map(codec::vote_to_wire),
    }
}

/// Header first, then the dump as JSON in pieces.
pub(super) fn snapshot_chunks(
    to: u64,
    vote: &RaftVote,
    snapshot: Snapshot,
) -> Result<Vec<v1::ControllerSnapshotChunk>, serde_json::Error> {
    let membership = &snapshot.meta.last_membership;
    let header = v1::ControllerSnapshotHeader {
        to,
        vote: Some(codec::vote_to_wire(vote)),
        last_log_id: snapshot
            .meta
            .last_log_id
            .as_ref()
            .map(codec::log_id_to_wire),
        membership_log_id: membership.log_id().as_ref().map(codec::log_id_to_wire),
        membership: Some(codec::membership_to_wire(membership.membership())),
    };
    let data = Bytes::from(serde_json::to_vec(&snapshot.snapshot)?);
    let mut chunks = vec![v1::ControllerSnapshotChunk {
        header: Some(header),
        data: Bytes::new(),
    }];
    let mut start = 0;
    while start < data.len() {
        let end = data.len().min(start + SNAPSHOT_CHUNK_BYTES);
        chunks.push(v1::ControllerSnapshotChunk {
            header: None,
            data: data.slice(start..end),
        });
        start = end;
    }
    Ok(chunks)
}

/// The gRPC service that passes other controllers' messages to this one's Raft.
#[derive(Clone)]
pub struct RaftRpc {
    pub(super) node: RaftNode,
}

impl RaftRpc {
    /// This controller's Raft, for a message to `to`.
    fn raft(&self, to: u64) -> Result<&ControllersRaft, Status> {
        let Some((own_id, raft)) = self.node.member() else {
            return Err(Status::unavailable(
                "this controller does not take part yet",
            ));
        };
        if to == own_id.to_raft() {
            return Ok(raft);
        }
        let to = NodeId::of_raft(to);
        Err(Status::failed_precondition(format!(
            "message for controller {to} came to controller {own_id}: check the addresses in \
             `controllers`, unless its disk was replaced a moment ago"
        )))
    }

    fn check_controller(&self, to: u64) -> Result<(), Status> {
        let own_id = self.node.controller_id();
        if to == own_id {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "message for controller {to} came to controller {own_id}: check the addresses in \
             `controllers`"
        )))
    }
}

#[tonic::async_trait]
impl ControllerRaft for RaftRpc {
    async fn append(
        &self,
        request: Request<v1::ControllerAppendRequest>,
    ) -> Result<Response<v1::ControllerAppendResponse>, Status> {
        let wire = request.into_inner();
        let raft = self.raft(wire.to)?;
        let request = codec::append_from_wire(wire).map_err(malformed)?;
        let response = raft.append_entries(request).await.map_err(stopped)?;
        Ok(Response::new(append_response_to_wire(response)))
    }

    async fn vote(
        &self,
        request: Request<v1::ControllerVoteRequest>,
    ) -> Result<Response<v1::ControllerVoteResponse>, Status> {
        let wire = request.into_inner();
        let raft = self.raft(wire.to)?;
        let request = codec::vote_request_from_wire(wire).map_err(malformed)?;
        let response = raft.vote(request).await.map_err(stopped)?;
        Ok(Response::new(codec::vote_response_to_wire(&response)))
    }

    async fn pre_vote(
        &self,
        request: Request<v1::ControllerVoteRequest>,
    ) -> Result<Response<v1::ControllerVoteResponse>, Status> {
        let wire = request.into_inner();
        let raft = self.raft(wire.to)?;
        let request = codec::vote_request_from_wire(wire).map_err(malformed)?;
        let response = raft.pre_vote(request).await.map_err(stopped)?;
        Ok(Response::new(codec::vote_response_to_wire(&response)))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<v1::ControllerSnapshotChunk>>,
    ) -> Result<Response<v1::ControllerSnapshotResponse>, Status> {
        let mut chunks = request.into_inner();
        let header = chunks
            .message()
            .await?
            .and_then(|chunk| chunk.header)
            .ok_or_else(|| Status::invalid_argument("the first chunk has no header"))?;
        let raft = self.raft(header.to)?;
        let mut data = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            if data.len().saturating_add(chunk.data.len()) > SNAPSHOT_BYTES_MAX {
                return Err(Status::new(
                    Code::ResourceExhausted,
                    "the snapshot is too large",
                ));
            }
            data.extend_from_slice(&chunk.data);
        }
        let (vote, snapshot) = snapshot_from_wire(header, &data)?;
        let response = raft
            .install_full_snapshot(vote, snapshot)
            .await
            .map_err(stopped)?;
        let vote = Some(codec::vote_to_wire(&response.vote));
        Ok(Response::new(v1::ControllerSnapshotResponse { vote }))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::ControllerTransferLeaderRequest>,
    ) -> Result<Response<v1::ControllerTransferLeaderResponse>, Status> {
        let wire = request.into_inner();
        let raft = self.raft(wire.to)?;
        let from = codec::vote_from_wire(wire.from_leader).map_err(malformed)?;
        let last_log_id = wire.last_log_id.map(codec::log_id_from_wire);
        let request = TransferLeaderRequest::new(from, wire.to, last_log_id);
        let answer = raft
            .handle_transfer_leader(request)
            .await
            .map_err(stopped)?;
        let reason = answer.err().map(|error| error.to_string());
        Ok(Response::new(v1::ControllerTransferLeaderResponse {
            accepted: reason.is_none(),
            reason: reason.unwrap_or_default(),
        }))
    }

    async fn describe(
        &self,
        request: Request<v1::ControllerDescribeRequest>,
    ) -> Result<Response<v1::ControllerDescription>, Status> {
        let request = request.into_inner();
        self.check_controller(request.to_controller)?;
        self.node.heard_from(request.from_controller);
        Ok(Response::new(introduction::to_wire(&self.node)))
    }

    async fn join(
        &self,
        request: Request<v1::ControllerJoinRequest>,
    ) -> Result<Response<v1::ControllerJoinResponse>, Status> {
        let request = request.into_inner();
        self.check_controller(request.to_controller)?;
        let admission = self.node.admit(NodeId::of_raft(request.node_id)).await;
        Ok(Response::new(introduction::admission_to_wire(admission)))
    }
}

pub(super) fn snapshot_from_wire(
    header: v1::ControllerSnapshotHeader,
    data: &[u8],
) -> Result<(RaftVote, Snapshot), Status> {
    let vote = codec::vote_from_wire(header.vote).map_err(malformed)?;
    let dump: StateDump = serde_json::from_slice(data).map_err(malformed)?;
    if dump.schema_version > SCHEMA_VERSION {
        return Err(Status::failed_precondition(format!(
            "the snapshot has schema version {}, this controller knows {SCHEMA_VERSION}",
            dump.schema_version
        )));
    }
    let membership = StoredMembership::new(
        header.membership_log_id.map(codec::log_id_from_wire),
        header
            .membership
            .map(codec::membership_from_wire)
            .unwrap_or_default(),
    );
    let meta = SnapshotMeta {
        last_log_id: header.last_log_id.map(codec::log_id_from_wire),
        last_membership: membership,
    };
    Ok((
        vote,
        Snapshot {
            meta,
            snapshot: dump,
        },
    ))
}

fn malformed(error: impl ToString) -> Status {
    Status::invalid_argument(error.to_string())
}

fn stopped(error: impl ToString) -> Status {
    Status::unavailable(error.to_string())
}
