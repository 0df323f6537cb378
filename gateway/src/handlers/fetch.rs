//! Fetch, versions 4 to 18, always without a fetch session: session id 0 tells the client to send
//! full requests, which Kafka allows.
//!
//! Invariants: one long poll per leader; the answer goes out when the first of them has enough or
//! the time is up; every partition that was asked for is in the answer, in the order asked; its
//! records never exceed the request's limit, but for the first batch (KIP-74).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::PartitionError;
use chronik_telemetry::trace::Span;
use chronik_types::cluster_image::Topic;
use chronik_types::id::BrokerId;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, timeout_at};

use super::resolve;
use crate::error::{CallError, ErrorCode, read_error};
use crate::leader_router::{Answer, BrokerLink, FetchTraffic};
use crate::metadata_cache::Snapshot;
use crate::metrics::ErrorLabels;
use crate::protocol::Api;
use crate::protocol::fetch::{FetchResponse, PartitionFetched, TopicFetched};
use crate::protocol::messages::{self as m, fetch_request};
use crate::protocol::produce::TopicKey;
use crate::services::{Context, Services};

/// Brokers answer when the wait is over; this much later they are given up.
const GRACE: Duration = Duration::from_secs(1);
/// From this version on topics come as ids.
const TOPIC_IDS_FROM: i16 = 13;
const READ_COMMITTED: i8 = 1;
/// A session epoch that asks for no session.
const FINAL_EPOCH: i32 = -1;

pub async fn handle(context: Context, request: m::FetchRequest) -> FetchResponse {
    if let Some(error_code) = refuse_session(&request, context.version) {
        return FetchResponse {
            error_code: error_code.code(),
            ..FetchResponse::default()
        };
    }
    let services = context.services.clone();
    let snapshot = services.cache.load();
    let mut work = Work::new(&services, snapshot, &context, request);
    // An error is news: it is told at once.
    let wait = if work.has_errors() {
        Duration::ZERO
    } else {
        work.max_wait
    };
    let deadline = Instant::now() + wait;
    work.round(wait).await;
    if work.find_moved() {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = if work.has_answers() {
            Duration::ZERO
        } else {
            left
        };
        work.round(wait).await;
    }
    work.response()
}

/// Sessions are never given out, so none can be continued.
fn refuse_session(request: &m::FetchRequest, version: i16) -> Option<ErrorCode> {
    if version < 7 {
        return None;
    }
    match (request.session_id, request.session_epoch) {
        (0, 0 | FINAL_EPOCH) => None,
        (0, _) => Some(ErrorCode::InvalidFetchSessionEpoch),
        // A client that closes a session it thinks it has; the answer is a full one.
        (_, FINAL_EPOCH) => None,
        _ => Some(ErrorCode::FetchSessionIdNotFound),
    }
}

/// A partition that was asked for.
struct Wanted {
    topic: Arc<Topic>,
    ask: v1::PartitionFetch,
    /// Its place in the answer.
    place: (usize, usize),
    asked: Option<BrokerId>,
    /// Still to be asked in this round.
    open: bool,
}

struct Work<'a> {
    services: &'a Services,
    snapshot: Arc<Snapshot>,
    version: i16,
    max_wait: Duration,
    min_bytes: u32,
    max_bytes: usize,
    read_committed: bool,
    topics: Vec<TopicFetched>,
    wanted: Vec<Wanted>,
    /// Place in `wanted` by Raft group.
    by_group: HashMap<u64, usize>,
    span: Option<Span>,
    traceparent: String,
}

impl<'a> Work<'a> {
    fn new(
        services: &'a Services,
        snapshot: Arc<Snapshot>,
        context: &Context,
        request: m::FetchRequest,
    ) -> Self {
        let limit = services.config.limits.fetch_max_bytes;
        let positive = |number: i32| usize::try_from(number).unwrap_or(0);
        let span = root_span(services, context, &request);
        let traceparent = span
            .as_ref()
            .map(|s| s.context().traceparent())
            .unwrap_or_default();
        let mut work = Work {
            services,
            snapshot,
            version: context.version,
            max_wait: Duration::from_millis(u64::try_from(request.max_wait_ms).unwrap_or(0)),
            min_bytes: u32::try_from(request.min_bytes).unwrap_or(0),
            max_bytes: positive(request.max_bytes).min(limit),
            read_committed: request.isolation_level == READ_COMMITTED,
            topics: Vec::with_capacity(request.topics.len()),
            wanted: Vec::new(),
            by_group: HashMap::new(),
            span,
            traceparent,
        };
        for topic in request.topics {
            work.add_topic(topic);
        }
        work
    }

    fn add_topic(&mut self, topic: fetch_request::FetchTopic) {
        let key = if self.version >= TOPIC_IDS_FROM {
            TopicKey::Id(m::uuid(topic.topic_id))
        } else {
            TopicKey::Name(topic.topic)
        };
        let known = resolve::topic(&self.snapshot, &key).cloned();
        let topic_at = self.topics.len();
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for partition in topic.partitions {
            let index = partition.partition;
            let wanted = known.clone().and_then(|topic| self.want(topic, &partition));
            let mut answer = PartitionFetched::failed(index, ErrorCode::None.code());
            answer.read_committed = self.read_committed;
            match wanted {
                Ok(mut wanted) => {
                    wanted.place = (topic_at, partitions.len());
                    self.by_group
                        .insert(wanted.ask.raft_group_id, self.wanted.len());
                    self.wanted.push(wanted);
                }
                Err(code) => answer.error_code = code.code(),
            }
            partitions.push(answer);
        }
        let (name, topic_id) = match key {
            TopicKey::Name(name) => (name, Default::default()),
            TopicKey::Id(id) => (Default::default(), id),
        };
        self.topics.push(TopicFetched {
            name,
            topic_id,
            partitions,
        });
    }

    fn want(
        &self,
        topic: Arc<Topic>,
        partition: &fetch_request::FetchPartition,
    ) -> Result<Wanted, ErrorCode> {
        let raft_group_id = resolve::partition(&topic, partition.partition)?
            .raft_group_id
            .0;
        if self.by_group.contains_key(&raft_group_id) {
            return Err(ErrorCode::InvalidRequest);
        }
        let max_bytes = usize::try_from(partition.partition_max_bytes).unwrap_or(0);
        let max_bytes = max_bytes.min(self.max_bytes);
        let ask = v1::PartitionFetch {
            raft_group_id,
            fetch_offset: partition.fetch_offset,
            max_bytes: u32::try_from(max_bytes).unwrap_or(u32::MAX),
            current_leader_epoch: partition.current_leader_epoch,
            last_fetched_epoch: partition.last_fetched_epoch,
        };
        Ok(Wanted {
            topic,
            ask,
            place: (0, 0),
            asked: None,
            open: true,
        })
    }

    fn has_errors(&self) -> bool {
        self.topics
            .iter()
            .flat_map(|topic| &topic.partitions)
            .any(|p| p.error_code != 0)
    }

    fn has_answers(&self) -> bool {
        self.topics
            .iter()
            .flat_map(|topic| &topic.partitions)
            .any(|p| p.error_code == 0 && !p.records.is_empty())
    }

    /// Asks the leaders of all open partitions.
    async fn round(&mut self, wait: Duration) {
        let mut by_broker: BTreeMap<BrokerId, (Arc<BrokerLink>, Vec<usize>)> = BTreeMap::new();
        for (at, wanted) in self.wanted.iter_mut().enumerate().filter(|(_, w)| w.open) {
            wanted.open = false;
            let answer = &mut self.topics[wanted.place.0].partitions[wanted.place.1];
            let index = answer.index;
            let target = resolve::partition(&wanted.topic, index)
                .ok()
                .and_then(|partition| self.services.router.target(partition));
            let Some(link) = target else {
                answer.error_code = ErrorCode::NotLeaderOrFollower.code();
                continue;
            };
            wanted.asked = Some(link.broker_id);
            by_broker
                .entry(link.broker_id)
                .or_insert_with(|| (link, Vec::new()))
                .1
                .push(at);
        }
        // A partition without a leader is news as well.
        let wait = if self.has_errors() {
            Duration::ZERO
        } else {
            wait
        };
        let deadline = Instant::now() + wait + GRACE;
        let mut pending = Vec::with_capacity(by_broker.len());
        for (link, places) in by_broker.into_values() {
            match timeout_at(deadline, self.begin(&link, &places, wait)).await {
                Ok(Ok(answer)) => pending.push((link, places, answer)),
                Ok(Err(_)) | Err(_) => self.fail(&places),
            }
        }
        self.collect(pending, deadline).await;
    }

    async fn begin(
        &self,
        link: &BrokerLink,
        places: &[usize],
        wait: Duration,
    ) -> Result<Answer<FetchTraffic>, CallError> {
        let start = v1::FetchStart {
            max_wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            min_bytes: self.min_bytes,
            max_bytes: u32::try_from(self.max_bytes).unwrap_or(u32::MAX),
            read_committed: self.read_committed,
            partitions: places.iter().map(|at| self.wanted[*at].ask).collect(),
            traceparent: self.traceparent.clone(),
        };
        let size = places.len().saturating_mul(size_of::<v1::PartitionFetch>());
        link.fetch
            .begin(size, |request_id| v1::FetchRequest {
                request_id,
                kind: Some(v1::fetch_request::Kind::Start(start)),
            })
            .await
    }

    /// Waits for the first broker, ends the long polls at the others, and takes what all have.
    async fn collect(
        &mut self,
        pending: Vec<(Arc<BrokerLink>, Vec<usize>, Answer<FetchTraffic>)>,
        deadline: Instant,
    ) {
        let polls: Vec<(Arc<BrokerLink>, u64)> = pending
            .iter()
            .map(|(link, _, answer)| (link.clone(), answer.request_id()))
            .collect();
        let mut answers: FuturesUnordered<_> = pending
            .into_iter()
            .enumerate()
            .map(|(number, (_, places, mut answer))| async move {
                let outcome = timeout_at(deadline, answer.wait()).await;
                (number, places, outcome.ok().and_then(Result::ok))
            })
            .collect();
        let mut told = false;
        while let Some((number, places, outcome)) = answers.next().await {
            // Whatever an answer does not mention stays failed.
            self.fail(&places);
            if let Some(response) = outcome {
                self.take_answers(response);
            }
            if !told {
                told = true;
                for (_, (link, id)) in polls.iter().enumerate().filter(|(n, _)| *n != number) {
                    link.fetch.finish(*id);
                }
            }
        }
    }

    fn fail(&mut self, places: &[usize]) {
        for at in places {
            let (topic, partition) = self.wanted[*at].place;
            let answer = &mut self.topics[topic].partitions[partition];
            answer.error_code = ErrorCode::NotLeaderOrFollower.code();
        }
    }

    fn take_answers(&mut self, response: v1::FetchResponse) {
        for result in response.partitions {
            let group = result.raft_group_id;
            if let Some(leader) = &result.leader {
                self.services.router.note_leader(group, leader);
            }
            let Some(wanted) = self
                .by_group
                .get(&group)
                .and_then(|at| self.wanted.get(*at))
            else {
                continue;
            };
            let (topic, partition) = wanted.place;
            let answer = &mut self.topics[topic].partitions[partition];
            *answer = answered(answer.index, self.read_committed, result);
        }
    }

    /// Reopens partitions whose leader turned out to be another broker than the one asked.
    fn find_moved(&mut self) -> bool {
        let mut moved = false;
        for wanted in &mut self.wanted {
            let answer = &mut self.topics[wanted.place.0].partitions[wanted.place.1];
            if answer.error_code != ErrorCode::NotLeaderOrFollower.code() {
                continue;
            }
            let target = resolve::partition(&wanted.topic, answer.index)
                .ok()
                .and_then(|partition| self.services.router.target(partition));
            if target.is_some_and(|link| Some(link.broker_id) != wanted.asked) {
                let mut again = PartitionFetched::failed(answer.index, ErrorCode::None.code());
                again.read_committed = self.read_committed;
                *answer = again;
                wanted.open = true;
                moved = true;
            }
        }
        moved
    }

    fn response(mut self) -> FetchResponse {
        let mut left = self.max_bytes;
        let mut leaders = Vec::new();
        let (mut bytes, mut failed) = (0usize, 0u64);
        for partition in self
            .topics
            .iter_mut()
            .flat_map(|topic| &mut topic.partitions)
        {
            let size = partition.records_size();
            // Each broker kept to the limit; together they may exceed it. What is left out comes
            // again with the next fetch.
            if size > left && bytes > 0 {
                partition.records.clear();
            } else {
                left = left.saturating_sub(size);
                bytes = bytes.saturating_add(size);
            }
            if partition.error_code != 0 {
                failed = failed.saturating_add(1);
                let error = partition.error_code;
                self.services
                    .metrics
                    .fetch_errors
                    .get_or_create(&ErrorLabels { error })
                    .inc();
            }
            leaders.extend(partition.current_leader.map(|(broker_id, _)| broker_id));
        }
        if let Some(span) = &mut self.span {
            span.attribute("bytes", i64::try_from(bytes).unwrap_or(i64::MAX));
            if failed > 0 {
                span.error(format!("{failed} partitions failed"));
            }
        }
        let node_endpoints = resolve::nodes(&self.snapshot, leaders.into_iter());
        FetchResponse {
            error_code: 0,
            session_id: 0,
            topics: self.topics,
            node_endpoints,
        }
    }
}

fn answered(
    index: i32,
    read_committed: bool,
    result: v1::PartitionFetchResult,
) -> PartitionFetched {
    let error = result.error();
    let tells_leader = matches!(
        error,
        PartitionError::NotLeader | PartitionError::FencedLeaderEpoch
    );
    PartitionFetched {
        index,
        error_code: read_error(error).code(),
        high_watermark: result.high_watermark,
        last_stable_offset: result.last_stable_offset,
        log_start_offset: result.log_start_offset,
        diverging_epoch: result
            .diverging_epoch
            .map(|end| (end.leader_epoch, end.end_offset)),
        current_leader: result
            .leader
            .filter(|_| tells_leader)
            .map(|leader| (leader.broker_id, leader.leader_epoch)),
        read_committed,
        records: result.records,
    }
}

fn root_span(services: &Services, context: &Context, request: &m::FetchRequest) -> Option<Span> {
    let mut span = services.sampler.root(Api::Fetch.span_name())?;
    let partitions = request
        .topics
        .iter()
        .map(|topic| topic.partitions.len())
        .sum::<usize>();
    span.attribute("client_id", context.client_id.clone());
    span.attribute("partitions", i64::try_from(partitions).unwrap_or(i64::MAX));
    Some(span)
}
