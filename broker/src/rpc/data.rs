//! The gRPC service `Data`: records of partitions, for gateways.
//!
//! Invariant: requests of one produce stream are queued at their partitions in the order in which
//! they came; what may be in flight per stream is bounded, and so is how long it may be.

mod fetch;
mod produce;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::data_server::Data;
use chronik_storage::Storage;
use chronik_telemetry::rpc::server_span;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use futures::Stream;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use super::error::{WireError, leader};
use crate::replica::{ReadError, Replica};
use crate::replicas::Replicas;

/// How DeleteRecords names the high watermark (KIP-107).
const HIGH_WATERMARK: i64 = -1;
/// Longest that a DeleteRecords may wait for its commit; below the gateways' own limit of a call.
const DELETE_TIMEOUT_MAX: Duration = Duration::from_secs(9);

/// Serves every replica of this broker.
#[derive(Clone)]
pub struct DataService {
    replicas: Replicas,
    storage: Storage,
    /// Where the storage is, for people.
    folder: PathBuf,
}

impl DataService {
    pub fn new(replicas: Replicas, storage: Storage, folder: PathBuf) -> DataService {
        DataService {
            replicas,
            storage,
            folder,
        }
    }

    fn describe_log(group: RaftGroupId, replica: &Replica) -> v1::LogDescription {
        let behind = replica.high_watermark().0 - replica.log().log_end_offset().0;
        v1::LogDescription {
            raft_group_id: group.0,
            size_bytes: replica.log().size_bytes(),
            offset_lag: u64::try_from(behind).unwrap_or(0),
        }
    }

    async fn list_offset(&self, asked: v1::PartitionListOffsets) -> v1::PartitionListOffsetsResult {
        let mut result = v1::PartitionListOffsetsResult {
            raft_group_id: asked.raft_group_id,
            offset: -1,
            timestamp: -1,
            leader_epoch: -1,
            ..Default::default()
        };
        let epoch = LeaderEpoch(asked.current_leader_epoch);
        let failed = match self.replicas.get(RaftGroupId(asked.raft_group_id)) {
            None => Some(WireError::unknown_partition()),
            Some(replica) => match replica.list_offset(asked.timestamp, epoch).await {
                Ok(found) => {
                    if let Some(found) = found {
                        result.offset = found.offset.0;
                        result.timestamp = found.timestamp;
                        result.leader_epoch = found.leader_epoch.0;
                    }
                    result.leader = replica.leader_hint().as_ref().map(leader);
                    None
                }
                Err(error) => {
                    if matches!(error, ReadError::NotLeader { .. }) {
                        self.replicas.miss_leader(replica.group_id());
                    }
                    Some(WireError::from(&error))
                }
            },
        };
        if let Some(failed) = failed {
            result.error = failed.error.into();
            result.error_message = failed.message;
            result.leader = failed.leader;
        }
        result
    }

    fn epoch_end(&self, asked: v1::PartitionLeaderEpoch) -> v1::PartitionEpochEndOffset {
        let mut result = v1::PartitionEpochEndOffset {
            raft_group_id: asked.raft_group_id,
            end: Some(v1::EpochEndOffset {
                leader_epoch: -1,
                end_offset: -1,
            }),
            ..Default::default()
        };
        let current = LeaderEpoch(asked.current_leader_epoch);
        let failed = match self.replicas.get(RaftGroupId(asked.raft_group_id)) {
            None => Some(WireError::unknown_partition()),
            Some(replica) => {
                match replica.epoch_end_offset(current, LeaderEpoch(asked.leader_epoch)) {
                    Ok(Some(end)) => {
                        result.end = Some(fetch::epoch_end(&end));
                        None
                    }
                    Ok(None) => None,
                    Err(error) => Some(WireError::from(&error)),
                }
            }
        };
        if let Some(failed) = failed {
            result.error = failed.error.into();
            result.error_message = failed.message;
        }
        result
    }

    async fn delete_records(
        &self,
        asked: v1::PartitionDeleteRecords,
        deadline: Instant,
    ) -> v1::PartitionDeleteRecordsResult {
        let mut result = v1::PartitionDeleteRecordsResult {
            raft_group_id: asked.raft_group_id,
            log_start_offset: -1,
            ..Default::default()
        };
        let before = (asked.before_offset != HIGH_WATERMARK).then_some(Offset(asked.before_offset));
        let failed = match self.replicas.get(RaftGroupId(asked.raft_group_id)) {
            None => Some(WireError::unknown_partition()),
            Some(replica) => match replica.raise_log_start(before, deadline).await {
                Ok(log_start_offset) => {
                    result.log_start_offset = log_start_offset.0;
                    None
                }
                Err(error) => Some(WireError::from(&error)),
            },
        };
        if let Some(failed) = failed {
            result.error = failed.error.into();
            result.error_message = failed.message;
            result.leader = failed.leader;
        }
        result
    }
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Data for DataService {
    type ProduceStream = ResponseStream<v1::ProduceResponse>;
    type FetchStream = ResponseStream<v1::FetchResponse>;

    async fn produce(
        &self,
        request: Request<Streaming<v1::ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        let session = produce::ProduceSession::new(self.replicas.clone());
        Ok(Response::new(Box::pin(Exchange::new(
            request.into_inner(),
            session,
        ))))
    }

    async fn fetch(
        &self,
        request: Request<Streaming<v1::FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let session = fetch::FetchSession::new(self.replicas.clone());
        Ok(Response::new(Box::pin(Exchange::new(
            request.into_inner(),
            session,
        ))))
    }

    async fn list_offsets(
        &self,
        mut request: Request<v1::ListOffsetsRequest>,
    ) -> Result<Response<v1::ListOffsetsResponse>, Status> {
        let _span = server_span(&mut request, "broker.list_offsets");
        let asked = request.into_inner().partitions;
        let partitions = join_all(asked.into_iter().map(|one| self.list_offset(one))).await;
        Ok(Response::new(v1::ListOffsetsResponse { partitions }))
    }

    async fn offset_for_leader_epoch(
        &self,
        mut request: Request<v1::OffsetForLeaderEpochRequest>,
    ) -> Result<Response<v1::OffsetForLeaderEpochResponse>, Status> {
        let _span = server_span(&mut request, "broker.offset_for_leader_epoch");
        let asked = request.into_inner().partitions;
        let partitions = asked.into_iter().map(|one| self.epoch_end(one)).collect();
        Ok(Response::new(v1::OffsetForLeaderEpochResponse {
            partitions,
        }))
    }

    async fn delete_records(
        &self,
        mut request: Request<v1::DeleteRecordsRequest>,
    ) -> Result<Response<v1::DeleteRecordsResponse>, Status> {
        let _span = server_span(&mut request, "broker.delete_records");
        let request = request.into_inner();
        let limit = Duration::from_millis(u64::from(request.timeout_ms)).min(DELETE_TIMEOUT_MAX);
        let deadline = Instant::now() + limit;
        let asked = request.partitions.into_iter();
        let partitions = join_all(asked.map(|one| self.delete_records(one, deadline))).await;
        Ok(Response::new(v1::DeleteRecordsResponse { partitions }))
    }

    async fn describe_logs(
        &self,
        mut request: Request<v1::DescribeLogsRequest>,
    ) -> Result<Response<v1::DescribeLogsResponse>, Status> {
        let _span = server_span(&mut request, "broker.describe_logs");
        let stats = self.storage.stats();
        let all = self.replicas.all();
        let logs = all
            .iter()
            .map(|(group, replica)| Self::describe_log(*group, replica));
        Ok(Response::new(v1::DescribeLogsResponse {
            folder: self.folder.display().to_string(),
            total_bytes: stats.total_bytes,
            available_bytes: stats.available_bytes,
            logs: logs.collect(),
        }))
    }
}

/// How one side of a stream turns requests into responses.
pub trait Session: Send + 'static {
    type Request: Send;
    type Response: Send;
    type Answer: Future<Output = Self::Response> + Send;

    /// Takes a request, in order. None: it has no response.
    fn start(&mut self, request: Self::Request) -> Option<Self::Answer>;
    /// Whether another request may be taken while `in_flight` are unanswered.
    fn has_room(&self, in_flight: usize) -> bool;
    /// A request was answered.
    fn answered(&mut self, response: &Self::Response);
}

/// Requests taken before responses and other streams get their turn.
const REQUESTS_PER_POLL: usize = 64;

/// A bidirectional stream without a task of its own: polling for responses takes requests, starts
/// them in order, and drives their answers. All that is ready goes out together.
struct Exchange<S: Session, I> {
    incoming: I,
    session: S,
    in_flight: FuturesUnordered<S::Answer>,
    /// The gateway sends no more requests.
    ended: bool,
}

impl<S: Session, I> Exchange<S, I> {
    fn new(incoming: I, session: S) -> Self {
        Exchange {
            incoming,
            session,
            in_flight: FuturesUnordered::new(),
            ended: false,
        }
    }
}

// Neither half is ever pinned by structure: the incoming stream is `Unpin`, and answers are pinned
// inside `FuturesUnordered`.
impl<S: Session, I> Unpin for Exchange<S, I> {}

impl<S, I> Stream for Exchange<S, I>
where
    S: Session,
    I: Stream<Item = Result<S::Request, Status>> + Unpin,
{
    type Item = Result<S::Response, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let mut taken = 0;
        while !this.ended && this.session.has_room(this.in_flight.len()) {
            if taken == REQUESTS_PER_POLL {
                context.waker().wake_by_ref();
                break;
            }
            match Pin::new(&mut this.incoming).poll_next(context) {
                Poll::Ready(Some(Ok(request))) => {
                    taken += 1;
                    this.in_flight.extend(this.session.start(request));
                }
                Poll::Ready(Some(Err(status))) => {
                    tracing::debug!(%status, "a gateway's stream broke off");
                    this.ended = true;
                }
                Poll::Ready(None) => this.ended = true,
                Poll::Pending => break,
            }
        }
        match Pin::new(&mut this.in_flight).poll_next(context) {
            Poll::Ready(Some(response)) => {
                this.session.answered(&response);
                Poll::Ready(Some(Ok(response)))
            }
            Poll::Ready(None) if this.ended => Poll::Ready(None),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}
