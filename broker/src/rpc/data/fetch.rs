//! Fetch: long polls over several partitions, woken by their high watermarks.
//!
//! Invariant: a fetch is answered when it has `min_bytes`, when a partition has an error, when it
//! is told to finish, or at `max_wait`, whichever is first; it looks again only when something
//! moved.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chronik_proto::v1;
use chronik_telemetry::SpanKind;
use chronik_telemetry::trace::{self, TraceContext};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use futures::future::join_all;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Session;
use crate::replica::watermark::Registration;
use crate::replica::{EpochEnd, ReadError, ReadRequest, ReadResult, Replica};
use crate::replicas::Replicas;
use crate::rpc::error::{WireError, leader};

/// Long polls per stream; a gateway's clients share it.
const IN_FLIGHT_MAX: usize = 8192;
/// Longest a fetch may wait and largest it may be, whatever it asks.
const MAX_WAIT_MAX: Duration = Duration::from_secs(300);
const MAX_BYTES_MAX: usize = 64 * 1024 * 1024;

/// One gateway's fetch stream.
pub struct FetchSession {
    replicas: Replicas,
    running: HashMap<u64, Arc<Signal>>,
}

/// Wakes one fetch.
#[derive(Default)]
struct Signal {
    notify: Arc<Notify>,
    finish: AtomicBool,
}

impl FetchSession {
    pub fn new(replicas: Replicas) -> FetchSession {
        FetchSession {
            replicas,
            running: HashMap::new(),
        }
    }
}

impl Session for FetchSession {
    type Request = v1::FetchRequest;
    type Response = v1::FetchResponse;
    type Answer = Pin<Box<dyn Future<Output = v1::FetchResponse> + Send>>;

    fn start(&mut self, request: v1::FetchRequest) -> Option<Self::Answer> {
        let request_id = request.request_id;
        match request.kind {
            Some(v1::fetch_request::Kind::Start(start)) => {
                let signal = Arc::new(Signal::default());
                self.running.insert(request_id, signal.clone());
                Some(Box::pin(fetch(
                    self.replicas.clone(),
                    request_id,
                    start,
                    signal,
                )))
            }
            Some(v1::fetch_request::Kind::Finish(v1::FetchFinish {})) => {
                // It may have been answered while this was on its way.
                if let Some(signal) = self.running.get(&request_id) {
                    signal.finish.store(true, Ordering::SeqCst);
                    signal.notify.notify_one();
                }
                None
            }
            None => Some(Box::pin(std::future::ready(v1::FetchResponse {
                request_id,
                partitions: Vec::new(),
            }))),
        }
    }

    fn has_room(&self, in_flight: usize) -> bool {
        in_flight < IN_FLIGHT_MAX
    }

    fn answered(&mut self, response: &v1::FetchResponse) {
        self.running.remove(&response.request_id);
    }
}

/// Answers one fetch.
async fn fetch(
    replicas: Replicas,
    request_id: u64,
    start: v1::FetchStart,
    signal: Arc<Signal>,
) -> v1::FetchResponse {
    let context = TraceContext::parse(&start.traceparent);
    let _span = trace::span(context.as_ref(), "broker.fetch", SpanKind::Server);
    let max_wait = Duration::from_millis(start.max_wait_ms.into()).min(MAX_WAIT_MAX);
    let deadline = Instant::now() + max_wait;
    let mut registrations: Vec<Registration> = Vec::new();
    loop {
        let attempt = read_all(&replicas, &start).await;
        let now = Instant::now();
        if attempt.is_enough(&start) || signal.finish.load(Ordering::SeqCst) || now >= deadline {
            return v1::FetchResponse {
                request_id,
                partitions: attempt.partitions,
            };
        }
        if registrations.is_empty() {
            // Most fetches find something at once and never come here. Once registered, look again:
            // what moved in between woke nobody.
            registrations = register(&replicas, &start, &signal);
            continue;
        }
        // A deadline that passes ends the next round; so does whatever woke this one.
        let _ = tokio::time::timeout_at(deadline, signal.notify.notified()).await;
    }
}

fn register(replicas: &Replicas, start: &v1::FetchStart, signal: &Signal) -> Vec<Registration> {
    let replica =
        |partition: &v1::PartitionFetch| replicas.get(RaftGroupId(partition.raft_group_id));
    let register = |replica: Arc<Replica>| replica.watermark().register(signal.notify.clone());
    start
        .partitions
        .iter()
        .filter_map(replica)
        .map(register)
        .collect()
}

#[derive(Default)]
struct Attempt {
    partitions: Vec<v1::PartitionFetchResult>,
    bytes: usize,
    /// Some partition has something to say besides records.
    urgent: bool,
}

impl Attempt {
    fn is_enough(&self, start: &v1::FetchStart) -> bool {
        self.urgent
            || start.partitions.is_empty()
            || self.bytes >= usize::try_from(start.min_bytes).unwrap_or(usize::MAX)
    }
}

/// Reads every partition of the fetch once, within its byte limits. The first batch found goes out
/// whatever its size, so that a large one cannot block a client for ever.
async fn read_all(replicas: &Replicas, start: &v1::FetchStart) -> Attempt {
    let limit = usize::try_from(start.max_bytes)
        .unwrap_or(usize::MAX)
        .min(MAX_BYTES_MAX);
    let mut attempt = Attempt::default();
    let mut beyond_end = Vec::new();
    for asked in &start.partitions {
        let raft_group_id = asked.raft_group_id;
        let Some(replica) = replicas.get(RaftGroupId(raft_group_id)) else {
            attempt.urgent = true;
            attempt
                .partitions
                .push(failed(raft_group_id, &WireError::unknown_partition()));
            continue;
        };
        let remaining = limit.saturating_sub(attempt.bytes);
        let request = ReadRequest {
            offset: Offset(asked.fetch_offset),
            max_bytes: usize::try_from(asked.max_bytes)
                .unwrap_or(usize::MAX)
                .min(remaining),
            current_leader_epoch: LeaderEpoch(asked.current_leader_epoch),
            last_fetched_epoch: LeaderEpoch(asked.last_fetched_epoch),
        };
        let leader_epoch = replica.leadership().borrow().leader_epoch;
        let mut result = match replica.read(request).await {
            Ok(read) => {
                attempt.urgent |= read.diverging.is_some();
                found(raft_group_id, read)
            }
            Err(error) => {
                attempt.urgent = true;
                if matches!(error, ReadError::NotLeader { .. }) {
                    replicas.miss_leader(replica.group_id());
                }
                if error.is_beyond_end() {
                    let place = attempt.partitions.len();
                    beyond_end.push((place, replica.clone(), leader_epoch));
                }
                let mut result = failed(raft_group_id, &WireError::from(&error));
                if let ReadError::OffsetOutOfRange {
                    log_start_offset, ..
                } = error
                {
                    result.log_start_offset = log_start_offset.0;
                    result.high_watermark = replica.high_watermark().0;
                    result.last_stable_offset = result.high_watermark;
                }
                result
            }
        };
        if result.leader.is_none() {
            result.leader = replica.leader_hint().as_ref().map(leader);
        }
        let size: usize = result.records.iter().map(|bytes| bytes.len()).sum();
        if attempt.bytes > 0 && size > remaining {
            result.records.clear();
        } else {
            attempt.bytes = attempt.bytes.saturating_add(size);
        }
        attempt.partitions.push(result);
    }
    confirm(&mut attempt, beyond_end).await;
    attempt
}

/// Lets those say that an offset lies beyond the end which a majority follows still. A leader that was replaced and
/// has not heard of it has the shorter log, and its word would send a consumer elsewhere that has read what the
/// new one has.
async fn confirm(attempt: &mut Attempt, beyond_end: Vec<(usize, Arc<Replica>, LeaderEpoch)>) {
    let asked = beyond_end
        .into_iter()
        .map(|(place, replica, leader_epoch)| async move {
            (place, replica.leads_still(leader_epoch).await)
        });
    for (place, leads) in join_all(asked).await {
        if let Some(result) = attempt.partitions.get_mut(place).filter(|_| !leads) {
            let error = ReadError::NotLeader { leader: None };
            *result = failed(result.raft_group_id, &WireError::from(&error));
        }
    }
}

fn found(raft_group_id: u64, read: ReadResult) -> v1::PartitionFetchResult {
    v1::PartitionFetchResult {
        raft_group_id,
        high_watermark: read.high_watermark.0,
        // There are no transactions yet: all that is committed is stable.
        last_stable_offset: read.high_watermark.0,
        log_start_offset: read.log_start_offset.0,
        records: read.records,
        diverging_epoch: read.diverging.as_ref().map(epoch_end),
        ..Default::default()
    }
}

fn failed(raft_group_id: u64, error: &WireError) -> v1::PartitionFetchResult {
    v1::PartitionFetchResult {
        raft_group_id,
        error: error.error.into(),
        error_message: error.message.clone(),
        high_watermark: -1,
        last_stable_offset: -1,
        log_start_offset: -1,
        leader: error.leader,
        ..Default::default()
    }
}

pub fn epoch_end(end: &EpochEnd) -> v1::EpochEndOffset {
    v1::EpochEndOffset {
        leader_epoch: end.leader_epoch.0,
        end_offset: end.end_offset.0,
    }
}
