//! The only module that names the message library (`kafka-wire`), so that it can be replaced in
//! one place. Everything but the hot path (`produce`, `fetch`) is decoded and encoded here.
//!
//! Invariant: decoding is bounded by `limits()`; the library reserves nothing from counts that
//! came from the wire.

use bytes::{Bytes, BytesMut};
use kafka_wire_core::{DecodeLimits, Decoder};

pub use kafka_wire::{
    AlterPartitionReassignmentsRequest, AlterPartitionReassignmentsResponse, ApiVersionsRequest,
    ApiVersionsResponse, CreatePartitionsRequest, CreatePartitionsResponse, CreateTopicsRequest,
    CreateTopicsResponse, DeleteRecordsRequest, DeleteRecordsResponse, DeleteTopicsRequest,
    DeleteTopicsResponse, DescribeClusterRequest, DescribeClusterResponse, DescribeConfigsRequest,
    DescribeConfigsResponse, DescribeGroupsRequest, DescribeGroupsResponse, DescribeLogDirsRequest,
    DescribeLogDirsResponse, ElectLeadersRequest, ElectLeadersResponse, FetchRequest,
    FindCoordinatorRequest, FindCoordinatorResponse, HeartbeatRequest, HeartbeatResponse,
    IncrementalAlterConfigsRequest, IncrementalAlterConfigsResponse, InitProducerIdRequest,
    InitProducerIdResponse, JoinGroupRequest, JoinGroupResponse, KafkaRequest, KafkaResponse,
    LeaveGroupRequest, LeaveGroupResponse, ListGroupsRequest, ListGroupsResponse,
    ListOffsetsRequest, ListOffsetsResponse, ListPartitionReassignmentsRequest,
    ListPartitionReassignmentsResponse, MetadataRequest, MetadataResponse, OffsetCommitRequest,
    OffsetCommitResponse, OffsetFetchRequest, OffsetFetchResponse, OffsetForLeaderEpochRequest,
    OffsetForLeaderEpochResponse, ProduceResponse, SyncGroupRequest, SyncGroupResponse,
    UnregisterBrokerRequest, UnregisterBrokerResponse,
};
pub use kafka_wire::{
    alter_partition_reassignments_response, api_versions_response, create_partitions_response,
    create_topics_request, create_topics_response, delete_records_response, delete_topics_request,
    delete_topics_response, describe_cluster_response, describe_configs_response,
    describe_groups_response, describe_log_dirs_response, elect_leaders_response, fetch_request,
    find_coordinator_response, incremental_alter_configs_request,
    incremental_alter_configs_response, join_group_response, leave_group_response,
    list_groups_response, list_offsets_response, list_partition_reassignments_response,
    metadata_request, metadata_response, offset_commit_request, offset_commit_response,
    offset_fetch_request, offset_fetch_response, offset_for_leader_epoch_response,
    produce_response,
};
pub use kafka_wire_core::{ApiVersion, KafkaDecode, KafkaEncode, StrBytes, Uuid as WireUuid};

use super::Malformed;
use super::frame::{Response, begin_response, finish_response};
use super::versions::Api;

/// Decoded messages take several times the memory of their bytes, so all requests but Produce are
/// held to this size.
pub const REQUEST_SIZE_MAX: usize = 8 * 1024 * 1024;

/// Decodes a request body. Bytes after the message are ignored, as Apache Kafka does.
pub fn decode<M: KafkaDecode>(body: Bytes, version: i16) -> Result<M, Malformed> {
    if body.len() > REQUEST_SIZE_MAX {
        return Err(Malformed::FrameTooLarge {
            size: body.len(),
            limit: REQUEST_SIZE_MAX,
        });
    }
    let malformed = |error: kafka_wire_core::DecodeError| Malformed::Message(error.to_string());
    let mut decoder = Decoder::new(body, limits()).map_err(malformed)?;
    M::decode(&mut decoder, ApiVersion::new(version)).map_err(malformed)
}

/// A response that the message library refused: a bug of the handler that made it.
#[derive(Debug, thiserror::Error)]
#[error("{api} version {version} response cannot be encoded: {reason}")]
pub struct Unencodable {
    api: &'static str,
    version: i16,
    reason: String,
}

/// Encodes a whole response frame.
pub fn encode<M: KafkaEncode>(
    api: Api,
    version: i16,
    correlation_id: i32,
    message: &M,
) -> Result<Response, Unencodable> {
    let mut out: BytesMut =
        begin_response(correlation_id, api.has_flexible_response_header(version));
    message
        .encode_into(&mut out, ApiVersion::new(version))
        .map_err(|error| Unencodable {
            api: api.name(),
            version,
            reason: error.to_string(),
        })?;
    Ok(finish_response(out))
}

/// A topic id as the message library has it.
pub fn wire_uuid(uuid: uuid::Uuid) -> WireUuid {
    WireUuid::from_bytes(*uuid.as_bytes())
}

/// A topic id as the rest of the gateway has it.
pub fn uuid(uuid: WireUuid) -> uuid::Uuid {
    uuid::Uuid::from_bytes(uuid.to_bytes())
}

fn limits() -> DecodeLimits {
    let mut limits = DecodeLimits::default();
    limits.max_frame_bytes = REQUEST_SIZE_MAX;
    limits.max_string_bytes = 64 * 1024;
    limits.max_bytes_bytes = REQUEST_SIZE_MAX;
    limits.max_array_elements = 1_000_000;
    limits.max_tagged_fields = 10_000;
    limits.max_tag_bytes = 64 * 1024;
    limits.max_total_tag_bytes = 1024 * 1024;
    limits
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_small_request_with_a_huge_array_is_refused() {
        // Metadata v12 with a compact array of 2^31 - 2 topics, in 20 bytes; and v1's form.
        let mut body = vec![0xff, 0xff, 0xff, 0xff, 0x07];
        body.resize(20, 0);
        assert!(decode::<MetadataRequest>(Bytes::from(body), 12).is_err());
        let mut body = vec![0x7f, 0xff, 0xff, 0xff];
        body.resize(20, 0);
        assert!(decode::<MetadataRequest>(Bytes::from(body), 1).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(
            bytes in proptest::collection::vec(any::<u8>(), 0..128),
            version in 0i16..19,
        ) {
            let bytes = Bytes::from(bytes);
            let _ = decode::<MetadataRequest>(bytes.clone(), version);
            let _ = decode::<FetchRequest>(bytes.clone(), version);
            let _ = decode::<JoinGroupRequest>(bytes.clone(), version);
            let _ = decode::<OffsetFetchRequest>(bytes.clone(), version);
            let _ = decode::<CreateTopicsRequest>(bytes, version);
        }
    }
}
