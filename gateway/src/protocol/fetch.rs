//! The Fetch response, by hand, for versions 4 to 18: pieces of header with the records between
//! them, written to the socket by one vectored write.
//!
//! Invariant: records of more than `COPY_MAX` bytes are never copied.

use bytes::{BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::frame::{Response, begin_response, set_size};
use super::messages::StrBytes;
use super::versions::Api;
use super::wire::{put_length, put_no_tagged_fields, put_nullable_string, put_string, put_uvarint};

/// Below this size a copy costs less than one more piece in the vectored write.
const COPY_MAX: usize = 2048;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FetchResponse {
    pub error_code: i16,
    pub session_id: i32,
    pub topics: Vec<TopicFetched>,
    /// Where the leaders named in the partitions can be reached (version 16 and later).
    pub node_endpoints: Vec<NodeEndpoint>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TopicFetched {
    /// Used up to version 12.
    pub name: StrBytes,
    /// Used from version 13 on.
    pub topic_id: Uuid,
    pub partitions: Vec<PartitionFetched>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionFetched {
    pub index: i32,
    pub error_code: i16,
    pub high_watermark: i64,
    pub last_stable_offset: i64,
    pub log_start_offset: i64,
    /// Leader epoch and end offset where the client's log went another way (version 12).
    pub diverging_epoch: Option<(i32, i64)>,
    /// Broker id and leader epoch (version 12).
    pub current_leader: Option<(i32, i32)>,
    /// Whether to tell of aborted transactions (there are none yet) rather than of nothing.
    pub read_committed: bool,
    /// Pieces of one byte string: whole record batches.
    pub records: Vec<Bytes>,
}

impl PartitionFetched {
    /// A partition about which nothing is known but an error.
    pub fn failed(index: i32, error_code: i16) -> Self {
        Self {
            index,
            error_code,
            high_watermark: -1,
            last_stable_offset: -1,
            log_start_offset: -1,
            diverging_epoch: None,
            current_leader: None,
            read_committed: false,
            records: Vec::new(),
        }
    }

    pub fn records_size(&self) -> usize {
        self.records.iter().map(Bytes::len).sum()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeEndpoint {
    pub broker_id: i32,
    pub host: String,
    pub port: u16,
    pub rack: Option<String>,
}

impl FetchResponse {
    pub fn encode(self, version: i16, correlation_id: i32) -> Response {
        let flexible = Api::Fetch.is_flexible(version);
        let mut out = Pieces::new(begin_response(correlation_id, flexible));
        out.head.put_i32(0); // throttle time
        if version >= 7 {
            out.head.put_i16(self.error_code);
            out.head.put_i32(self.session_id);
        }
        put_length(&mut out.head, flexible, self.topics.len());
        for topic in self.topics {
            encode_topic(&mut out, topic, version);
        }
        if flexible {
            encode_node_endpoints(&mut out.head, &self.node_endpoints, version);
        }
        out.finish()
    }
}

/// Header bytes being written, and the finished pieces before them.
struct Pieces {
    finished: Vec<Bytes>,
    head: BytesMut,
    /// The first piece, kept writable for the frame's size.
    first: Option<BytesMut>,
    finished_size: usize,
}

impl Pieces {
    fn new(head: BytesMut) -> Self {
        Self {
            finished: Vec::new(),
            head,
            first: None,
            finished_size: 0,
        }
    }

    fn records(&mut self, records: Vec<Bytes>) {
        for piece in records {
            if piece.len() <= COPY_MAX {
                self.head.put_slice(&piece);
            } else {
                self.cut();
                self.finished_size = self.finished_size.saturating_add(piece.len());
                self.finished.push(piece);
            }
        }
    }

    fn cut(&mut self) {
        if self.head.is_empty() {
            return;
        }
        let head = self.head.split();
        self.finished_size = self.finished_size.saturating_add(head.len());
        if self.first.is_none() {
            self.first = Some(head);
        } else {
            self.finished.push(head.freeze());
        }
    }

    fn finish(mut self) -> Response {
        self.cut();
        let mut first = self.first.unwrap_or_default();
        set_size(
            &mut first,
            self.finished_size.saturating_sub(super::frame::SIZE_PREFIX),
        );
        let mut pieces = Vec::with_capacity(self.finished.len().saturating_add(1));
        pieces.push(first.freeze());
        pieces.append(&mut self.finished);
        Response { pieces }
    }
}

fn encode_topic(out: &mut Pieces, topic: TopicFetched, version: i16) {
    let flexible = Api::Fetch.is_flexible(version);
    if version >= 13 {
        out.head.put_slice(topic.topic_id.as_bytes());
    } else {
        put_string(&mut out.head, flexible, &topic.name);
    }
    put_length(&mut out.head, flexible, topic.partitions.len());
    for partition in topic.partitions {
        encode_partition(out, partition, version);
    }
    put_no_tagged_fields(&mut out.head, flexible);
}

fn encode_partition(out: &mut Pieces, partition: PartitionFetched, version: i16) {
    let flexible = Api::Fetch.is_flexible(version);
    let head = &mut out.head;
    head.put_i32(partition.index);
    head.put_i16(partition.error_code);
    head.put_i64(partition.high_watermark);
    head.put_i64(partition.last_stable_offset);
    if version >= 5 {
        head.put_i64(partition.log_start_offset);
    }
    match (partition.read_committed, flexible) {
        (true, _) => put_length(head, flexible, 0),
        (false, true) => put_uvarint(head, 0),
        (false, false) => head.put_i32(-1),
    }
    if version >= 11 {
        head.put_i32(-1); // preferred read replica
    }
    put_length(head, flexible, partition.records_size());
    out.records(partition.records);
    if flexible {
        encode_partition_tags(
            &mut out.head,
            partition.diverging_epoch,
            partition.current_leader,
        );
    }
}

fn encode_partition_tags(
    head: &mut BytesMut,
    diverging_epoch: Option<(i32, i64)>,
    current_leader: Option<(i32, i32)>,
) {
    let count = u32::from(diverging_epoch.is_some()) + u32::from(current_leader.is_some());
    put_uvarint(head, count);
    if let Some((epoch, end_offset)) = diverging_epoch {
        put_uvarint(head, 0);
        put_uvarint(head, 13);
        head.put_i32(epoch);
        head.put_i64(end_offset);
        head.put_u8(0);
    }
    if let Some((leader_id, leader_epoch)) = current_leader {
        put_uvarint(head, 1);
        put_uvarint(head, 9);
        head.put_i32(leader_id);
        head.put_i32(leader_epoch);
        head.put_u8(0);
    }
}

fn encode_node_endpoints(head: &mut BytesMut, endpoints: &[NodeEndpoint], version: i16) {
    if version < 16 || endpoints.is_empty() {
        head.put_u8(0);
        return;
    }
    let mut field = BytesMut::new();
    put_length(&mut field, true, endpoints.len());
    for endpoint in endpoints {
        field.put_i32(endpoint.broker_id);
        put_string(&mut field, true, &endpoint.host);
        field.put_i32(i32::from(endpoint.port));
        put_nullable_string(&mut field, true, endpoint.rack.as_deref());
        field.put_u8(0);
    }
    put_uvarint(head, 1);
    put_uvarint(head, 0);
    put_uvarint(head, u32::try_from(field.len()).unwrap_or(u32::MAX));
    head.put_slice(&field);
}
