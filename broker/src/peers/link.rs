//! The link to one peer: this broker's requests to it, over one stream that is dialled again
//! whenever it breaks.
//!
//! Invariant: everything sent over a connection is either answered or fails when the connection
//! ends. A session or request belongs to exactly one connection and never moves to the next one, so
//! no append can be lost without its session ending in an error.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chronik_proto::v1;
use chronik_types::id::BrokerId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use uuid::Uuid;
use v1::peer_message::Message;

use super::codec::Route;
use super::queue::{Closed, FrameQueue};
use super::state::{LinkState, LinkStatus, LinkTable};

/// Unanswered appends of one session. Deeper windows make smaller batches.
pub const SESSION_APPENDS_MAX: usize = 8;
/// Unanswered bytes of one session; one larger append goes alone.
pub const SESSION_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Unanswered bytes of all sessions of one link.
pub const LINK_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Accounted for each append beside its payload, which bounds their number as well.
const APPEND_OVERHEAD: usize = 512;

/// Why a message did not get an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error("broker {0} is not connected")]
    NotConnected(BrokerId),
    #[error("the connection to broker {0} broke")]
    Broken(BrokerId),
    #[error("broker {0} does not run the replica")]
    UnknownReplica(BrokerId),
    #[error("broker {peer} answered: {message}")]
    Refused { peer: BrokerId, message: String },
}

/// What a session receives.
#[derive(Debug)]
pub enum SessionEvent {
    Answer(Option<v1::AppendOutcome>),
    Error(LinkError),
}

/// The current connection and who waits for answers on it.
struct Connection {
    number: u64,
    queue: Arc<FrameQueue>,
    sessions: HashMap<u64, mpsc::Sender<SessionEvent>>,
    requests: HashMap<u64, oneshot::Sender<Result<v1::peer_answer::Answer, LinkError>>>,
}

struct Inner {
    connection: Option<Connection>,
    connections: u64,
    next_id: u64,
}

/// One per peer, for the life of the process; `dial` keeps it connected while the peer is wanted.
pub struct Link {
    peer: BrokerId,
    inner: Mutex<Inner>,
    budget: Arc<Semaphore>,
    table: watch::Sender<LinkTable>,
    /// Since when the peer's answers fail to come, while it is dialled.
    unanswered_since: Mutex<Option<Instant>>,
}

impl Link {
    pub fn new(peer: BrokerId, table: watch::Sender<LinkTable>) -> Arc<Link> {
        Arc::new(Link {
            peer,
            inner: Mutex::new(Inner {
                connection: None,
                connections: 0,
                next_id: 1,
            }),
            budget: Arc::new(Semaphore::new(LINK_BYTES_MAX)),
            table,
            unanswered_since: Mutex::default(),
        })
    }

    pub fn peer(&self) -> BrokerId {
        self.peer
    }

    pub fn is_connected(&self) -> bool {
        self.lock().connection.is_some()
    }

    /// Waits until there is a connection.
    pub async fn connection(&self) {
        let mut table = self.table.subscribe();
        // Told after the connection is there. The sender lives as long as this link.
        let _ = table.wait_for(|_| self.is_connected()).await;
    }

    /// Starts replication of one group to the peer.
    pub fn open_session(self: &Arc<Self>, route: Route) -> Result<Session, LinkError> {
        // The window bounds answers, plus one error.
        let (sender, events) = mpsc::channel(SESSION_APPENDS_MAX + 1);
        let mut inner = self.lock();
        let id = next_id(&mut inner);
        let connection = inner
            .connection
            .as_mut()
            .ok_or(LinkError::NotConnected(self.peer))?;
        let open = v1::AppendSessionOpen {
            session_id: id,
            route: Some(route.into()),
        };
        connection
            .queue
            .push_bulk(Message::SessionOpen(open), 0)
            .map_err(|Closed| LinkError::Broken(self.peer))?;
        connection.sessions.insert(id, sender);
        let queue = connection.queue.clone();
        Ok(Session {
            link: self.clone(),
            connection: connection.number,
            id,
            queue,
            events,
        })
    }

    /// Sends a small message and waits for its answer. Never waits longer than the connection
    /// lasts; a shorter limit is the caller's.
    pub async fn request(
        self: &Arc<Self>,
        route: Route,
        request: v1::peer_request::Request,
    ) -> Result<v1::peer_answer::Answer, LinkError> {
        let (sender, answer) = oneshot::channel();
        let (id, connection) = {
            let mut inner = self.lock();
            let request_id = next_id(&mut inner);
            let connection = inner
                .connection
                .as_mut()
                .ok_or(LinkError::NotConnected(self.peer))?;
            let message = v1::PeerRequest {
                request_id,
                route: Some(route.into()),
                request: Some(request),
            };
            connection
                .queue
                .push_control(Message::Request(message))
                .map_err(|Closed| LinkError::Broken(self.peer))?;
            connection.requests.insert(request_id, sender);
            (request_id, connection.number)
        };
        // A caller that stops waiting must not leave its entry behind.
        let _forget = OnDrop(|| {
            let mut inner = self.lock();
            if let Some(current) = inner.connection.as_mut()
                && current.number == connection
            {
                current.requests.remove(&id);
            }
        });
        answer.await.unwrap_or(Err(LinkError::Broken(self.peer)))
    }

    /// Takes bytes of the link's budget for one append; they come back when the permit is dropped.
    pub async fn reserve(&self, size: usize) -> Result<OwnedSemaphorePermit, LinkError> {
        let bytes = size.saturating_add(APPEND_OVERHEAD).min(LINK_BYTES_MAX);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        let permit = self.budget.clone().acquire_many_owned(bytes).await;
        permit.map_err(|_| LinkError::Broken(self.peer))
    }

    /// A new connection takes over; whatever was open on an older one fails.
    pub(super) fn connected(&self, queue: Arc<FrameQueue>, incarnation: Uuid) {
        {
            let mut inner = self.lock();
            inner.connections = inner.connections.wrapping_add(1);
            let number = inner.connections;
            inner.connection = Some(Connection {
                number,
                queue,
                sessions: HashMap::new(),
                requests: HashMap::new(),
            });
        }
        self.publish(|status| {
            status.state = LinkState::Up;
            status.incarnation = Some(incarnation);
        });
    }

    /// The connection ended: dropping its senders fails every session and request on it.
    pub(super) fn disconnected(&self) {
        let connection = self.lock().connection.take();
        if let Some(connection) = connection {
            connection.queue.close();
        }
    }

    pub(super) fn set_state(&self, state: LinkState) {
        self.publish(|status| status.state = state);
    }

    /// A stream of the peer's own brought something.
    pub(super) fn inbound_speaks(&self, incarnation: Uuid) {
        self.publish(|status| status.inbound = Some(incarnation));
    }

    /// A stream of the peer's own has ended or is silent. Another one of the same process says so soon.
    pub(super) fn inbound_silent(&self, incarnation: Uuid) {
        self.publish(|status| {
            status.inbound = status.inbound.filter(|speaking| *speaking != incarnation);
        });
    }

    fn publish(&self, change: impl FnOnce(&mut LinkStatus)) {
        self.table.send_if_modified(|table| {
            let before = table.status(self.peer);
            let mut after = before;
            change(&mut after);
            table.0.insert(self.peer, after);
            let mut since = self.unanswered_since();
            match after.state {
                LinkState::Up | LinkState::OneWay => *since = None,
                LinkState::Silent | LinkState::Unreachable | LinkState::Refused => {
                    since.get_or_insert_with(Instant::now);
                }
                // Nothing is known until the attempt ends.
                LinkState::Connecting => {}
            }
            before != after
        });
    }

    /// How long the peer has not answered; zero while it does, or where that is not known.
    pub(super) fn unanswered_for(&self) -> Duration {
        self.unanswered_since()
            .map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Nobody dials the peer any more.
    pub(super) fn given_up(&self) {
        *self.unanswered_since() = None;
    }

    fn unanswered_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.unanswered_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands one frame of answers to those who wait for them. Some: a pong came, and whether the
    /// peer says that it does not reach us.
    pub(super) fn receive(&self, frame: v1::PeerFrame) -> Option<bool> {
        let mut unreached = None;
        let mut inner = self.lock();
        let connection = inner.connection.as_mut()?;
        for message in frame.messages {
            match message.message {
                Some(Message::AppendAnswer(answer)) => {
                    let event = SessionEvent::Answer(answer.outcome);
                    deliver(connection, answer.session_id, event);
                }
                Some(Message::SessionError(error)) => {
                    let event = SessionEvent::Error(self.error(error.error));
                    deliver(connection, error.session_id, event);
                    connection.sessions.remove(&error.session_id);
                }
                Some(Message::Answer(answer)) => {
                    let Some(waiting) = connection.requests.remove(&answer.request_id) else {
                        continue;
                    };
                    let result = match answer.answer {
                        Some(v1::peer_answer::Answer::Error(error)) => Err(self.error(Some(error))),
                        Some(answer) => Ok(answer),
                        None => Err(self.error(None)),
                    };
                    // Nobody waits any more: fine.
                    let _ = waiting.send(result);
                }
                Some(Message::Pong(pong)) => unreached = Some(pong.unreached),
                _ => {}
            }
        }
        unreached
    }

    fn error(&self, error: Option<v1::PeerError>) -> LinkError {
        let error = error.unwrap_or_default();
        match error.code() {
            v1::peer_error::Code::UnknownReplica => LinkError::UnknownReplica(self.peer),
            _ => LinkError::Refused {
                peer: self.peer,
                message: error.message,
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn next_id(inner: &mut Inner) -> u64 {
    let id = inner.next_id;
    inner.next_id = id.wrapping_add(1);
    id
}

/// A session whose queue is full got more answers than it sent appends; it ends, since its
/// answers can no longer be matched.
fn deliver(connection: &mut Connection, session_id: u64, event: SessionEvent) {
    if let Some(session) = connection.sessions.get(&session_id)
        && session.try_send(event).is_err()
    {
        connection.sessions.remove(&session_id);
    }
}

/// Replication of one group over one connection. Ends with the connection, never outlives it.
pub struct Session {
    link: Arc<Link>,
    connection: u64,
    id: u64,
    queue: Arc<FrameQueue>,
    events: mpsc::Receiver<SessionEvent>,
}

impl Session {
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Sends an append made for this session.
    pub fn send(&self, append: v1::AppendEntries, size: usize) -> Result<(), LinkError> {
        self.queue
            .push_bulk(Message::Append(append), size)
            .map_err(|Closed| LinkError::Broken(self.link.peer))
    }

    /// The next answer; an error once the connection is gone.
    pub async fn receive(&mut self) -> SessionEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => SessionEvent::Error(LinkError::Broken(self.link.peer)),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut inner = self.link.lock();
        if let Some(connection) = inner.connection.as_mut()
            && connection.number == self.connection
        {
            connection.sessions.remove(&self.id);
            let close = v1::AppendSessionClose {
                session_id: self.id,
            };
            // If the connection is closing, the peer's side of the session ends with it.
            let _ = connection.queue.push_bulk(Message::SessionClose(close), 0);
        }
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
