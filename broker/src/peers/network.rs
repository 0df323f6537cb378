//! openraft's network traits over links: what the Raft group of a partition uses to talk to its
//! other replicas.
//!
//! Invariants, each against a trap of the library:
//! - a session polls its input before it fails, because the library waits out its backoff inside
//!   the input; failing earlier would make it try again without a pause;
//! - a session that lost anything ends with an error, because the library waits for an answer
//!   without a time limit;
//! - a heartbeat takes one request, answers it and ends.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use chronik_types::id::{RaftGroupId, ReplicaId};
use futures::stream::{BoxStream, StreamExt, unfold};
use futures::{Stream, future::BoxFuture};
use openraft::OptionalSend;
use openraft::alias::SnapshotOf;
use openraft::entry::EntryPayload;
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory};
use openraft::network::{NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote};
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep};

use chronik_proto::v1;
use v1::peer_answer::Answer;
use v1::peer_request::Request;

use super::Peers;
use super::codec::{self, Route};
use super::link::{Link, LinkError, SESSION_APPENDS_MAX, SESSION_BYTES_MAX, Session, SessionEvent};
use crate::replica::raft_config::{EntryData, TypeConfig, Vote};
use crate::throttle::Ticket;

/// Between two tries to replicate to a replica that does not answer, and the most that it grows to.
const RETRY_DELAY: Duration = Duration::from_millis(200);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);

type AppendResult = Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>;

/// Makes the clients of one replica.
#[derive(Clone)]
pub struct GroupNetwork {
    peers: Peers,
    group: RaftGroupId,
    from: ReplicaId,
}

impl GroupNetwork {
    pub(super) fn new(peers: Peers, group: RaftGroupId, from: ReplicaId) -> Self {
        Self { peers, group, from }
    }

    pub(super) fn client(&self, to: ReplicaId, heartbeat: bool) -> ReplicaClient {
        let route = Route {
            group: self.group,
            from: self.from,
            to,
        };
        ReplicaClient {
            peers: self.peers.clone(),
            link: self.peers.link(to.broker_id),
            route,
            heartbeat,
            filled: Ticket::default(),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for GroupNetwork {
    type Network = ReplicaClient;

    async fn new_client(&mut self, target: ReplicaId, _node: &()) -> ReplicaClient {
        self.client(target, false)
    }

    async fn new_heartbeat_client(&mut self, target: ReplicaId, _node: &()) -> ReplicaClient {
        self.client(target, true)
    }
}

/// One replica's way to another one of its group.
pub struct ReplicaClient {
    peers: Peers,
    link: Arc<Link>,
    route: Route,
    /// Used for heartbeats only: they are control messages, coalesced with all others.
    heartbeat: bool,
    /// What went last to a replica that does not vote yet. Raft opens a session for each piece that it reads
    /// of a log.
    filled: Ticket,
}

fn unreachable(error: &LinkError) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(error))
}

fn invalid(error: &codec::InvalidPeerMessage) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(error))
}

impl NetStreamAppend<TypeConfig> for ReplicaClient {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, AppendResult>, RPCError<TypeConfig>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let output: BoxStream<'s, AppendResult> = if self.heartbeat {
            Box::pin(heartbeat(self, input))
        } else {
            let replication = Replication {
                peers: &self.peers,
                link: &self.link,
                route: self.route,
                input,
                input_open: true,
                session: None,
                window: VecDeque::new(),
                window_bytes: 0,
                blocked: None,
                filled: &mut self.filled,
            };
            Box::pin(unfold(Some(replication), |state| async move {
                let mut replication = state?;
                let result = replication.next().await?;
                let goes_on = matches!(result, Ok(Ok(_)));
                Some((result, goes_on.then_some(replication)))
            }))
        };
        Box::pin(async move { Ok(output) })
    }
}

fn heartbeat<'s, S>(
    client: &'s ReplicaClient,
    mut input: S,
) -> impl Stream<Item = AppendResult> + 's
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin + 'static,
{
    futures::stream::once(async move {
        let request = input.next().await?;
        let wire = Request::Heartbeat(codec::heartbeat_to_wire(&request));
        Some(match client.link.request(client.route, wire).await {
            Ok(Answer::Heartbeat(outcome)) => {
                codec::outcome_from_wire(Some(outcome)).map_err(|error| invalid(&error))
            }
            Ok(_) => Err(invalid(&codec::InvalidPeerMessage::Missing("heartbeat"))),
            Err(error) => Err(unreachable(&error)),
        })
    })
    .filter_map(std::future::ready)
}

/// One pipelined replication session: appends go out while the window has room, and answers come
/// back in their order.
struct Replication<'s, S> {
    peers: &'s Peers,
    link: &'s Arc<Link>,
    route: Route,
    input: S,
    input_open: bool,
    /// Opened when there is something to send.
    session: Option<Session>,
    /// Unanswered appends, oldest first.
    window: VecDeque<Unanswered>,
    window_bytes: usize,
    /// An append that waits for the window or for the link's budget.
    blocked: Option<Blocked>,
    filled: &'s mut Ticket,
}

struct Blocked {
    append: v1::AppendEntries,
    size: usize,
    has_records: bool,
    /// When Raft gave it to this session; None: it holds no entries.
    since: Option<Instant>,
}

struct Unanswered {
    size: usize,
    since: Option<Instant>,
    /// What it holds of the link's budget.
    _permit: Option<OwnedSemaphorePermit>,
}

impl<S> Replication<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin,
{
    /// The next answer. None when all input is answered.
    async fn next(&mut self) -> Option<AppendResult> {
        loop {
            if let Some(Blocked {
                size, has_records, ..
            }) = self.blocked
                && self.has_room(size)
            {
                // What has no records is little, and not to wait for what a full disk holds back there.
                let reserve = async {
                    match has_records {
                        true => self.link.reserve(size).await.map(Some),
                        false => Ok(None),
                    }
                };
                let permit = tokio::select! {
                    biased;
                    event = receive(&mut self.session) => return Some(self.answered(event)),
                    permit = reserve => permit,
                };
                if let Err(error) = permit.and_then(|permit| self.send(permit)) {
                    return Some(Err(unreachable(&error)));
                }
                continue;
            }
            let mut may_read = self.input_open && self.blocked.is_none();
            if !may_read && self.window.is_empty() {
                return None;
            }
            // Before it is read, so that what is read is the log of now.
            let fill_wait = match may_read {
                true => self.peers.fill_wait(self.route, *self.filled),
                false => None,
            };
            may_read &= fill_wait.is_none();
            tokio::select! {
                biased;
                event = receive(&mut self.session) => return Some(self.answered(event)),
                () = sleep(fill_wait.unwrap_or_default()), if fill_wait.is_some() => {}
                request = self.input.next(), if may_read => match request {
                    None => self.input_open = false,
                    Some(request) => {
                        if let Err(error) = self.accept(request) {
                            return Some(Err(unreachable(&error)));
                        }
                    }
                },
            }
        }
    }

    fn has_room(&self, size: usize) -> bool {
        self.window.is_empty()
            || (self.window.len() < SESSION_APPENDS_MAX
                && self.window_bytes.saturating_add(size) <= SESSION_BYTES_MAX)
    }

    fn accept(&mut self, request: AppendEntriesRequest<TypeConfig>) -> Result<(), LinkError> {
        let session = match &self.session {
            Some(session) => session,
            None => self.session.insert(self.link.open_session(self.route)?),
        };
        let since = (!request.entries.is_empty()).then(Instant::now);
        let has_records = request
            .entries
            .iter()
            .any(|entry| matches!(&entry.payload, EntryPayload::Normal(EntryData::Batches(_))));
        let (append, size) = codec::append_to_wire(session.id(), request);
        self.blocked = Some(Blocked {
            append,
            size,
            has_records,
            since,
        });
        Ok(())
    }

    fn send(&mut self, permit: Option<OwnedSemaphorePermit>) -> Result<(), LinkError> {
        let broken = LinkError::Broken(self.route.to.broker_id);
        let session = self.session.as_ref().ok_or(broken.clone())?;
        let blocked = self.blocked.take().ok_or(broken)?;
        session.send(blocked.append, blocked.size)?;
        if blocked.has_records {
            *self.filled = self.peers.charge_fill(self.route, blocked.size);
        }
        self.window_bytes = self.window_bytes.saturating_add(blocked.size);
        self.window.push_back(Unanswered {
            size: blocked.size,
            since: blocked.since,
            _permit: permit,
        });
        Ok(())
    }

    fn answered(&mut self, event: SessionEvent) -> AppendResult {
        match event {
            SessionEvent::Error(error) => Err(unreachable(&error)),
            SessionEvent::Answer(outcome) => {
                let Some(answered) = self.window.pop_front() else {
                    return Err(invalid(&codec::InvalidPeerMessage::Missing("append")));
                };
                self.window_bytes = self.window_bytes.saturating_sub(answered.size);
                let outcome = codec::outcome_from_wire(outcome).map_err(|error| invalid(&error))?;
                if let (Some(since), Ok(_)) = (answered.since, &outcome) {
                    let took = since.elapsed();
                    let seconds = self.peers.replication_seconds();
                    seconds.observe(took.as_secs_f64());
                }
                Ok(outcome)
            }
        }
    }
}

/// The session's next event; waits for ever while there is no session.
async fn receive(session: &mut Option<Session>) -> SessionEvent {
    match session {
        Some(session) => session.receive().await,
        None => std::future::pending().await,
    }
}

impl NetVote<TypeConfig> for ReplicaClient {
    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask_vote(Request::Vote(codec::vote_request_to_wire(&rpc)))
            .await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask_vote(Request::PreVote(codec::vote_request_to_wire(&rpc)))
            .await
    }
}

impl ReplicaClient {
    async fn ask_vote(
        &self,
        request: Request,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.link.request(self.route, request).await {
            Ok(Answer::Vote(answer)) => {
                codec::vote_answer_from_wire(answer).map_err(|error| invalid(&error))
            }
            Ok(_) => Err(invalid(&codec::InvalidPeerMessage::Missing("vote"))),
            Err(error) => Err(unreachable(&error)),
        }
    }
}

impl NetTransferLeader<TypeConfig> for ReplicaClient {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let wire = Request::TransferLeader(codec::transfer_to_wire(&request));
        match self.link.request(self.route, wire).await {
            Ok(Answer::TransferLeader(answer)) => {
                codec::transfer_answer_from_wire(&request, answer).map_err(|error| invalid(&error))
            }
            Ok(_) => Err(invalid(&codec::InvalidPeerMessage::Missing(
                "transfer_leader",
            ))),
            Err(error) => Err(unreachable(&error)),
        }
    }
}

/// No bytes are sent: the replica is told where this log begins. If it does not have everything up
/// to there it fetches a copy by itself, and the library, which sees an error, asks again.
impl NetSnapshot<TypeConfig> for ReplicaClient {
    type SnapshotData = bytes::Bytes;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<TypeConfig, bytes::Bytes>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            StreamingError::Unreachable(Unreachable::from_string(error.to_string()))
        };
        let Some(last_log_id) = snapshot.meta.last_log_id else {
            return Err(failed(&codec::InvalidPeerMessage::Missing("last_log_id")));
        };
        let request = codec::SnapshotRequest { vote, last_log_id };
        let request = Request::Snapshot(codec::snapshot_to_wire(&request));
        // Nothing ends the pause of the library after an error here, so a peer that is away is waited for.
        let ask = async {
            self.link.connection().await;
            self.link.request(self.route, request).await
        };
        let answer = tokio::select! {
            closed = cancel => return Err(StreamingError::Closed(closed)),
            answer = ask => answer,
        };
        match answer {
            Ok(Answer::Snapshot(answer)) => match codec::vote_from_wire(answer.vote) {
                Ok(vote) => Ok(SnapshotResponse { vote }),
                Err(error) => Err(failed(&error)),
            },
            Ok(_) => Err(failed(&codec::InvalidPeerMessage::Missing("snapshot"))),
            Err(error) => Err(failed(&error)),
        }
    }
}

/// A peer that is not connected is tried less and less often, since every partition does so by itself.
/// Whoever sees it come back ends the waiting (`campaign::greet`).
impl NetBackoff<TypeConfig> for ReplicaClient {
    fn backoff(&self) -> Option<Backoff> {
        let link = self.link.clone();
        let mut absent = RETRY_DELAY;
        Some(Backoff::new(std::iter::from_fn(move || {
            let delay = match link.is_connected() {
                true => RETRY_DELAY,
                false => absent,
            };
            absent = delay.saturating_mul(2).min(RETRY_DELAY_MAX);
            Some(delay)
        })))
    }
}
