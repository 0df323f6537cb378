//! The partition's sequencer: from queued produce items to Raft proposals, one at a time.
//!
//! Invariant: items enter the log in the order they were queued. One proposal is in flight per
//! partition, and a proposal is checked against producer state that includes the one before it;
//! it is made under the leadership it was checked under, or not at all.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use chronik_telemetry::SpanKind;
use chronik_telemetry::trace::{self, TraceContext};
use chronik_types::offset::Offset;
use chronik_types::record_batch;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, Fatal, ForwardReason};
use openraft::impls::OneshotResponder;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::admission::Admitted;
use super::error::AppendError;
use super::producer_state::{StagedVerdict, Staging};
use super::raft_config::{Batches, CommittedLeaderId, TypeConfig};
use super::state_machine::now_ms;
use super::{Leadership, Replica};

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
    pub trace: Option<TraceContext>,
}

/// Where the records are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    pub base_offset: Offset,
    /// Milliseconds; only where the topic uses LogAppendTime.
    pub log_append_time_ms: Option<i64>,
}

type Outcome = Result<Appended, AppendError>;

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
struct Queued {
    item: ProduceItem,
    admitted: Admitted,
    log_append_time_ms: Option<i64>,
    /// None once answered.
    answer: Option<oneshot::Sender<Outcome>>,
    /// Runs until the item is part of an entry.
    span: Option<trace::Span>,
}

impl Queued {
    fn answer(&mut self, outcome: Outcome) {
        if let Some(answer) = self.answer.take() {
            // Whoever waited may have given up.
            let _ = answer.send(outcome);
        }
    }

    fn appended(&self, base_offset: Offset) -> Appended {
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
            answer: Some(answer),
            span,
        });
        let start = !std::mem::replace(&mut items.running, true);
        Ok((AppendFuture(receiver), start))
    }

    /// The next items for one entry; empty: the sequencer ends.
    fn take(&self) -> Vec<Queued> {
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
    fn put_back(&self, items_in_order: Vec<Queued>) {
        let mut items = self.lock();
        for item in items_in_order.into_iter().rev() {
            items.bytes = items.bytes.saturating_add(item.item.records.len());
            items.waiting.push_front(item);
        }
    }

    /// Answers everything that waits.
    fn fail_all(&self, error: &AppendError) {
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

/// A proposal in flight: its items, in the order of their records in the entry.
#[derive(Debug)]
struct InFlight {
    state: Mutex<InFlightState>,
}

#[derive(Debug)]
struct InFlightState {
    items: Vec<Queued>,
    base_offset: Option<Offset>,
    index: Option<u64>,
}

impl InFlight {
    fn lock(&self) -> MutexGuard<'_, InFlightState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives every unanswered item with `wanted` acks its place in the log.
    fn answer_appended(&self, wanted: impl Fn(Acks) -> bool) {
        let mut state = self.lock();
        // Set before the entry is durable, let alone applied.
        let Some(mut offset) = state.base_offset else {
            return;
        };
        for queued in &mut state.items {
            if wanted(queued.item.acks) {
                let appended = queued.appended(offset);
                queued.answer(Ok(appended));
            }
            offset = offset.plus(queued.admitted.record_count);
        }
    }

    fn answer_error(&self, error: &AppendError) {
        for queued in &mut self.lock().items {
            queued.answer(Err(error.clone()));
        }
    }

    /// The entry's bytes, built anew for each try: the log store wants to own them alone, to stamp
    /// offsets into them without a copy.
    fn build(&self) -> Bytes {
        let state = self.lock();
        let size = state.items.iter().map(|q| q.item.records.len()).sum();
        let mut buffer = BytesMut::with_capacity(size);
        for queued in &state.items {
            let start = buffer.len();
            buffer.extend_from_slice(&queued.item.records);
            if let Some(time) = queued.log_append_time_ms {
                stamp_times(&mut buffer[start..], time);
            }
        }
        buffer.freeze()
    }

    fn last_deadline(&self) -> Instant {
        let state = self.lock();
        state
            .items
            .iter()
            .map(|q| q.item.deadline)
            .max()
            .unwrap_or_else(Instant::now)
    }
}

/// Sets every batch in `bytes` to LogAppendTime. They passed `admission`.
fn stamp_times(bytes: &mut [u8], time_ms: i64) {
    let mut position = 0;
    while let Ok(header) = record_batch::BatchHeader::parse(&bytes[position..]) {
        let end = position + header.size_bytes();
        record_batch::stamp_log_append_time(&mut bytes[position..end], time_ms);
        position = end;
    }
}

/// Leader-local companion of a proposed entry: tells its proposer what the log store did.
#[derive(Debug)]
pub struct Pending(Arc<InFlight>);

impl Pending {
    /// The entry got its place in the leader's log.
    pub(super) fn appended(&self, base_offset: Offset, index: u64) {
        let mut state = self.0.lock();
        state.base_offset = Some(base_offset);
        state.index = Some(index);
    }

    /// The entry is on the leader's disk. Called from the WAL thread.
    pub(super) fn durable(self) {
        self.0.answer_appended(|acks| acks == Acks::Leader);
    }
}

/// How one try to propose ended.
enum Tried {
    Applied,
    LeaseExpired,
    Failed(AppendError),
}

/// The sequencer's task: runs until nothing waits.
pub(super) async fn run(replica: Arc<Replica>) {
    loop {
        let items = replica.queue.take();
        if items.is_empty() {
            return;
        }
        propose(&replica, items).await;
    }
}

async fn propose(replica: &Arc<Replica>, items: Vec<Queued>) {
    let Some((leadership, items)) = wait_until_ready(replica, items).await else {
        return;
    };
    let mut items = sequence(replica, items);
    if items.is_empty() {
        return;
    }
    for queued in &mut items {
        queued.span = None;
    }
    let trace = items.iter().find_map(|q| q.item.trace.clone());
    let span = trace::span(trace.as_ref(), "broker.replicate", SpanKind::Internal);
    let trace = span.as_ref().map(trace::Span::context);
    let state = InFlightState {
        items,
        base_offset: None,
        index: None,
    };
    let in_flight = Arc::new(InFlight {
        state: Mutex::new(state),
    });
    let deadline = in_flight.last_deadline();
    loop {
        match try_propose(replica, &leadership, &in_flight, trace.clone()).await {
            Tried::Applied => break,
            Tried::Failed(error) => {
                in_flight.answer_error(&error);
                return;
            }
            Tried::LeaseExpired => {
                if let Err(error) = renew_lease(replica, deadline).await {
                    in_flight.answer_error(&error);
                    return;
                }
            }
        }
    }
    answer_committed(replica, in_flight);
}

/// Waits until this replica leads with complete producer state; answers the items if it does not,
/// or if that takes longer than they may.
async fn wait_until_ready(
    replica: &Arc<Replica>,
    mut items: Vec<Queued>,
) -> Option<(Leadership, Vec<Queued>)> {
    let deadline = items.iter().map(|q| q.item.deadline).max()?;
    let mut receiver = replica.state.leadership.subscribe();
    let settled = receiver.wait_for(|l| !l.is_leader || l.ready);
    let error = match timeout_at(deadline, settled).await {
        Ok(Ok(leadership)) if leadership.ready => {
            let leadership = *leadership;
            return Some((leadership, items));
        }
        Err(_elapsed) => AppendError::TimedOut,
        Ok(_) => replica.not_leader(),
    };
    for queued in &mut items {
        queued.answer(Err(error.clone()));
    }
    if matches!(error, AppendError::NotLeader { .. }) {
        replica.queue.fail_all(&error);
    }
    None
}

/// Decides each item by deadline, in-sync replicas and producer sequence: answers what is not to be
/// appended, puts back what the table cannot decide yet, and returns the rest in order.
fn sequence(replica: &Replica, items: Vec<Queued>) -> Vec<Queued> {
    let (in_sync, required) = replica.in_sync();
    let now = Instant::now();
    let mut accepted = Vec::with_capacity(items.len());
    let mut later = Vec::new();
    replica.state.with_producers(|producers| {
        let mut staging = Staging::new(producers);
        for mut queued in items {
            if !later.is_empty() {
                later.push(queued);
                continue;
            }
            if queued.item.deadline <= now {
                queued.answer(Err(AppendError::TimedOut));
                continue;
            }
            if queued.item.acks == Acks::All && in_sync < required {
                queued.answer(Err(AppendError::NotEnoughReplicas { in_sync, required }));
                continue;
            }
            let verdict = match &queued.admitted.sequence {
                Some(sequence) => staging.check(sequence),
                None => Ok(StagedVerdict::Append),
            };
            match verdict {
                Ok(StagedVerdict::Append) => accepted.push(queued),
                Ok(StagedVerdict::AfterThisEntry) => later.push(queued),
                // Only applied, hence committed, batches are in the table.
                Ok(StagedVerdict::Duplicate(base_offset)) => {
                    let log_append_time_ms = None;
                    queued.answer(Ok(Appended {
                        base_offset,
                        log_append_time_ms,
                    }));
                }
                Err(error) => queued.answer(Err(error)),
            }
        }
    });
    replica.queue.put_back(later);
    accepted
}

/// Proposes the entry under `leadership` and waits for what becomes of it.
async fn try_propose(
    replica: &Arc<Replica>,
    leadership: &Leadership,
    in_flight: &Arc<InFlight>,
    trace: Option<TraceContext>,
) -> Tried {
    let Ok(term) = u64::try_from(leadership.leader_epoch.0) else {
        return Tried::Failed(replica.not_leader());
    };
    let batches = Batches {
        bytes: in_flight.build(),
        pending: Some(Pending(in_flight.clone())),
        trace,
    };
    let (responder, receiver) = OneshotResponder::<TypeConfig, _>::new_pair();
    let proposed = replica
        .raft
        .write(batches)
        .with_leader(CommittedLeaderId { term })
        .responder(responder)
        .await;
    if let Err(fatal) = proposed {
        return Tried::Failed(stopped(&fatal));
    }
    match wait_for_outcome(replica, leadership, receiver).await {
        Some(Ok(_)) => Tried::Applied,
        Some(Err(ClientWriteError::ForwardToLeader(forward))) => match forward.reason {
            ForwardReason::LeaseExpired => Tried::LeaseExpired,
            ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => {
                Tried::Failed(replica.not_leader())
            }
        },
        // Cut from this log under another leader, which may have it all the same; or the replica
        // stopped with the proposal in its hands.
        Some(Err(_)) | None => Tried::Failed(AppendError::TimedOut),
    }
}

/// A proposal stays with Raft until it is applied or cut off, which takes as long as there is no
/// quorum. Meanwhile, what waits behind it is sent on as soon as another replica leads.
async fn wait_for_outcome<T>(
    replica: &Replica,
    proposed_under: &Leadership,
    receiver: impl Future<Output = Result<T, impl Sized>>,
) -> Option<T> {
    tokio::pin!(receiver);
    let mut leadership = replica.state.leadership.subscribe();
    let lost = |l: &Leadership| !l.is_leader || l.leader_epoch != proposed_under.leader_epoch;
    loop {
        tokio::select! {
            biased;
            outcome = &mut receiver => return outcome.ok(),
            open = async { leadership.wait_for(lost).await.is_ok() } => {
                if !open {
                    return receiver.await.ok();
                }
            }
        }
        replica.queue.fail_all(&replica.not_leader());
        tokio::select! {
            biased;
            outcome = &mut receiver => return outcome.ok(),
            // Items may come in again once this replica leads again.
            changed = leadership.changed() => {
                if changed.is_err() {
                    return receiver.await.ok();
                }
            }
        }
    }
}

fn stopped(fatal: &Fatal<TypeConfig>) -> AppendError {
    match fatal {
        Fatal::StorageError(_) | Fatal::Panicked => AppendError::Storage,
        Fatal::Stopped => AppendError::NotLeader { leader: None },
    }
}

/// A leader that has not heard from a majority for a while (a resting group sends no heartbeats)
/// asks it before it writes again.
async fn renew_lease(replica: &Replica, deadline: Instant) -> Result<(), AppendError> {
    let mut metrics = replica.raft.data_metrics();
    let acked_before = metrics.borrow_and_update().last_quorum_acked;
    let mut leadership = replica.state.leadership.subscribe();
    loop {
        if let Err(fatal) = replica.raft.trigger().heartbeat().await {
            return Err(stopped(&fatal));
        }
        let retry_at = deadline.min(Instant::now() + replica.heartbeat_interval);
        let renewed = async {
            while metrics.borrow_and_update().last_quorum_acked <= acked_before {
                if metrics.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::select! {
            biased;
            () = async { drop(leadership.wait_for(|l| !l.is_leader).await) } => {
                let error = replica.not_leader();
                replica.queue.fail_all(&error);
                return Err(error);
            }
            renewed = timeout_at(retry_at, renewed) => match renewed {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(AppendError::NotLeader { leader: None }),
                Err(_) if Instant::now() >= deadline => return Err(AppendError::TimedOut),
                Err(_) => {}
            }
        }
    }
}

/// Answers acks=all once enough replicas have the entry; a majority has it already.
fn answer_committed(replica: &Arc<Replica>, in_flight: Arc<InFlight>) {
    let (_, required) = replica.in_sync();
    let majority = replica.state.voter_count() / 2 + 1;
    if required <= majority {
        finish(replica, &in_flight);
        return;
    }
    // More than Raft needs. The sequencer goes on; the answer waits by itself.
    let replica = replica.clone();
    tokio::spawn(async move {
        let deadline = in_flight.last_deadline();
        let index = in_flight.lock().index;
        let mut metrics = replica.raft.data_metrics();
        let mut partition = replica.partition.clone();
        loop {
            let (in_sync, required) = replica.in_sync();
            let replicated = index.is_some_and(|index| replica.replicated_count(index) >= required);
            if replicated || in_sync < required {
                break;
            }
            let changed = async {
                tokio::select! {
                    changed = metrics.changed() => changed.is_ok(),
                    changed = partition.changed() => changed.is_ok(),
                }
            };
            // At the deadline nobody waits any more.
            if !timeout_at(deadline, changed).await.unwrap_or(false) {
                in_flight.answer_error(&AppendError::TimedOut);
                return;
            }
        }
        finish(&replica, &in_flight);
    });
}

fn finish(replica: &Replica, in_flight: &InFlight) {
    let (in_sync, required) = replica.in_sync();
    if in_sync < required {
        let error = AppendError::NotEnoughReplicasAfterAppend { in_sync, required };
        in_flight.answer_appended(|acks| acks != Acks::All);
        in_flight.answer_error(&error);
    } else {
        in_flight.answer_appended(|_| true);
    }
}

/// The time that LogAppendTime topics stamp.
pub(super) fn append_time(log_append_time: bool) -> Option<i64> {
    log_append_time.then(now_ms)
}
