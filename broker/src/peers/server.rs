//! The receiving side of the Raft transport: reads one peer's frames and hands each message to the
//! replica that it is meant for.
//!
//! Invariant: a message for a replica that does not run here is answered with an error, so that its
//! sender's session ends instead of waiting. Messages of one session reach Raft in the order they
//! were sent. No message waits for another group's replica.

mod requests;

use std::collections::HashMap;
use std::sync::Arc;

use chronik_proto::v1;
use chronik_proto::v1::peers_server::Peers as PeersApi;
use chronik_types::id::BrokerId;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, FuturesUnordered, StreamExt};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, warn};
use uuid::Uuid;
use v1::peer_error::Code;
use v1::peer_message::Message;

use super::Peers;
use super::codec::{self, InvalidPeerMessage, Route};
use super::connector::Frames;
use super::endpoint::{RaftEndpoint, Stopped};
use super::link::Link;
use super::queue::{FrameQueue, FrameStream};
use crate::replica::raft_config::AppendRequest;

/// Appends of one session that its replica has not taken yet; more than any sender's window.
const SESSION_QUEUE_MAX: usize = 64;
/// Requests of one peer that are being answered; above it, nothing more is read from the peer.
const REQUESTS_MAX: usize = 8192;
/// Sessions of one peer: one per group that it leads and this broker follows.
const SESSIONS_MAX: usize = 100_000;

/// The gRPC service.
pub struct PeersService {
    pub(super) peers: Peers,
}

#[tonic::async_trait]
impl PeersApi for PeersService {
    type ExchangeStream = BoxStream<'static, Result<v1::PeerFrame, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::PeerFrame>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let outbound = accept(&self.peers, request.into_inner().boxed());
        Ok(Response::new(outbound.map(Ok).boxed()))
    }
}

/// Serves one connection in a task of its own.
pub(super) fn accept(peers: &Peers, inbound: Frames) -> FrameStream {
    let (queue, stream) = FrameQueue::new();
    let this = peers.clone();
    peers.tasks().spawn(async move {
        let stop = this.stop_token().clone();
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = serve(this, inbound, queue.clone()) => {}
        }
        queue.close();
    });
    stream
}

/// Serves one peer's stream until it ends.
async fn serve(peers: Peers, mut inbound: Frames, queue: Arc<FrameQueue>) {
    let mut inbound_peer: Option<InboundPeer> = None;
    let mut requests: FuturesUnordered<BoxFuture<'static, v1::PeerAnswer>> =
        FuturesUnordered::new();
    let silence = peers.silence();
    let mut looks = interval(silence);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut heard, mut looked) = (Instant::now(), Instant::now());
    loop {
        tokio::select! {
            biased;
            Some(answer) = requests.next(), if !requests.is_empty() => {
                if queue.push_control(Message::Answer(answer)).is_err() {
                    return;
                }
            }
            frame = inbound.next(), if requests.len() < REQUESTS_MAX => {
                let frame = match frame {
                    Some(Ok(frame)) => frame,
                    None => return,
                    Some(Err(status)) => {
                        debug!(error = status.message(), "a peer's stream ended");
                        return;
                    }
                };
                heard = Instant::now();
                let frame_size = frame.encoded_len();
                for message in frame.messages {
                    let Some(message) = message.message else { continue };
                    match &mut inbound_peer {
                        None => match hello(&peers, message, &queue) {
                            Some(peer) => inbound_peer = Some(peer),
                            None => return,
                        },
                        Some(peer) => peer.receive(message, frame_size, &mut requests),
                    }
                }
            }
            now = looks.tick() => {
                if now.duration_since(looked) > silence + silence / 2 {
                    // This process was stopped or starved: that says nothing about the peer.
                    heard = now;
                }
                looked = now;
                if now.saturating_duration_since(heard) > silence
                    && let Some(peer) = &inbound_peer
                {
                    peer.link.inbound_silent(peer.incarnation);
                }
            }
        }
    }
}

/// The first message of a stream. None: the stream is of no use and ends.
fn hello(peers: &Peers, message: Message, queue: &Arc<FrameQueue>) -> Option<InboundPeer> {
    let Message::Hello(hello) = message else {
        warn!("a peer's stream does not begin with hello; closed");
        return None;
    };
    if hello.to_broker_id != peers.broker_id().0 {
        warn!(
            broker_id = peers.broker_id().0,
            meant = hello.to_broker_id,
            from = hello.broker_id,
            "a peer looks for another broker at this address; check rpc-advertised"
        );
        return None;
    }
    let incarnation = chronik_proto::uuid("incarnation_id", &hello.incarnation_id).ok()?;
    let answer = v1::PeerHello {
        broker_id: peers.broker_id().0,
        to_broker_id: hello.broker_id,
        incarnation_id: chronik_proto::uuid_bytes(peers.incarnation()),
    };
    queue.push_control(Message::Hello(answer)).ok()?;
    let broker = BrokerId(hello.broker_id);
    let link = peers.known_link(broker)?;
    Some(InboundPeer {
        peers: peers.clone(),
        link,
        broker,
        incarnation,
        queue: queue.clone(),
        sessions: HashMap::new(),
    })
}

/// One connected peer that sends to this broker.
struct InboundPeer {
    peers: Peers,
    /// Our own way to the same broker.
    link: Arc<Link>,
    broker: BrokerId,
    incarnation: Uuid,
    queue: Arc<FrameQueue>,
    sessions: HashMap<u64, mpsc::Sender<AppendRequest>>,
}

impl Drop for InboundPeer {
    fn drop(&mut self) {
        self.link.inbound_silent(self.incarnation);
    }
}

impl InboundPeer {
    /// A failed push needs no care here: the queue is closed, and so the connection ends.
    fn receive(
        &mut self,
        message: Message,
        frame_size: usize,
        requests: &mut FuturesUnordered<BoxFuture<'static, v1::PeerAnswer>>,
    ) {
        match message {
            Message::Ping(ping) => {
                // One that hears nothing leads nobody, though it is heard.
                match ping.unanswered {
                    false => self.link.inbound_speaks(self.incarnation),
                    true => self.link.inbound_silent(self.incarnation),
                }
                let pong = v1::PeerPong {
                    sequence: ping.sequence,
                    unreached: self.peers.is_deaf_to(self.broker),
                };
                let _ = self.queue.push_control(Message::Pong(pong));
            }
            Message::SessionOpen(open) => self.open_session(open),
            Message::Append(append) => self.append(append, frame_size),
            Message::SessionClose(close) => {
                self.sessions.remove(&close.session_id);
            }
            Message::Request(request) => requests.push(self.request(request)),
            Message::Hello(_)
            | Message::Pong(_)
            | Message::AppendAnswer(_)
            | Message::SessionError(_)
            | Message::Answer(_) => {
                warn!(
                    peer = self.broker.0,
                    "a peer sent a message of the wrong direction"
                );
            }
        }
    }

    fn open_session(&mut self, open: v1::AppendSessionOpen) {
        let id = open.session_id;
        let (route, endpoint) = match self.endpoint(open.route) {
            Ok(found) => found,
            Err(error) => return self.session_error(id, error),
        };
        if self.sessions.len() >= SESSIONS_MAX {
            let error = peer_error(Code::Overloaded, "too many sessions");
            return self.session_error(id, error);
        }
        let (sender, receiver) = mpsc::channel(SESSION_QUEUE_MAX);
        self.sessions.insert(id, sender);
        let answers = Answers {
            peers: self.peers.clone(),
            broker: self.broker,
            incarnation: self.incarnation,
            queue: self.queue.clone(),
            route,
            endpoint,
        };
        self.peers.tasks().spawn(answers.run(id, receiver));
    }

    fn append(&mut self, append: v1::AppendEntries, frame_size: usize) {
        let id = append.session_id;
        let request = match codec::append_from_wire(append, frame_size) {
            Ok(request) => request,
            Err(error) => return self.session_invalid(id, &error),
        };
        let error = match self
            .sessions
            .get(&id)
            .map(|session| session.try_send(request))
        {
            Some(Ok(())) => return,
            None | Some(Err(mpsc::error::TrySendError::Closed(_))) => {
                peer_error(Code::Stopped, "the session has ended")
            }
            Some(Err(mpsc::error::TrySendError::Full(_))) => {
                peer_error(Code::Overloaded, "more appends than a window may have")
            }
        };
        self.session_error(id, error);
    }

    fn session_invalid(&mut self, id: u64, error: &InvalidPeerMessage) {
        warn!(peer = self.broker.0, %error, "a peer sent an append that makes no sense");
        self.session_error(id, peer_error(Code::Invalid, &error.to_string()));
    }

    fn session_error(&mut self, session_id: u64, error: v1::PeerError) {
        self.sessions.remove(&session_id);
        let error = v1::AppendSessionError {
            session_id,
            error: Some(error),
        };
        let _ = self.queue.push_bulk(Message::SessionError(error), 0);
    }
}

/// Turns Raft's results of one session into answers.
struct Answers {
    peers: Peers,
    broker: BrokerId,
    incarnation: Uuid,
    queue: Arc<FrameQueue>,
    route: Route,
    endpoint: Arc<dyn RaftEndpoint>,
}

impl Answers {
    async fn run(self, session_id: u64, requests: mpsc::Receiver<AppendRequest>) {
        let requests = ReceiverStream::new(requests).boxed();
        let mut results = self.endpoint.append_stream(requests);
        let mut recorded = false;
        while let Some(result) = results.next().await {
            let result = match result {
                Ok(result) => result,
                Err(Stopped(why)) => return self.error(session_id, &why),
            };
            if !recorded && result.is_ok() {
                recorded = true;
                let (broker, incarnation) = (self.broker, self.incarnation);
                self.peers
                    .heard()
                    .record(self.route.group, &*self.endpoint, broker, incarnation);
            }
            let outcome = Some(codec::outcome_to_wire(&result));
            let answer = Message::AppendAnswer(v1::AppendAnswer {
                session_id,
                outcome,
            });
            if self.queue.push_bulk(answer, 0).is_err() || result.is_err() {
                return;
            }
        }
        // Either the sender closed the session and ignores this, or it must know.
        self.error(session_id, "the replica ended the session");
    }

    fn error(&self, session_id: u64, why: &str) {
        let error = Some(peer_error(Code::Stopped, why));
        let error = Message::SessionError(v1::AppendSessionError { session_id, error });
        let _ = self.queue.push_bulk(error, 0);
    }
}

fn peer_error(code: Code, message: &str) -> v1::PeerError {
    v1::PeerError {
        code: code.into(),
        message: message.to_owned(),
    }
}
