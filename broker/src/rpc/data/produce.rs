//! Produce: stage 1 of each request as it comes, stage 2 whenever its partitions are done.
//!
//! Invariant: a request with acks 0 has no response; any other has exactly one, at its timeout at
//! the latest.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chronik_proto::v1;
use chronik_telemetry::SpanKind;
use chronik_telemetry::trace::{self, Span, TraceContext};
use chronik_types::id::RaftGroupId;
use tokio::time::Instant;

use super::Session;
use crate::replica::{Acks, AppendError, AppendFuture, ProduceItem, Replica};
use crate::replicas::Replicas;
use crate::rpc::error::{WireError, leader};

/// What may be unanswered per stream. The bytes bound counts records; a request above it is taken
/// alone.
const IN_FLIGHT_MAX: usize = 4096;
const IN_FLIGHT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// How long records with acks=0 or 1 wait for their turn at least.
const LEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest a request may wait, whatever it asks.
const TIMEOUT_MAX: Duration = Duration::from_secs(300);

/// One gateway's produce stream.
pub struct ProduceSession {
    replicas: Replicas,
    /// Bytes of records of unanswered requests.
    bytes_in_flight: Arc<AtomicUsize>,
}

impl ProduceSession {
    pub fn new(replicas: Replicas) -> ProduceSession {
        ProduceSession {
            replicas,
            bytes_in_flight: Arc::default(),
        }
    }
}

/// Counts a request's bytes for as long as it is unanswered.
struct BytesInFlight {
    total: Arc<AtomicUsize>,
    size: usize,
}

impl BytesInFlight {
    fn new(total: &Arc<AtomicUsize>, size: usize) -> BytesInFlight {
        total.fetch_add(size, Ordering::Relaxed);
        BytesInFlight {
            total: total.clone(),
            size,
        }
    }
}

impl Drop for BytesInFlight {
    fn drop(&mut self) {
        self.total.fetch_sub(self.size, Ordering::Relaxed);
    }
}

/// One partition of a request after stage 1.
enum Started {
    Unknown {
        raft_group_id: u64,
    },
    Refused {
        replica: Arc<Replica>,
        error: AppendError,
    },
    Waiting {
        replica: Arc<Replica>,
        outcome: AppendFuture,
    },
}

fn acks(acks: i32) -> Option<Acks> {
    match acks {
        0 => Some(Acks::None),
        1 => Some(Acks::Leader),
        -1 => Some(Acks::All),
        _ => None,
    }
}

impl ProduceSession {
    fn enqueue(
        &self,
        partition: v1::PartitionProduce,
        acks: Acks,
        deadline: Instant,
        trace: Option<TraceContext>,
    ) -> Started {
        let raft_group_id = partition.raft_group_id;
        let Some(replica) = self.replicas.get(RaftGroupId(raft_group_id)) else {
            return Started::Unknown { raft_group_id };
        };
        let item = ProduceItem {
            records: partition.records,
            acks,
            deadline,
            leader_epoch: None,
            trace,
        };
        match replica.enqueue(item) {
            Ok(outcome) => Started::Waiting { replica, outcome },
            Err(error) => {
                if matches!(error, AppendError::NotLeader { .. }) {
                    self.replicas.miss_leader(replica.group_id());
                }
                Started::Refused { replica, error }
            }
        }
    }
}

impl Session for ProduceSession {
    type Request = v1::ProduceRequest;
    type Response = v1::ProduceResponse;
    type Answer = Pin<Box<dyn Future<Output = v1::ProduceResponse> + Send>>;

    fn start(&mut self, request: v1::ProduceRequest) -> Option<Self::Answer> {
        let v1::ProduceRequest {
            request_id,
            acks: asked,
            timeout_ms,
            partitions,
            traceparent,
        } = request;
        let Some(acks) = acks(asked) else {
            return Some(Box::pin(std::future::ready(invalid_acks(
                request_id, asked, partitions,
            ))));
        };
        let span = trace::span(
            TraceContext::parse(&traceparent).as_ref(),
            "broker.produce",
            SpanKind::Server,
        );
        let trace = span.as_ref().map(Span::context);
        let timeout = Duration::from_millis(timeout_ms.into());
        // The client's timeout is how long it waits for replicas: acks=0 and 1 have nothing to do with it.
        let timeout = match acks {
            Acks::All => timeout.min(TIMEOUT_MAX),
            Acks::None | Acks::Leader => timeout.clamp(LEADER_TIMEOUT, TIMEOUT_MAX),
        };
        let deadline = Instant::now() + timeout;
        let size = partitions
            .iter()
            .map(|partition| partition.records.len())
            .sum();
        let started: Vec<Started> = partitions
            .into_iter()
            .map(|partition| self.enqueue(partition, acks, deadline, trace.clone()))
            .collect();
        if acks == Acks::None {
            return None;
        }
        let bytes = BytesInFlight::new(&self.bytes_in_flight, size);
        Some(Box::pin(finish(request_id, started, deadline, span, bytes)))
    }

    fn has_room(&self, in_flight: usize) -> bool {
        in_flight == 0
            || (in_flight < IN_FLIGHT_MAX
                && self.bytes_in_flight.load(Ordering::Relaxed) < IN_FLIGHT_BYTES_MAX)
    }

    fn answered(&mut self, _response: &v1::ProduceResponse) {}
}

/// Stage 2: waits for every partition of the request.
async fn finish(
    request_id: u64,
    started: Vec<Started>,
    deadline: Instant,
    mut span: Option<Span>,
    bytes: BytesInFlight,
) -> v1::ProduceResponse {
    let mut partitions = Vec::with_capacity(started.len());
    for one in started {
        let result = match one {
            Started::Unknown { raft_group_id } => {
                failed(raft_group_id, None, WireError::unknown_partition())
            }
            Started::Refused { replica, error } => failed(
                replica.group_id().0,
                Some(&replica),
                WireError::from(&error),
            ),
            Started::Waiting { replica, outcome } => match outcome.until(deadline).await {
                Ok(appended) => v1::PartitionProduceResult {
                    raft_group_id: replica.group_id().0,
                    base_offset: appended.base_offset.0,
                    log_append_time_ms: appended.log_append_time_ms.unwrap_or(-1),
                    log_start_offset: replica.log_start_offset().0,
                    leader: replica.leader_hint().as_ref().map(leader),
                    ..Default::default()
                },
                Err(error) => failed(
                    replica.group_id().0,
                    Some(&replica),
                    WireError::from(&error),
                ),
            },
        };
        if let Some(span) = &mut span
            && !result.error_message.is_empty()
        {
            span.error(result.error_message.clone());
        }
        partitions.push(result);
    }
    drop(bytes);
    v1::ProduceResponse {
        request_id,
        partitions,
    }
}

fn failed(
    raft_group_id: u64,
    replica: Option<&Replica>,
    error: WireError,
) -> v1::PartitionProduceResult {
    v1::PartitionProduceResult {
        raft_group_id,
        error: error.error.into(),
        error_message: error.message,
        base_offset: -1,
        log_append_time_ms: -1,
        log_start_offset: replica.map_or(-1, |replica| replica.log_start_offset().0),
        leader: error.leader,
    }
}

fn invalid_acks(
    request_id: u64,
    asked: i32,
    partitions: Vec<v1::PartitionProduce>,
) -> v1::ProduceResponse {
    let refused = |partition: v1::PartitionProduce| {
        let error = WireError {
            error: v1::PartitionError::InvalidBatch,
            message: format!("acks {asked} is not 0, 1 or -1"),
            leader: None,
        };
        failed(partition.raft_group_id, None, error)
    };
    v1::ProduceResponse {
        request_id,
        partitions: partitions.into_iter().map(refused).collect(),
    }
}
