//! The partition's sequencer: from queued produce items to Raft proposals, one at a time.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use chronik_telemetry::trace::TraceContext;
use chronik_types::offset::Offset;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::error::AppendError;

/// When a producer wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acks {
    /// Never.
    None,
    /// When the leader has it on its disk.
    Leader,
    /// When it is committed, and on the disks of at least min.insync.replicas.
    All,
}

/// Records of one partition in one produce request.
#[derive(Debug)]
pub struct ProduceItem {
    /// Record batches, back to back, as the client sent them.
    pub records: Bytes,
    pub acks: Acks,
    /// After it the outcome is `TimedOut`, whatever Raft does.
    pub deadline: Instant,
    pub trace: Option<TraceContext>,
}

/// Where the records are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    pub base_offset: Offset,
    /// Milliseconds; only where the topic uses LogAppendTime.
    pub log_append_time_ms: Option<i64>,
}

/// Stage 2 of a produce item. Dropping it does not undo the append.
#[derive(Debug)]
pub struct AppendFuture {
    outcome: oneshot::Receiver<Result<Appended, AppendError>>,
    deadline: Pin<Box<tokio::time::Sleep>>,
}

impl Future for AppendFuture {
    type Output = Result<Appended, AppendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(outcome) = Pin::new(&mut self.outcome).poll(context) {
            return Poll::Ready(outcome.unwrap_or(Err(AppendError::TimedOut)));
        }
        self.deadline.as_mut().poll(context).map(|()| Err(AppendError::TimedOut))
    }
}

/// Leader-local companion of a proposed entry.
#[derive(Debug)]
pub struct Pending;
