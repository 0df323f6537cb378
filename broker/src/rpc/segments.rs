//! The gRPC service `Segments`: copies of partitions' logs for replicas on other brokers.
//!
//! Invariant: only committed entries are given out; one stream reads one file from its front to its
//! back, no faster than the other side takes it.

use std::sync::Arc;

use chronik_proto::v1;
use chronik_proto::v1::segments_server::Segments;
use chronik_storage::{ManifestSegment, SegmentFile};
use chronik_types::id::RaftGroupId;
use futures::Stream;
use futures::stream::{BoxStream, try_unfold};
use tonic::{Request, Response, Status};

use crate::replica::copy::{Offer, parts};
use crate::replicas::Replicas;

const CHUNK_SIZE: usize = 1024 * 1024;

/// Serves every replica of this broker.
#[derive(Clone)]
pub struct SegmentsService {
    replicas: Replicas,
}

impl SegmentsService {
    pub fn new(replicas: Replicas) -> SegmentsService {
        SegmentsService { replicas }
    }

    async fn offer(&self, raft_group_id: u64) -> Result<Arc<Offer>, Status> {
        let replica = self
            .replicas
            .get(RaftGroupId(raft_group_id))
            .ok_or_else(|| Status::not_found("this broker has no replica of the partition"))?;
        let offer = replica.offer_copy().await;
        offer.map_err(|error| Status::unavailable(error.to_string()))
    }
}

#[tonic::async_trait]
impl Segments for SegmentsService {
    type ReadStream = BoxStream<'static, Result<v1::CopyChunk, Status>>;

    async fn describe(
        &self,
        request: Request<v1::DescribeCopyRequest>,
    ) -> Result<Response<v1::CopyDescription>, Status> {
        let offer = self.offer(request.into_inner().raft_group_id).await?;
        let (term, index) = parts(&offer.last_log_id);
        Ok(Response::new(v1::CopyDescription {
            last_log_id: Some(v1::RaftLogId { term, index }),
            manifest: offer.export.manifest().encode(),
            state: offer.state.clone(),
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
        let offer = self.offer(request.raft_group_id).await?;
        let segments = &offer.export.manifest().segments;
        let segment = segments
            .iter()
            .position(|segment| is_asked(segment, &request))
            .ok_or_else(|| Status::failed_precondition("there is no such segment here"))?;
        Ok(Response::new(Box::pin(chunks(
            offer,
            segment,
            file,
            request.position,
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
    offer: Arc<Offer>,
    segment: usize,
    file: SegmentFile,
    position: u64,
) -> impl Stream<Item = Result<v1::CopyChunk, Status>> + Send + 'static {
    try_unfold((offer, position), move |(offer, position)| async move {
        offer.touch();
        let reading = offer.clone();
        let read = move || {
            reading
                .export
                .read_chunk(segment, file, position, CHUNK_SIZE)
        };
        let data = tokio::task::spawn_blocking(read)
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::data_loss(error.to_string()))?;
        if data.is_empty() {
            return Ok(None);
        }
        let next = position.saturating_add(data.len() as u64);
        Ok(Some((v1::CopyChunk { position, data }, (offer, next))))
    })
}
