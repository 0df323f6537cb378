//! Produce items of one partition that wait for their turn, and what their producers wait on.
//!
//! Invariant: first in, first out; bounded in number and bytes, per partition and over all partitions of the
//! broker. An item is answered at most once.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use chronik_storage::Held;
use chronik_telemetry::SpanKind;
use chronik_telemetry::trace::{self, TraceContext};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::admission::Admitted;
use super::error::AppendError;

/// Bytes of one Raft entry; a larger item goes alone.
const ENTRY_SIZE_MAX: usize = 1024 * 1024;
/// What may wait per partition; above it producers are told to come back.
const QUEUE_ITEMS_MAX: usize = 4096;
const QUEUE_BYTES_MAX: usize = 32 * 1024 * 1024;

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
    /// An item that is not proposed by then never will be. Whoever waits for the answer gives up
    /// by itself (`AppendFuture::until`).
    pub deadline: Instant,
    /// Append only under this leadership, for those who decided upon what was in the log then. None:
    /// under whichever holds when it is the item's turn.
    pub leader_epoch: Option<LeaderEpoch>,
    pub trace: Option<TraceContext>,
}

/// Where the records are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    pub base_offset: Offset,
    /// Milliseconds; only where the topic uses LogAppendTime.
    pub log_append_time_ms: Option<i64>,
}

pub type Outcome = Result<Appended, AppendError>;

/// Stage 2 of a produce item. Dropping it does not undo the append.
#[derive(Debug)]
pub struct AppendFuture(oneshot::Receiver<Outcome>);

impl AppendFuture {
    /// The outcome, `TimedOut` at `deadline` at the latest, whatever Raft does.
    pub async fn until(self, deadline: Instant) -> Outcome {
        timeout_at(deadline, self)
            .await
            .unwrap_or(Err(AppendError::TimedOut))
    }
}

impl Future for AppendFuture {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        // A sequencer that ends without an answer may have proposed the item.
        Pin::new(&mut self.0)
            .poll(context)
            .map(|r| r.unwrap_or(Err(AppendError::TimedOut)))
    }
}

/// An item that waits for its turn.
#[derive(Debug)]
pub struct Queued {
    pub item: ProduceItem,
    pub admitted: Admitted,
    pub log_append_time_ms: Option<i64>,
    /// Its share of what may wait in all queues of the broker.
    held: Option<Held>,
    /// None once answered.
    answer: Option<oneshot::Sender<Outcome>>,
    /// Runs until the item is part of an entry.
    pub span: Option<trace::Span>,
}

impl Queued {
    pub fn answer(&mut self, outcome: Outcome) {
        if let Some(answer) = self.answer.take() {
            // Whoever waited may have given up.
            let _ = answer.send(outcome);
        }
    }

    /// Nothing of it is to be written any more, though its answer may take a while.
    pub fn drop_records(&mut self) {
        self.item.records = Bytes::new();
        self.held = None;
    }

    pub fn appended(&self, base_offset: Offset) -> Appended {
        Appended {
            base_offset,
            log_append_time_ms: self.log_append_time_ms,
        }
    }
}

#[derive(Debug, Default)]
struct Items {
    waiting: VecDeque<Queued>,
    bytes: usize,
    /// The sequencer's task runs.
    running: bool,
    closed: bool,
}

/// Items of one partition that wait, in order. The sequencer's task exists only while there are.
#[derive(Debug, Default)]
pub struct Queue {
    items: Mutex<Items>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Items> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an item. True: the caller starts the sequencer.
    pub fn push(
        &self,
        item: ProduceItem,
        admitted: Admitted,
        log_append_time_ms: Option<i64>,
        held: Held,
    ) -> Result<(AppendFuture, bool), AppendError> {
        let (answer, receiver) = oneshot::channel();
        let span = trace::span(item.trace.as_ref(), "broker.enqueue", SpanKind::Internal);
        let mut items = self.lock();
        if items.closed {
            return Err(AppendError::NotLeader { leader: None });
        }
        let bytes = items.bytes.saturating_add(item.records.len());
        let full = items.waiting.len() >= QUEUE_ITEMS_MAX || bytes > QUEUE_BYTES_MAX;
        if full && !items.waiting.is_empty() {
            return Err(AppendError::Overloaded);
        }
        items.bytes = bytes;
        items.waiting.push_back(Queued {
            item,
            admitted,
            log_append_time_ms,
            held: Some(held),
            answer: Some(answer),
            span,
        });
        let start = !std::mem::replace(&mut items.running, true);
        Ok((AppendFuture(receiver), start))
    }

    /// The next items for one entry; empty: the sequencer ends.
    pub fn take(&self) -> Vec<Queued> {
        let mut items = self.lock();
        let mut taken = Vec::new();
        let mut size = 0usize;
        while let Some(next) = items.waiting.front() {
            let next_size = next.item.records.len();
            size = size.saturating_add(next_size);
            if !taken.is_empty() && size > ENTRY_SIZE_MAX {
                break;
            }
            items.bytes = items.bytes.saturating_sub(next_size);
            taken.extend(items.waiting.pop_front());
        }
        items.running = !taken.is_empty();
        taken
    }

    /// Puts items back in front, in order.
    pub fn put_back(&self, items_in_order: Vec<Queued>) {
        let mut items = self.lock();
        for item in items_in_order.into_iter().rev() {
            items.bytes = items.bytes.saturating_add(item.item.records.len());
            items.waiting.push_front(item);
        }
    }

    /// Answers everything that waits.
    pub fn fail_all(&self, error: &AppendError) {
        let mut items = self.lock();
        items.bytes = 0;
        let waiting = std::mem::take(&mut items.waiting);
        drop(items);
        for mut queued in waiting {
            queued.answer(Err(error.clone()));
        }
    }

    /// Refuses items from now on, and those that wait.
    pub fn close(&self) {
        self.lock().closed = true;
        self.fail_all(&AppendError::NotLeader { leader: None });
    }
}
