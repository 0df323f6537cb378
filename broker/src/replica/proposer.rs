//! The partition's sequencer: from queued produce items to Raft proposals, one at a time.
//!
//! Invariant: items enter the log in the order they were queued. One proposal is in flight per
//! partition, and a proposal is checked against producer state that includes the one before it;
//! it is made under the leadership it was checked under, or not at all.

use std::future::Future;
use std::sync::Arc;

use chronik_telemetry::SpanKind;
use chronik_telemetry::trace::{self, TraceContext};
use chronik_types::offset::Offset;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, ForwardReason};
use openraft::impls::OneshotResponder;
use tokio::time::{Instant, timeout_at};

use super::error::AppendError;
use super::in_flight::{InFlight, Pending};
use super::lease::stopped;
use super::producer_state::{StagedVerdict, Staging};
use super::queue::{Acks, Appended, Queued};
use super::raft_config::{Batches, CommittedLeaderId, EntryData, TypeConfig};
use super::{Leadership, Replica};

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
    let mut items = sequence(replica, &leadership, items);
    if items.is_empty() {
        return;
    }
    for queued in &mut items {
        queued.span = None;
    }
    let spans = replicate_spans(&items);
    let trace = spans.first().map(trace::Span::context);
    let in_flight = Arc::new(InFlight::new(items));
    let deadline = in_flight.last_deadline();
    loop {
        match try_propose(replica, &leadership, &in_flight, trace.clone()).await {
            Tried::Applied => break,
            Tried::Failed(error) => {
                in_flight.answer_error(&error);
                return;
            }
            Tried::LeaseExpired => {
                if let Err(error) = replica.renew_lease(deadline).await {
                    in_flight.answer_error(&error);
                    if matches!(error, AppendError::NotLeader { .. }) {
                        replica.queue.fail_all(&error);
                    }
                    return;
                }
            }
        }
    }
    answer_committed(replica, in_flight);
}

/// One span for each sampled item of the entry. What becomes of the entry in other processes is in
/// the trace of the first; the others have a link to it.
fn replicate_spans(items: &[Queued]) -> Vec<trace::Span> {
    let mut spans: Vec<trace::Span> = Vec::new();
    for queued in items {
        let trace = queued.item.trace.as_ref();
        if let Some(mut span) = trace::span(trace, "broker.replicate", SpanKind::Internal) {
            if let Some(first) = spans.first() {
                span.link(&first.context());
            }
            spans.push(span);
        }
    }
    spans
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

/// Decides each item by deadline, leader epoch, in-sync replicas and producer sequence: answers what is not to be
/// appended, puts back what the table cannot decide yet, and returns the rest in order. That a sequence number is
/// not the next one is answered once it is sure that the table is complete.
fn sequence(replica: &Arc<Replica>, leadership: &Leadership, items: Vec<Queued>) -> Vec<Queued> {
    let (in_sync, required) = replica.in_sync();
    let now = Instant::now();
    let mut accepted = Vec::with_capacity(items.len());
    let mut later = Vec::new();
    let mut duplicates = Vec::new();
    let mut out_of_order = Vec::new();
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
            let wanted_epoch = queued.item.leader_epoch;
            if wanted_epoch.is_some_and(|epoch| epoch != leadership.leader_epoch) {
                queued.answer(Err(AppendError::NotLeader { leader: None }));
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
            #[cfg(feature = "sabotage")]
            let verdict = if crate::sabotage::is(crate::sabotage::Sabotage::ForgetSequences) {
                Ok(StagedVerdict::Append)
            } else {
                verdict
            };
            match verdict {
                Ok(StagedVerdict::Append) => accepted.push(queued),
                Ok(StagedVerdict::AfterThisEntry) => later.push(queued),
                // Only applied, hence committed, batches are in the table.
                Ok(StagedVerdict::Duplicate(base_offset)) => {
                    duplicates.push((queued, base_offset));
                }
                Err(error @ AppendError::OutOfOrderSequence { .. })
                    if queued.item.acks != Acks::None =>
                {
                    queued.drop_records();
                    out_of_order.push((queued, error));
                }
                Err(error) => queued.answer(Err(error)),
            }
        }
    });
    if !out_of_order.is_empty() {
        tokio::spawn(refuse(replica.clone(), *leadership, out_of_order));
    }
    replica.queue.put_back(later);
    for (queued, base_offset) in duplicates {
        answer_duplicate(replica, queued, base_offset);
    }
    accepted
}

/// Answers what does not follow on the last batch that is known here. A leader that was replaced and has not
/// heard of it does not know the last one, and its word would end a producer that did nothing wrong; so a
/// majority has to follow it still.
async fn refuse(
    replica: Arc<Replica>,
    judged_under: Leadership,
    refused: Vec<(Queued, AppendError)>,
) {
    let leads = replica.leads_still(judged_under.leader_epoch).await;
    for (mut queued, error) in refused {
        queued.answer(Err(match leads {
            true => error,
            false => AppendError::NotLeader { leader: None },
        }));
    }
}

/// The records are committed; that they are on as many disks as acks=all asks for now is to be waited for
/// like the first time, whose answer may have been that they were not.
fn answer_duplicate(replica: &Arc<Replica>, mut queued: Queued, base_offset: Offset) {
    let appended = Appended {
        base_offset,
        log_append_time_ms: None,
    };
    let (_, required) = replica.in_sync();
    if queued.item.acks != Acks::All || required <= replica.committed_count() {
        return queued.answer(Ok(appended));
    }
    let index = replica.state.applied_index();
    let (replica, deadline) = (replica.clone(), queued.item.deadline);
    queued.drop_records();
    tokio::spawn(async move {
        let outcome = match wait_until_replicated(&replica, index, deadline).await {
            Ok(()) => is_in_sync(&replica).map(|()| appended),
            Err(error) => Err(error),
        };
        queued.answer(outcome);
    });
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
    let Some(raft) = replica.leading_raft().await else {
        return Tried::Failed(replica.not_leader());
    };
    let proposed = raft
        .write(EntryData::Batches(batches))
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

/// Answers acks=all once enough replicas have the entry; a majority has it already.
fn answer_committed(replica: &Arc<Replica>, in_flight: Arc<InFlight>) {
    let (_, required) = replica.in_sync();
    if required <= replica.committed_count() {
        finish(replica, &in_flight);
        return;
    }
    // More than Raft needs. The sequencer goes on; the answer waits by itself.
    let replica = replica.clone();
    tokio::spawn(async move {
        let deadline = in_flight.last_deadline();
        match wait_until_replicated(&replica, in_flight.index(), deadline).await {
            Ok(()) => finish(&replica, &in_flight),
            Err(error) => in_flight.answer_error(&error),
        }
    });
}

/// Waits until as many voters have the entry as acks=all requires, or too few replicas are in sync for that to
/// be of use.
async fn wait_until_replicated(
    replica: &Replica,
    index: Option<u64>,
    deadline: Instant,
) -> Result<(), AppendError> {
    let is_over = || {
        let (in_sync, required) = replica.in_sync();
        let replicated = index.is_some_and(|index| replica.replicated_count(index) >= required);
        replicated || in_sync < required
    };
    if is_over() {
        return Ok(());
    }
    // Its followers are asked for as long as it is open.
    let Some(raft) = replica.leading_raft().await else {
        return Err(AppendError::TimedOut);
    };
    let mut metrics = raft.data_metrics();
    let mut partition = replica.partition.clone();
    loop {
        if is_over() {
            return Ok(());
        }
        let changed = async {
            tokio::select! {
                changed = metrics.changed() => changed.is_ok(),
                changed = partition.changed() => changed.is_ok(),
            }
        };
        // At the deadline nobody waits any more.
        if !timeout_at(deadline, changed).await.unwrap_or(false) {
            return Err(AppendError::TimedOut);
        }
    }
}

fn is_in_sync(replica: &Replica) -> Result<(), AppendError> {
    let (in_sync, required) = replica.in_sync();
    match in_sync < required {
        true => Err(AppendError::NotEnoughReplicasAfterAppend { in_sync, required }),
        false => Ok(()),
    }
}

fn finish(replica: &Replica, in_flight: &InFlight) {
    match is_in_sync(replica) {
        Ok(()) => in_flight.answer_appended(|_| true),
        Err(error) => {
            in_flight.answer_appended(|acks| acks != Acks::All);
            in_flight.answer_error(&error);
        }
    }
}
