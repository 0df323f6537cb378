//! Another broker that has the segments of a partition.
//!
//! Invariant: what a source sends is only ever bytes at a position; whether they are right is found
//! by the check of the whole segment.

use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::segments_client::SegmentsClient;
use chronik_proto::{
    HTTP2_CONNECTION_WINDOW, HTTP2_FRAME_SIZE, HTTP2_STREAM_WINDOW, MESSAGE_SIZE_MAX,
};
use chronik_storage::{LogManifest, ManifestSegment, SegmentFile, StorageError};
use chronik_types::id::{BrokerId, RaftGroupId};
use tokio::time::{error::Elapsed, timeout};
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::replica::codec;
use crate::replica::raft_config::LogId;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The source may have to write what it has in memory to segments first.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(60);
/// A stream that gives nothing for so long is given up.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a source gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("broker {0} has no known address")]
    NoAddress(BrokerId),
    #[error("broker {broker} cannot be reached: {source}")]
    Connect {
        broker: BrokerId,
        source: tonic::transport::Error,
    },
    #[error("broker {broker} answered: {}", .status.message())]
    Status {
        broker: BrokerId,
        status: Box<tonic::Status>,
    },
    #[error("broker {0} gave no answer in time")]
    TimedOut(BrokerId),
    #[error("broker {broker} sent something that makes no sense: {what}")]
    Invalid { broker: BrokerId, what: String },
}

/// The log of a partition as its leader describes it.
pub struct Description {
    pub last_log_id: LogId,
    pub manifest: LogManifest,
    /// The replica's state as of the last entry.
    pub state: bytes::Bytes,
    /// The other replica has damaged files itself.
    pub is_damaged: bool,
}

/// A connection of its own, so that bulk never stands before Raft's messages.
#[derive(Clone)]
pub struct Source {
    pub broker: BrokerId,
    group: RaftGroupId,
    client: SegmentsClient<Channel>,
    /// Only files are wanted.
    rebuild: Option<v1::RebuildFor>,
}

impl Source {
    /// Connects when it is first used.
    pub fn new(
        broker: BrokerId,
        group: RaftGroupId,
        address: Option<&str>,
    ) -> Result<Source, SourceError> {
        let address = address.ok_or(SourceError::NoAddress(broker))?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|source| SourceError::Connect { broker, source })?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(HTTP2_STREAM_WINDOW)
            .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
            .max_frame_size(HTTP2_FRAME_SIZE);
        let client = SegmentsClient::new(endpoint.connect_lazy())
            .max_decoding_message_size(MESSAGE_SIZE_MAX)
            .max_encoding_message_size(MESSAGE_SIZE_MAX);
        Ok(Source {
            broker,
            group,
            client,
            rebuild: None,
        })
    }

    /// The same, for files instead of the whole log with its state.
    pub fn rebuilding(self, rebuild: v1::RebuildFor) -> Source {
        let rebuild = Some(rebuild);
        Source { rebuild, ..self }
    }

    pub fn group(&self) -> RaftGroupId {
        self.group
    }

    fn status(&self, status: tonic::Status) -> SourceError {
        SourceError::Status {
            broker: self.broker,
            status: Box::new(status),
        }
    }

    fn timed_out(&self, _: Elapsed) -> SourceError {
        SourceError::TimedOut(self.broker)
    }

    fn invalid(&self, what: impl Into<String>) -> SourceError {
        SourceError::Invalid {
            broker: self.broker,
            what: what.into(),
        }
    }

    /// What a copy from there consists of.
    pub async fn describe(&self) -> Result<Description, SourceError> {
        let request = v1::DescribeCopyRequest {
            raft_group_id: self.group.0,
            rebuild: self.rebuild,
        };
        let mut client = self.client.clone();
        let described = timeout(DESCRIBE_TIMEOUT, client.describe(request))
            .await
            .map_err(|elapsed| self.timed_out(elapsed))?
            .map_err(|status| self.status(status))?
            .into_inner();
        let last = described
            .last_log_id
            .ok_or_else(|| self.invalid("no last log id"))?;
        let manifest = LogManifest::decode(&described.manifest)
            .map_err(|error: StorageError| self.invalid(error.to_string()))?;
        if (manifest.last_term, manifest.last_index) != (last.term, last.index) {
            return Err(self.invalid("its manifest ends elsewhere"));
        }
        Ok(Description {
            last_log_id: codec::log_id(last.term, last.index),
            manifest,
            state: described.state,
            is_damaged: described.is_damaged,
        })
    }

    /// The chunks of a file from a position on.
    pub async fn read(
        &self,
        segment: &ManifestSegment,
        file: SegmentFile,
        position: u64,
    ) -> Result<Chunks, SourceError> {
        let request = v1::ReadCopyRequest {
            raft_group_id: self.group.0,
            base_offset: segment.base_offset.0,
            next_offset: segment.next_offset.0,
            first_index: segment.first_index,
            next_index: segment.next_index,
            log_bytes: segment.log_bytes,
            sidecar_bytes: segment.sidecar_bytes,
            file: match file {
                SegmentFile::Log => v1::read_copy_request::File::Log.into(),
                SegmentFile::Sidecar => v1::read_copy_request::File::Sidecar.into(),
            },
            position,
            rebuild: self.rebuild,
        };
        let mut client = self.client.clone();
        let stream = timeout(DESCRIBE_TIMEOUT, client.read(request))
            .await
            .map_err(|elapsed| self.timed_out(elapsed))?
            .map_err(|status| self.status(status))?
            .into_inner();
        Ok(Chunks {
            source: self.clone(),
            stream,
            position,
        })
    }
}

/// One file as it comes.
pub struct Chunks {
    source: Source,
    stream: Streaming<v1::CopyChunk>,
    position: u64,
}

impl Chunks {
    /// The next bytes and where they belong; None at the end.
    pub async fn next(&mut self) -> Result<Option<(u64, bytes::Bytes)>, SourceError> {
        let source = &self.source;
        let chunk = timeout(CHUNK_TIMEOUT, self.stream.message())
            .await
            .map_err(|elapsed| source.timed_out(elapsed))?
            .map_err(|status| source.status(status))?;
        let Some(chunk) = chunk else { return Ok(None) };
        if chunk.position != self.position || chunk.data.is_empty() {
            return Err(source.invalid("a chunk is out of place"));
        }
        self.position = chunk.position.saturating_add(chunk.data.len() as u64);
        Ok(Some((chunk.position, chunk.data)))
    }
}
