//! One leader's appends to a replica whose Raft may be closed while the session rests.
//!
//! Invariant: appends reach Raft in the order in which they came, whichever instance takes them, and
//! each is answered or ends the session with an error. A session that waits holds no instance open.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures::stream::{BoxStream, StreamExt, unfold};
use futures::{Stream, ready};
use openraft::errors::Fatal;
use openraft::raft::StreamAppendResult;
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::engine::Engine;
use super::raft_config::{AppendRequest, TypeConfig};
use super::room::Requests;

type Answer = StreamAppendResult<TypeConfig>;

/// The session cannot go on, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SessionEnded(pub String);

/// Answers to `requests`, in their order; ends with the first that is not a match.
pub fn answers(
    engine: Arc<Engine>,
    requests: BoxStream<'static, AppendRequest>,
) -> BoxStream<'static, Result<Answer, SessionEnded>> {
    let input = Requests::new(requests, engine.log().clone());
    let session = Session {
        engine,
        input: Arc::new(Mutex::new(input)),
        serving: None,
    };
    Box::pin(unfold(Some(session), |session| async move {
        let mut session = session?;
        let answer = session.next().await?;
        let goes_on = matches!(answer, Ok(Ok(_)));
        Some((answer, goes_on.then_some(session)))
    }))
}

struct Session {
    engine: Arc<Engine>,
    /// Where the instances take them from, one instance after the other.
    input: Arc<Mutex<Requests>>,
    serving: Option<Serving>,
}

/// An instance that takes requests of this session.
struct Serving {
    answers: BoxStream<'static, Result<Answer, Fatal<TypeConfig>>>,
    in_use: Arc<InUse>,
}

impl Session {
    async fn next(&mut self) -> Option<Result<Answer, SessionEnded>> {
        loop {
            let Some(serving) = &mut self.serving else {
                let request = self.first().await?;
                if let Some(answer) = self.engine.follow_at_rest(&request).await {
                    return Some(Ok(answer));
                }
                lock(&self.input).put_back(request);
                match Self::serve(&self.engine, &self.input).await {
                    Ok(serving) => self.serving = Some(serving),
                    Err(error) => return Some(Err(error)),
                }
                continue;
            };
            match serving.answers.next().await {
                Some(Ok(answer)) => {
                    serving.in_use.answered();
                    return Some(Ok(answer));
                }
                Some(Err(fatal)) => return Some(Err(SessionEnded(fatal.to_string()))),
                None if serving.in_use.count() > 0 => {
                    return Some(Err(SessionEnded("an append was not answered".to_owned())));
                }
                // The instance was closed while nothing was under way, or the leader is done.
                None => self.serving = None,
            }
        }
    }

    /// The next request, while no instance serves. None: there will be no more.
    fn first(&self) -> impl Future<Output = Option<AppendRequest>> + Send + use<> {
        let input = self.input.clone();
        futures::future::poll_fn(move |context| lock(&input).poll_next(context))
    }

    async fn serve(
        engine: &Arc<Engine>,
        input: &Arc<Mutex<Requests>>,
    ) -> Result<Serving, SessionEnded> {
        loop {
            let raft = engine.wake().await;
            let raft = raft.map_err(|error| SessionEnded(error.to_string()))?;
            // Held by `raft`; only a leader that steps down is closed all the same.
            let Some((number, closing)) = engine.instance() else {
                continue;
            };
            let in_use = Arc::new(InUse {
                engine: engine.clone(),
                count: AtomicUsize::new(0),
            });
            let feed = Feed {
                input: input.clone(),
                number,
                in_use: in_use.clone(),
                closing: Box::pin(closing.cancelled_owned()),
            };
            let answers = raft.stream_append(feed).boxed();
            return Ok(Serving { answers, in_use });
        }
    }
}

/// Requests of the session for one instance, until that closes.
struct Feed {
    input: Arc<Mutex<Requests>>,
    number: u64,
    in_use: Arc<InUse>,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Stream for Feed {
    type Item = AppendRequest;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<AppendRequest>> {
        if self.closing.as_mut().poll(context).is_ready() {
            return Poll::Ready(None);
        }
        let mut input = lock(&self.input);
        let Some(request) = ready!(input.poll_next(context)) else {
            return Poll::Ready(None);
        };
        if self.in_use.enter(self.number) {
            return Poll::Ready(Some(request));
        }
        input.put_back(request);
        Poll::Ready(None)
    }
}

/// Appends that an instance has taken and not answered: they keep it open.
struct InUse {
    engine: Arc<Engine>,
    count: AtomicUsize,
}

impl InUse {
    fn enter(&self, number: u64) -> bool {
        let entered = self.engine.enter(number);
        if entered {
            self.count.fetch_add(1, Ordering::SeqCst);
        }
        entered
    }

    fn answered(&self) {
        // Each answer is to an append that entered.
        if self.count.load(Ordering::SeqCst) > 0 {
            self.count.fetch_sub(1, Ordering::SeqCst);
            self.engine.leave(1);
        }
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let count = self.count();
        if count > 0 {
            self.engine.leave(count);
        }
    }
}

fn lock(input: &Mutex<Requests>) -> MutexGuard<'_, Requests> {
    input.lock().unwrap_or_else(PoisonError::into_inner)
}
