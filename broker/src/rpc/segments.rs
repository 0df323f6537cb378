//! The gRPC service `Segments`: copies of partitions' logs for replicas on other brokers.
//!
//! Invariant: only committed entries are given out; one stream reads one file from its front to its
//! back, no faster than the other side takes it.

use std::sync::Arc;

use chronik_proto::v1;
use chronik_proto::v1::segments_server::Segments;
use chronik_storage::{Export, ManifestSegment, SegmentFile};
use chronik_types::id::{BrokerId, RaftGroupId};
use futures::Stream;
use futures::stream::{BoxStream, try_unfold};
use prometheus_client::metrics::counter::Counter;
use tonic::{Request, Response, Status};

use crate::metrics::BrokerMetrics;
use crate::replica::Replica;
use crate::replica::copy::{Offer, parts};
use crate::replicas::Replicas;

/// Small, so that the messages of clients and of Raft do not wait for long behind one.
const CHUNK_SIZE: usize = 256 * 1024;

/// Serves every replica of this broker.
#[derive(Clone)]
pub struct SegmentsService {
    replicas: Replicas,
    metrics: BrokerMetrics,
}

/// What another replica reads.
#[derive(Clone)]
enum Given {
    /// All of the log; it stays for a while.
    Copy(Arc<Offer>),
    /// Files for a rebuild; made anew for every call.
    Files(Arc<Export>, Arc<Replica>, BrokerId),
}

impl Given {
    fn export(&self) -> &Export {
        match self {
            Given::Copy(offer) => &offer.export,
            Given::Files(export, _, _) => export,
        }
    }

    fn touch(&self) {
        match self {
            Given::Copy(offer) => offer.touch(),
            Given::Files(_, replica, broker) => replica.note_rebuilding(*broker),
        }
    }
}

impl SegmentsService {
    pub fn new(replicas: Replicas, metrics: BrokerMetrics) -> SegmentsService {
        SegmentsService { replicas, metrics }
    }

    fn replica(&self, raft_group_id: u64) -> Result<Arc<Replica>, Status> {
        self.replicas
            .get(RaftGroupId(raft_group_id))
            .ok_or_else(|| Status::not_found("this broker has no replica of the partition"))
    }

    async fn given(
        replica: &Arc<Replica>,
        rebuild: Option<v1::RebuildFor>,
    ) -> Result<Given, Status> {
        let given = match rebuild {
            None => replica.offer_copy().await.map(Given::Copy),
            Some(rebuild) => {
                let broker = BrokerId(rebuild.broker_id);
                let files = replica.files_for(broker, rebuild.upto_index).await;
                files.map(|files| Given::Files(Arc::new(files), replica.clone(), broker))
            }
        };
        given.map_err(|error| Status::unavailable(error.to_string()))
    }
}

#[tonic::async_trait]
impl Segments for SegmentsService {
    type ReadStream = BoxStream<'static, Result<v1::CopyChunk, Status>>;

    async fn describe(
        &self,
        request: Request<v1::DescribeCopyRequest>,
    ) -> Result<Response<v1::CopyDescription>, Status> {
        let request = request.into_inner();
        let replica = self.replica(request.raft_group_id)?;
        let given = Self::given(&replica, request.rebuild).await?;
        let manifest = given.export().manifest();
        let ((term, index), state) = match &given {
            Given::Copy(offer) => (parts(&offer.last_log_id), offer.state.clone()),
            Given::Files(..) => {
                let last = (manifest.last_term, manifest.last_index);
                (last, bytes::Bytes::new())
            }
        };
        Ok(Response::new(v1::CopyDescription {
            last_log_id: Some(v1::RaftLogId { term, index }),
            manifest: manifest.encode(),
            state,
            is_damaged: replica.log().is_damaged(),
        }))
    }

    async fn read(
        &self,
        request: Request<v1::ReadCopyRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let file = match request.file() {
            v1::read_copy_request::File::Log => SegmentFile::Log,
            v1::read_copy_request::File::Sidecar => SegmentFile::Sidecar,
        };
        let replica = self.replica(request.raft_group_id)?;
        let given = Self::given(&replica, request.rebuild).await?;
        let segments = &given.export().manifest().segments;
        let segment = segments
            .iter()
            .position(|segment| is_asked(segment, &request))
            .ok_or_else(|| Status::failed_precondition("there is no such segment here"))?;
        Ok(Response::new(Box::pin(chunks(
            given,
            segment,
            file,
            request.position,
            self.metrics.copied_bytes_served.clone(),
        ))))
    }
}

/// Committed entries are the same everywhere, so segments of the same bounds and sizes are.
fn is_asked(segment: &ManifestSegment, request: &v1::ReadCopyRequest) -> bool {
    segment.base_offset.0 == request.base_offset
        && segment.next_offset.0 == request.next_offset
        && segment.first_index == request.first_index
        && segment.next_index == request.next_index
        && segment.log_bytes == request.log_bytes
        && segment.sidecar_bytes == request.sidecar_bytes
}

fn chunks(
    given: Given,
    segment: usize,
    file: SegmentFile,
    position: u64,
    served: Counter,
) -> impl Stream<Item = Result<v1::CopyChunk, Status>> + Send + 'static {
    try_unfold(
        (given, position, served),
        move |(given, position, served)| async move {
            given.touch();
            let reading = given.clone();
            let read = move || {
                reading
                    .export()
                    .read_chunk(segment, file, position, CHUNK_SIZE)
            };
            let data = tokio::task::spawn_blocking(read)
                .await
                .map_err(|error| Status::internal(error.to_string()))?
                .map_err(|error| Status::data_loss(error.to_string()))?;
            if data.is_empty() {
                return Ok(None);
            }
            served.inc_by(data.len() as u64);
            let next = position.saturating_add(data.len() as u64);
            Ok(Some((
                v1::CopyChunk { position, data },
                (given, next, served),
            )))
        },
    )
}
