//! What the transport needs of a replica that runs here: the receiving side of Raft's messages.

use std::sync::Arc;

use chronik_types::id::{RaftGroupId, ReplicaId};
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use openraft::raft::{
    AppendEntriesRequest, StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};

use super::Peers;
use super::campaign::{accept_transfer, greet};
use super::membership::Members;
use crate::replica::raft_config::{LogId, TypeConfig, Vote};
use crate::replica::{Replica, append_session};
use crate::replicas::WeakReplicas;

/// The replica has stopped, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the replica has stopped: {0}")]
pub struct Stopped(pub String);

pub type AppendRequests = BoxStream<'static, AppendEntriesRequest<TypeConfig>>;
pub type AppendResults = BoxStream<'static, Result<StreamAppendResult<TypeConfig>, Stopped>>;

/// One replica as its peers reach it.
pub trait RaftEndpoint: Send + Sync + 'static {
    fn replica_id(&self) -> ReplicaId;
    /// Pipelined: an answer for each request, in their order, ended by the first that is not a
    /// match.
    fn append_stream(&self, requests: AppendRequests) -> AppendResults;
    fn heartbeat(
        &self,
        request: AppendEntriesRequest<TypeConfig>,
    ) -> BoxFuture<'static, Result<StreamAppendResult<TypeConfig>, Stopped>>;
    /// A pre-vote is asked for only where no leader is known to be alive.
    fn vote(
        &self,
        request: VoteRequest<TypeConfig>,
        pre_vote: bool,
    ) -> BoxFuture<'static, Result<VoteResponse<TypeConfig>, Stopped>>;
    fn transfer_leader(
        &self,
        request: TransferLeaderRequest<TypeConfig>,
    ) -> BoxFuture<'static, Result<TransferLeaderResponse<TypeConfig>, Stopped>>;
    /// Whether the replica has everything up to the entry after which a leader's log begins.
    fn has_entry(&self, last_log_id: &LogId) -> bool;
    /// The vote that the replica holds now.
    fn current_vote(&self) -> Vote;
    /// Whether that replica is one of the group's voters, as far as is known here without asking.
    fn is_voter(&self, replica: ReplicaId) -> bool;
    /// The replica itself leads now.
    fn is_leader(&self) -> bool;
    /// Speaks, as the leader, to a follower that misses one.
    fn greet(self: Arc<Self>, peers: Peers, follower: ReplicaId) -> BoxFuture<'static, ()>;
}

/// Finds the replicas of this broker.
pub trait RaftGroups: Send + Sync + 'static {
    fn endpoint(&self, group: RaftGroupId) -> Option<Arc<dyn RaftEndpoint>>;
}

impl RaftGroups for WeakReplicas {
    fn endpoint(&self, group: RaftGroupId) -> Option<Arc<dyn RaftEndpoint>> {
        self.get(group)
            .map(|replica| replica as Arc<dyn RaftEndpoint>)
    }
}

fn stopped(error: impl std::fmt::Display) -> Stopped {
    Stopped(error.to_string())
}

impl RaftEndpoint for Replica {
    fn replica_id(&self) -> ReplicaId {
        Replica::replica_id(self)
    }

    fn append_stream(&self, requests: AppendRequests) -> AppendResults {
        let answers = append_session::answers(self.engine().clone(), requests);
        Box::pin(answers.map(|answer| answer.map_err(stopped)))
    }

    fn heartbeat(
        &self,
        request: AppendEntriesRequest<TypeConfig>,
    ) -> BoxFuture<'static, Result<StreamAppendResult<TypeConfig>, Stopped>> {
        let engine = self.engine().clone();
        Box::pin(async move {
            if let Some(answer) = engine.follow_at_rest(&request).await {
                return Ok(answer);
            }
            let matched = request.prev_log_id;
            let raft = engine.wake().await.map_err(stopped)?;
            let response = raft.append_entries(request).await.map_err(stopped)?;
            Ok(response.into_stream_result(matched, matched))
        })
    }

    fn vote(
        &self,
        request: VoteRequest<TypeConfig>,
        pre_vote: bool,
    ) -> BoxFuture<'static, Result<VoteResponse<TypeConfig>, Stopped>> {
        let engine = self.engine().clone();
        Box::pin(async move {
            if pre_vote {
                return Ok(engine.answer_pre_vote(&request));
            }
            if let Some(answer) = engine.vote_at_rest(&request).await {
                return Ok(answer);
            }
            let raft = engine.wake().await.map_err(stopped)?;
            raft.vote(request).await.map_err(stopped)
        })
    }

    fn transfer_leader(
        &self,
        request: TransferLeaderRequest<TypeConfig>,
    ) -> BoxFuture<'static, Result<TransferLeaderResponse<TypeConfig>, Stopped>> {
        let engine = self.engine().clone();
        Box::pin(async move {
            let raft = engine.wake().await.map_err(stopped)?;
            accept_transfer(&raft, request).await.map_err(stopped)
        })
    }

    fn has_entry(&self, last_log_id: &LogId) -> bool {
        Replica::has_entry(self, last_log_id)
    }

    fn current_vote(&self) -> Vote {
        self.vote()
    }

    fn is_voter(&self, replica: ReplicaId) -> bool {
        Members::of(self).is_none_or(|members| members.all_voters().contains(&replica))
    }

    fn is_leader(&self) -> bool {
        self.leadership().borrow().is_leader
    }

    fn greet(self: Arc<Self>, peers: Peers, follower: ReplicaId) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            // One that cannot be reached is greeted when it can be; one that was dropped does not know.
            let is_reached = peers.links().borrow().status(follower.broker_id).is_up();
            let is_member =
                || Members::of(&self).is_some_and(|members| members.nodes.contains(&follower));
            if is_reached && is_member() {
                greet(&peers, &self, follower).await;
            }
        })
    }
}
