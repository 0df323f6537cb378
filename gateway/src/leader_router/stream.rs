//! One ordered bidirectional stream to a broker, shared by all client connections.
//!
//! Invariants: requests leave in the order in which `begin` finished; a request that `begin`
//! refused was certainly not sent; when the stream breaks, everything that was sent and not
//! answered ends as an unknown outcome; bytes on their way are bounded.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{self, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use crate::error::CallError;
use crate::metrics::Metrics;

/// Requests that wait for the socket; bytes are bounded apart.
const QUEUE_MAX: usize = 1024;
/// A request waits this long for a stream that is being opened.
const OPENING_WAIT: Duration = Duration::from_millis(500);
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Bytes on their way are counted in units of this, as a semaphore counts in 32 bits.
const UNIT: usize = 1024;

/// What a stream carries.
pub trait Traffic: Sized + Send + Sync + 'static {
    type Request: Send + 'static;
    type Answer: Send + 'static;
    const NAME: &'static str;

    fn open(
        channel: Channel,
        requests: Requests<Self>,
    ) -> BoxFuture<'static, Result<Streaming<Self::Answer>, Status>>;
    fn request_id(answer: &Self::Answer) -> u64;
    /// Tells the broker to answer now; also when nobody waits for the answer any more.
    fn finish(request_id: u64) -> Option<Self::Request>;
}

struct Queued<T: Traffic> {
    request: T::Request,
    /// Freed when the request goes to the socket; only for requests without an answer.
    _bytes: Option<OwnedSemaphorePermit>,
}

/// The queue as the stream that goes to the broker.
pub struct Requests<T: Traffic> {
    queued: mpsc::Receiver<Queued<T>>,
}

impl<T: Traffic> Stream for Requests<T> {
    type Item = T::Request;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<Option<T::Request>> {
        self.queued
            .poll_recv(context)
            .map(|queued| queued.map(|queued| queued.request))
    }
}

type Waiting<T> = HashMap<u64, oneshot::Sender<<T as Traffic>::Answer>>;

/// One opened stream.
struct Session<T: Traffic> {
    queue: mpsc::Sender<Queued<T>>,
    /// None once the stream broke.
    waiting: Mutex<Option<Waiting<T>>>,
}

enum State<T: Traffic> {
    Opening,
    Up(Arc<Session<T>>),
    Down,
}

impl<T: Traffic> Clone for State<T> {
    fn clone(&self) -> Self {
        match self {
            State::Opening => State::Opening,
            State::Up(session) => State::Up(session.clone()),
            State::Down => State::Down,
        }
    }
}

/// A stream that is reopened whenever it breaks, for as long as its owner lives.
pub struct Link<T: Traffic> {
    state: watch::Receiver<State<T>>,
    bytes: Arc<Semaphore>,
    bytes_max: usize,
    next_request_id: std::sync::atomic::AtomicU64,
}

/// An answer that is on its way. Dropping it abandons the request.
pub struct Answer<T: Traffic> {
    request_id: u64,
    session: Arc<Session<T>>,
    answer: oneshot::Receiver<T::Answer>,
    answered: bool,
    _bytes: Option<OwnedSemaphorePermit>,
}

impl<T: Traffic> Link<T> {
    /// Starts the task that keeps the stream open until `stop`.
    pub fn start(
        broker_id: i32,
        channel: Channel,
        bytes_max: usize,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Self {
        let (sender, state) = watch::channel(State::Opening);
        let keeper = Keeper {
            broker_id,
            channel,
            state: sender,
            metrics,
            warned: false,
        };
        tokio::spawn(keeper.run(stop));
        let units = bytes_max.div_ceil(UNIT).clamp(1, Semaphore::MAX_PERMITS);
        Self {
            state,
            bytes: Arc::new(Semaphore::new(units)),
            bytes_max: units,
            next_request_id: std::sync::atomic::AtomicU64::new(1),
        }
    }

    /// Whether a request would be sent now, or as soon as a first attempt to connect is over.
    pub fn is_usable(&self) -> bool {
        !matches!(*self.state.borrow(), State::Down)
    }

    /// Queues a request, made by `make` from its request id. Waits while the broker is behind.
    pub async fn begin(
        &self,
        size_bytes: usize,
        make: impl FnOnce(u64) -> T::Request,
    ) -> Result<Answer<T>, CallError> {
        let (session, bytes) = self.admit(size_bytes).await?;
        let unreachable = CallError::Unreachable("broker");
        let slot = session
            .queue
            .reserve()
            .await
            .map_err(|_| unreachable.clone())?;
        let request_id = self.next_request_id();
        let (sender, answer) = oneshot::channel();
        {
            let mut waiting = session
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let Some(waiting) = waiting.as_mut() else {
                return Err(unreachable);
            };
            waiting.insert(request_id, sender);
            slot.send(Queued {
                request: make(request_id),
                _bytes: None,
            });
        }
        let session = session.clone();
        Ok(Answer {
            request_id,
            session,
            answer,
            answered: false,
            _bytes: Some(bytes),
        })
    }

    /// Queues a request that has no answer.
    pub async fn send_only(
        &self,
        size_bytes: usize,
        make: impl FnOnce(u64) -> T::Request,
    ) -> Result<(), CallError> {
        let (session, bytes) = self.admit(size_bytes).await?;
        let unreachable = |_| CallError::Unreachable("broker");
        let slot = session.queue.reserve().await.map_err(unreachable)?;
        slot.send(Queued {
            request: make(self.next_request_id()),
            _bytes: Some(bytes),
        });
        Ok(())
    }

    /// Asks for the answer to a request now, with what there is.
    pub fn finish(&self, request_id: u64) {
        let State::Up(session) = self.state.borrow().clone() else {
            return;
        };
        if let Some(request) = T::finish(request_id) {
            // Where the queue is full the broker answers by its own deadline.
            let _ = session.queue.try_send(Queued {
                request,
                _bytes: None,
            });
        }
    }

    fn next_request_id(&self) -> u64 {
        self.next_request_id
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }

    async fn admit(
        &self,
        size_bytes: usize,
    ) -> Result<(Arc<Session<T>>, OwnedSemaphorePermit), CallError> {
        let units = size_bytes.div_ceil(UNIT).clamp(1, self.bytes_max);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let unreachable = CallError::Unreachable("broker");
        let bytes = self.bytes.clone().acquire_many_owned(units).await;
        let bytes = bytes.map_err(|_| unreachable.clone())?;
        let mut state = self.state.clone();
        let settled = timeout(
            OPENING_WAIT,
            state.wait_for(|state| !matches!(state, State::Opening)),
        );
        match settled.await {
            Ok(Ok(state)) => match &*state {
                State::Up(session) => Ok((session.clone(), bytes)),
                State::Opening | State::Down => Err(unreachable),
            },
            Ok(Err(_)) | Err(_) => Err(unreachable),
        }
    }
}

impl<T: Traffic> Answer<T> {
    /// Waits for the answer.
    pub async fn wait(&mut self) -> Result<T::Answer, CallError> {
        let answer = (&mut self.answer).await;
        self.answered = true;
        answer.map_err(|_| CallError::UnknownOutcome("the stream to the broker broke".to_owned()))
    }

    pub fn request_id(&self) -> u64 {
        self.request_id
    }
}

impl<T: Traffic> Drop for Answer<T> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let mut waiting = self
            .session
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let was_waiting = waiting
            .as_mut()
            .is_some_and(|waiting| waiting.remove(&self.request_id).is_some());
        drop(waiting);
        if was_waiting && let Some(request) = T::finish(self.request_id) {
            // Where the queue is full the broker ends the request by its own deadline.
            let _ = self.session.queue.try_send(Queued {
                request,
                _bytes: None,
            });
        }
    }
}

/// The task behind a link.
struct Keeper<T: Traffic> {
    broker_id: i32,
    channel: Channel,
    state: watch::Sender<State<T>>,
    metrics: Arc<Metrics>,
    warned: bool,
}

impl<T: Traffic> Keeper<T> {
    async fn run(mut self, stop: CancellationToken) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let since = Instant::now();
            let opened = tokio::select! {
                opened = self.session() => opened,
                () = stop.cancelled() => break,
            };
            // A stream that broke is reopened at once; one that does not open or hold, after a
            // while.
            if opened && since.elapsed() > BACKOFF_MAX {
                backoff = BACKOFF_MIN;
                self.state.send_replace(State::Opening);
                continue;
            }
            self.state.send_replace(State::Down);
            tokio::select! {
                () = sleep(backoff) => {}
                () = stop.cancelled() => break,
            }
            backoff = backoff.saturating_mul(2).min(BACKOFF_MAX);
        }
        self.close();
    }

    /// Opens the stream and serves it until it breaks. Answers whether it was open.
    async fn session(&mut self) -> bool {
        let (queue, queued) = mpsc::channel::<Queued<T>>(QUEUE_MAX);
        let requests = Requests { queued };
        let open = timeout(OPEN_TIMEOUT, T::open(self.channel.clone(), requests)).await;
        let mut answers = match open {
            Ok(Ok(answers)) => answers,
            Ok(Err(status)) => return self.failed(status.message()),
            Err(_) => return self.failed("not opened in time"),
        };
        let session = Arc::new(Session {
            queue,
            waiting: Mutex::new(Some(HashMap::new())),
        });
        self.state.send_replace(State::Up(session.clone()));
        self.metrics.broker_links_up.inc();
        self.warned = false;
        debug!(
            broker_id = self.broker_id,
            stream = T::NAME,
            "stream to broker is open"
        );
        let guard = Ended {
            session: session.clone(),
            metrics: self.metrics.clone(),
        };
        let why = loop {
            match answers.message().await {
                Ok(Some(answer)) => session.answered(answer),
                Ok(None) => break "ended by the broker".to_owned(),
                Err(status) => break status.message().to_owned(),
            }
        };
        drop(guard);
        self.metrics.broker_link_failures.inc();
        info!(
            broker_id = self.broker_id,
            stream = T::NAME,
            why,
            "stream to broker ended"
        );
        true
    }

    fn failed(&mut self, why: &str) -> bool {
        self.metrics.broker_link_failures.inc();
        if !self.warned {
            warn!(
                broker_id = self.broker_id,
                stream = T::NAME,
                why,
                "broker cannot be reached"
            );
            self.warned = true;
        }
        false
    }

    fn close(&self) {
        self.state.send_replace(State::Down);
    }
}

/// Ends a session however it ends, cancellation included.
struct Ended<T: Traffic> {
    session: Arc<Session<T>>,
    metrics: Arc<Metrics>,
}

impl<T: Traffic> Drop for Ended<T> {
    fn drop(&mut self) {
        self.metrics.broker_links_up.dec();
        // Dropping the senders tells everyone who waits that the outcome is unknown.
        self.session
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

impl<T: Traffic> Session<T> {
    fn answered(&self, answer: T::Answer) {
        let request_id = T::request_id(&answer);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let waiter = waiting
            .as_mut()
            .and_then(|waiting| waiting.remove(&request_id));
        drop(waiting);
        if let Some(waiter) = waiter {
            // Whoever asked may have gone away.
            let _ = waiter.send(answer);
        }
    }
}
