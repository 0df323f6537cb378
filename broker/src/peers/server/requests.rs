//! What a peer asks of a replica and waits for: votes, heartbeats, copies, the handing over of leadership.
//!
//! Invariant: every request gets one answer. One for a replica that does not run here under exactly the id
//! that it names is answered with an error.

use std::sync::Arc;

use chronik_proto::v1;
use futures::future::BoxFuture;
use openraft::raft::VoteResponse;
use v1::peer_answer::Answer;
use v1::peer_error::Code;
use v1::peer_request::Request as RaftRequest;

use super::{InboundPeer, peer_error};
use crate::peers::codec::{self, InvalidPeerMessage, Route};
use crate::peers::endpoint::{RaftEndpoint, Stopped};
use crate::peers::{Behind, Nudge};

impl InboundPeer {
    /// The replica that a message is meant for, if it runs here under exactly that id.
    pub(super) fn endpoint(
        &self,
        route: Option<v1::RaftRoute>,
    ) -> Result<(Route, Arc<dyn RaftEndpoint>), v1::PeerError> {
        let route =
            codec::route(route).map_err(|error| peer_error(Code::Invalid, &error.to_string()))?;
        if route.from.broker_id != self.broker {
            return Err(peer_error(
                Code::Invalid,
                "the sender is not the connected broker",
            ));
        }
        match self.peers.groups().endpoint(route.group) {
            Some(endpoint) if endpoint.replica_id() == route.to => Ok((route, endpoint)),
            _ => Err(peer_error(Code::UnknownReplica, "")),
        }
    }

    pub(super) fn request(&self, request: v1::PeerRequest) -> BoxFuture<'static, v1::PeerAnswer> {
        let request_id = request.request_id;
        let answer = match self.endpoint(request.route) {
            Err(error) => Box::pin(std::future::ready(Answer::Error(error))),
            Ok((route, endpoint)) => match request.request {
                None => invalid(InvalidPeerMessage::Missing("request")),
                Some(request) => self.dispatch(route, endpoint, request),
            },
        };
        Box::pin(async move {
            v1::PeerAnswer {
                request_id,
                answer: Some(answer.await),
            }
        })
    }

    fn dispatch(
        &self,
        route: Route,
        endpoint: Arc<dyn RaftEndpoint>,
        request: RaftRequest,
    ) -> BoxFuture<'static, Answer> {
        match request {
            RaftRequest::Heartbeat(wire) => match codec::heartbeat_from_wire(wire) {
                Err(error) => invalid(error),
                Ok(request) => {
                    let (peers, broker, incarnation) =
                        (self.peers.clone(), self.broker, self.incarnation);
                    Box::pin(async move {
                        let result = endpoint.heartbeat(request).await;
                        if matches!(result, Ok(Ok(_))) {
                            peers
                                .heard()
                                .record(route.group, &*endpoint, broker, incarnation);
                        }
                        answer(result, |result| {
                            Answer::Heartbeat(codec::outcome_to_wire(&result))
                        })
                    })
                }
            },
            RaftRequest::Vote(wire) => self.vote(route, endpoint, wire, false),
            RaftRequest::PreVote(wire) => self.vote(route, endpoint, wire, true),
            RaftRequest::Snapshot(wire) => {
                Box::pin(std::future::ready(self.snapshot(route, &*endpoint, wire)))
            }
            RaftRequest::TransferLeader(wire) => match codec::transfer_from_wire(wire) {
                Err(error) => invalid(error),
                Ok(request) => Box::pin(async move {
                    answer(endpoint.transfer_leader(request).await, |response| {
                        Answer::TransferLeader(codec::transfer_answer_to_wire(&response))
                    })
                }),
            },
        }
    }

    /// A leader of an older term learns of the newer one whatever this replica has.
    fn snapshot(
        &self,
        route: Route,
        endpoint: &dyn RaftEndpoint,
        wire: v1::RaftSnapshotRequest,
    ) -> Answer {
        let request = match codec::snapshot_from_wire(wire) {
            Ok(request) => request,
            Err(error) => return Answer::Error(peer_error(Code::Invalid, &error.to_string())),
        };
        let own = endpoint.current_vote();
        if own > request.vote || endpoint.has_entry(&request.last_log_id) {
            let vote = Some(codec::vote_to_wire(&own));
            return Answer::Snapshot(v1::RaftSnapshotAnswer { vote });
        }
        self.peers.behind(Behind {
            group: route.group,
            leader: route.from,
            vote: request.vote,
        });
        Answer::Error(peer_error(Code::Behind, "the replica fetches a copy"))
    }

    fn vote(
        &self,
        route: Route,
        endpoint: Arc<dyn RaftEndpoint>,
        wire: v1::RaftVoteRequest,
        pre_vote: bool,
    ) -> BoxFuture<'static, Answer> {
        let request = match codec::vote_request_from_wire(wire) {
            Ok(request) => request,
            Err(error) => return invalid(error),
        };
        let peers = self.peers.clone();
        Box::pin(async move {
            let mut request = request;
            let is_alive = peers.leader_is_alive(route, &*endpoint);
            if pre_vote && is_alive {
                // The group rests, so its lease has run out; but its leader's broker is connected
                // here, and that is the lease of a resting group.
                let refused = VoteResponse::new(endpoint.current_vote(), None, false);
                if endpoint.is_leader() {
                    peers.greet(route, endpoint);
                }
                return Answer::Vote(codec::vote_answer_to_wire(&refused));
            }
            // Links tell whether there is a leader. Raft's own lease of it knows less: it runs on for a
            // while though the leader's broker is gone.
            request.leadership_transfer |= !is_alive;
            let candidate_last = request.last_log_id;
            // Who only asks has not taken the term yet.
            let term = request.vote.leader_id.term;
            let term = term.saturating_sub(u64::from(pre_vote));
            let may_nudge = request.leadership_transfer;
            let result = endpoint.vote(request, pre_vote).await;
            if let Ok(response) = &result
                && may_nudge
                && !response.vote_granted
                && response.last_log_id > candidate_last
            {
                // The candidate cannot win against this longer log: campaign now instead of when
                // this replica's turn comes.
                let group = route.group;
                peers.nudge(Nudge { group, term });
            }
            answer(result, |response| {
                Answer::Vote(codec::vote_answer_to_wire(&response))
            })
        })
    }
}

fn invalid(error: InvalidPeerMessage) -> BoxFuture<'static, Answer> {
    let error = peer_error(Code::Invalid, &error.to_string());
    Box::pin(std::future::ready(Answer::Error(error)))
}

fn answer<T>(result: Result<T, Stopped>, to_wire: impl FnOnce(T) -> Answer) -> Answer {
    match result {
        Ok(value) => to_wire(value),
        Err(Stopped(why)) => Answer::Error(peer_error(Code::Stopped, &why)),
    }
}
