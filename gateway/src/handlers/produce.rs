//! Produce, versions 3 to 13.
//!
//! Invariants: when `begin` returns, the request is in its place in the brokers' streams, so
//! requests of one connection reach a partition in order. Nothing is sent twice from here: a
//! second sending could overtake a later request, and clients retry by themselves.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chronik_proto::v1;
use chronik_telemetry::SpanKind;
use chronik_telemetry::trace::{Span, TraceContext, span};
use chronik_types::id::BrokerId;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::{Instant, timeout_at};

use super::resolve;
use crate::dispatch::Reply;
use crate::error::{CallError, ErrorCode, produce_call_error, produce_error};
use crate::leader_router::{Answer, BrokerLink, ProduceTraffic};
use crate::metadata_cache::Snapshot;
use crate::metrics::ErrorLabels;
use crate::protocol::Api;
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::produce_response::{
    LeaderIdAndEpoch, NodeEndpoint, PartitionProduceResponse, TopicProduceResponse,
};
use crate::protocol::produce::{PartitionProduce, ProduceRequest, TopicKey};
use crate::services::Context;
use crate::trace_header;

/// Brokers answer within the request's timeout; this much later they are given up.
const GRACE: Duration = Duration::from_millis(500);
/// From this version on answers name the new leader.
const LEADERS_FROM: i16 = 10;

/// Sends a request to the brokers; the answer comes from the future.
pub async fn begin(context: Context, request: ProduceRequest) -> BoxFuture<'static, Reply> {
    let deadline = Instant::now()
        + Duration::from_millis(u64::try_from(request.timeout_ms).unwrap_or(0))
        + GRACE;
    let acks = request.acks;
    let mut work = Work::new(context, &request).await;
    let by_broker = work.route(request);
    let mut pending = Vec::with_capacity(by_broker.len());
    for (link, partitions) in by_broker.into_values() {
        if let Some(answer) = work.send(&link, partitions, acks, deadline).await {
            pending.push(answer);
        }
    }
    if acks == 0 {
        return std::future::ready(work.reply_to_acks_0()).boxed();
    }
    work.finish(pending, deadline).boxed()
}

/// A partition of the request and what is to be said about it.
struct Slot {
    index: i32,
    raft_group_id: u64,
    response: PartitionProduceResponse,
}

struct Topic {
    key: TopicKey,
    slots: Vec<Slot>,
}

/// Partitions sent to one broker, by their places in `Work::topics`.
type Places = Vec<(usize, usize)>;
type ToBroker = (Arc<BrokerLink>, Vec<(usize, usize, v1::PartitionProduce)>);

/// One produce request on its way.
struct Work {
    context: Context,
    snapshot: Arc<Snapshot>,
    topics: Vec<Topic>,
    span: Option<Span>,
    traceparent: String,
}

impl Work {
    async fn new(context: Context, request: &ProduceRequest) -> Work {
        let services = context.services.clone();
        let mut snapshot = services.cache.load();
        if services.config.auto_create_topics_enable {
            for topic in &request.topics {
                let TopicKey::Name(name) = &topic.topic else {
                    continue;
                };
                if snapshot.image.topic_by_name(name).is_none() {
                    // A failure shows as an unknown topic below.
                    let _ = services.auto_create(name).await;
                    snapshot = services.cache.load();
                }
            }
        }
        let span = root_span(&context, request);
        let traceparent = span
            .as_ref()
            .map(|s| s.context().traceparent())
            .unwrap_or_default();
        let topics = Vec::with_capacity(request.topics.len());
        Work {
            context,
            snapshot,
            topics,
            span,
            traceparent,
        }
    }

    /// Gives every partition a slot and groups those that can be sent by leader.
    fn route(&mut self, request: ProduceRequest) -> BTreeMap<BrokerId, ToBroker> {
        let refused = refuse_whole(&request);
        let mut by_broker: BTreeMap<BrokerId, ToBroker> = BTreeMap::new();
        let mut seen = HashSet::new();
        for (topic_at, topic) in request.topics.into_iter().enumerate() {
            let mut slots = Vec::with_capacity(topic.partitions.len());
            for (at, partition) in topic.partitions.into_iter().enumerate() {
                let index = partition.index;
                let routed = match refused {
                    Some(code) => Err(code),
                    None => self.route_one(&topic.topic, partition),
                };
                let routed = routed.and_then(|(link, produce)| {
                    // Twice the same partition in one request: only one can come first.
                    let first = seen.insert(produce.raft_group_id);
                    if first {
                        Ok((link, produce))
                    } else {
                        Err(ErrorCode::InvalidRequest)
                    }
                });
                let mut slot = Slot {
                    index,
                    raft_group_id: 0,
                    response: unanswered(index),
                };
                match routed {
                    Ok((link, produce)) => {
                        slot.raft_group_id = produce.raft_group_id;
                        let entry = by_broker
                            .entry(link.broker_id)
                            .or_insert_with(|| (link, Vec::new()));
                        entry.1.push((topic_at, at, produce));
                    }
                    Err(code) => slot.response.error_code = code.code(),
                }
                slots.push(slot);
            }
            self.topics.push(Topic {
                key: topic.topic,
                slots,
            });
        }
        by_broker
    }

    fn route_one(
        &self,
        topic: &TopicKey,
        partition: PartitionProduce,
    ) -> Result<(Arc<BrokerLink>, v1::PartitionProduce), ErrorCode> {
        let records = partition.records.ok_or(ErrorCode::InvalidRecord)?;
        let topic = resolve::topic(&self.snapshot, topic)?;
        let known = resolve::partition(topic, partition.index)?;
        let router = &self.context.services.router;
        let link = router.target(known).ok_or(ErrorCode::LeaderNotAvailable)?;
        let raft_group_id = known.raft_group_id.0;
        Ok((
            link,
            v1::PartitionProduce {
                raft_group_id,
                records,
            },
        ))
    }

    /// Queues the partitions of one broker.
    async fn send(
        &mut self,
        link: &BrokerLink,
        partitions: Vec<(usize, usize, v1::PartitionProduce)>,
        acks: i16,
        deadline: Instant,
    ) -> Option<(Places, Answer<ProduceTraffic>)> {
        let places: Places = partitions
            .iter()
            .map(|(topic, at, _)| (*topic, *at))
            .collect();
        let partitions: Vec<_> = partitions
            .into_iter()
            .map(|(_, _, produce)| produce)
            .collect();
        let size = partitions.iter().map(|p| p.records.len()).sum();
        let left = deadline
            .saturating_duration_since(Instant::now())
            .saturating_sub(GRACE);
        let make = |request_id| v1::ProduceRequest {
            request_id,
            acks: i32::from(acks),
            timeout_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
            partitions,
            traceparent: self.traceparent.clone(),
        };
        // The broker may be too far behind to take it in time: then it was not sent.
        let late = CallError::Unreachable("broker (queue full)");
        let outcome = if acks == 0 {
            let sent = timeout_at(deadline, link.produce.send_only(size, make)).await;
            sent.unwrap_or(Err(late)).map(|()| None)
        } else {
            let begun = timeout_at(deadline, link.produce.begin(size, make)).await;
            begun.unwrap_or(Err(late)).map(Some)
        };
        match outcome {
            Ok(answer) => {
                if acks == 0 {
                    self.fail(&places, ErrorCode::None);
                }
                answer.map(|answer| (places, answer))
            }
            Err(error) => {
                self.fail(&places, produce_call_error(&error));
                None
            }
        }
    }

    fn fail(&mut self, places: &Places, code: ErrorCode) {
        for (topic, at) in places {
            self.topics[*topic].slots[*at].response.error_code = code.code();
        }
    }

    /// No answer; but where something went wrong the connection ends, as in Apache Kafka, so that
    /// the producer looks at the metadata again.
    fn reply_to_acks_0(self) -> Reply {
        let failed = self
            .topics
            .iter()
            .flat_map(|topic| &topic.slots)
            .any(|slot| slot.response.error_code != ErrorCode::None.code());
        if failed {
            Reply::Close("an acks=0 produce failed")
        } else {
            Reply::Nothing
        }
    }

    async fn finish(
        mut self,
        pending: Vec<(Places, Answer<ProduceTraffic>)>,
        deadline: Instant,
    ) -> Reply {
        for (places, mut answer) in pending {
            let outcome = timeout_at(deadline, answer.wait()).await;
            let outcome = outcome
                .unwrap_or_else(|_| Err(CallError::UnknownOutcome("no answer in time".to_owned())));
            match outcome {
                Ok(response) => self.take_answers(places, response),
                Err(error) => self.fail(&places, produce_call_error(&error)),
            }
        }
        self.reply()
    }

    fn take_answers(&mut self, places: Places, response: v1::ProduceResponse) {
        let mut results: BTreeMap<u64, v1::PartitionProduceResult> = response
            .partitions
            .into_iter()
            .map(|result| (result.raft_group_id, result))
            .collect();
        for (topic, at) in places {
            let slot = &mut self.topics[topic].slots[at];
            match results.remove(&slot.raft_group_id) {
                Some(result) => {
                    if let Some(leader) = &result.leader {
                        self.context
                            .services
                            .router
                            .note_leader(slot.raft_group_id, leader);
                    }
                    slot.response = answered(slot.index, result, self.context.version);
                }
                // Sent, and not mentioned in the answer.
                None => slot.response.error_code = ErrorCode::RequestTimedOut.code(),
            }
        }
    }

    fn reply(self) -> Reply {
        let Work {
            context,
            snapshot,
            topics,
            mut span,
            ..
        } = self;
        let version = context.version;
        let mut leaders = Vec::new();
        let mut failed = 0u64;
        let responses = topics
            .into_iter()
            .map(|topic| {
                let slots = topic.slots.into_iter().map(|slot| {
                    let response = slot.response;
                    if response.error_code != 0 {
                        failed = failed.saturating_add(1);
                        let error = response.error_code;
                        let errors = &context.services.metrics.produce_errors;
                        errors.get_or_create(&ErrorLabels { error }).inc();
                        leaders.push(response.current_leader.leader_id);
                    }
                    response
                });
                let partition_responses = slots.collect();
                match topic.key {
                    TopicKey::Name(name) => message!(TopicProduceResponse {
                        name: name,
                        partition_responses: partition_responses,
                    }),
                    TopicKey::Id(id) => message!(TopicProduceResponse {
                        topic_id: m::wire_uuid(id),
                        partition_responses: partition_responses,
                    }),
                }
            })
            .collect();
        let mut response = message!(m::ProduceResponse {
            responses: responses
        });
        if version >= LEADERS_FROM {
            response.node_endpoints = node_endpoints(&snapshot, leaders);
        }
        if failed > 0
            && let Some(span) = &mut span
        {
            span.error(format!("{failed} partitions failed"));
        }
        match m::encode(Api::Produce, version, context.correlation_id, &response) {
            Ok(response) => Reply::Send(response),
            Err(error) => {
                tracing::error!(%error, "a produce response cannot be encoded");
                Reply::Close("the response cannot be encoded")
            }
        }
    }
}

/// What is wrong with the request as a whole.
fn refuse_whole(request: &ProduceRequest) -> Option<ErrorCode> {
    if !(-1..=1).contains(&request.acks) {
        return Some(ErrorCode::InvalidRequiredAcks);
    }
    // Transactions are not served yet; a plain append would break their promise.
    request
        .transactional_id
        .is_some()
        .then_some(ErrorCode::UnsupportedVersion)
}

fn unanswered(index: i32) -> PartitionProduceResponse {
    message!(PartitionProduceResponse {
        index: index,
        base_offset: -1,
        log_append_time_ms: -1,
        log_start_offset: -1,
    })
}

fn answered(
    index: i32,
    result: v1::PartitionProduceResult,
    version: i16,
) -> PartitionProduceResponse {
    let error = produce_error(result.error());
    let mut response = unanswered(index);
    response.error_code = error.code();
    if error == ErrorCode::None || error == ErrorCode::DuplicateSequenceNumber {
        response.base_offset = result.base_offset;
        response.log_append_time_ms = result.log_append_time_ms;
        response.log_start_offset = result.log_start_offset;
    }
    if error.is_error() && !result.error_message.is_empty() && version >= 8 {
        response.error_message = Some(StrBytes::from(result.error_message));
    }
    if error == ErrorCode::NotLeaderOrFollower
        && version >= LEADERS_FROM
        && let Some(leader) = result.leader
    {
        response.current_leader = message!(LeaderIdAndEpoch {
            leader_id: leader.broker_id,
            leader_epoch: leader.leader_epoch,
        });
    }
    response
}

fn node_endpoints(snapshot: &Snapshot, leaders: Vec<i32>) -> Vec<NodeEndpoint> {
    resolve::nodes(snapshot, leaders.into_iter().filter(|id| *id >= 0))
        .into_iter()
        .map(|node| {
            message!(NodeEndpoint {
                node_id: node.broker_id,
                host: node.host.into(),
                port: i32::from(node.port),
                rack: node.rack.map(StrBytes::from),
            })
        })
        .collect()
}

/// The root span of a sampled request: a child of what the producer sent along, where that is
/// honoured, else a new trace.
fn root_span(context: &Context, request: &ProduceRequest) -> Option<Span> {
    const NAME: &str = Api::Produce.span_name();
    let services = &context.services;
    let honour = services.sampler.is_enabled() || services.config.honour_client_traceparent;
    if !honour {
        return None;
    }
    let records = || request.topics.iter().flat_map(|topic| &topic.partitions);
    let first: Option<&Bytes> = records().find_map(|partition| partition.records.as_ref());
    let parent = first
        .and_then(trace_header::traceparent_of)
        .and_then(TraceContext::parse);
    let mut span = match parent {
        Some(parent) => span(Some(&parent), NAME, SpanKind::Server),
        None => services.sampler.root(NAME),
    }?;
    let bytes = records()
        .filter_map(|p| p.records.as_ref())
        .map(Bytes::len)
        .sum::<usize>();
    span.attribute("client_id", context.client_id.clone());
    span.attribute("acks", i64::from(request.acks));
    span.attribute(
        "partitions",
        i64::try_from(records().count()).unwrap_or(i64::MAX),
    );
    span.attribute("bytes", i64::try_from(bytes).unwrap_or(i64::MAX));
    if let Some(TopicKey::Name(name)) = request.topics.first().map(|topic| &topic.topic) {
        span.attribute("topic", name.to_string());
    }
    Some(span)
}
