//! From an API to its handler: one match.
//!
//! Invariant: every advertised API and version ends in a handler; any other version gets an
//! UNSUPPORTED_VERSION answer where the API's response can carry one, else the connection ends.

use bytes::Bytes;
use chronik_telemetry::rpc;
use chronik_telemetry::trace::Span;
use futures::FutureExt;
use futures::future::BoxFuture;
use tracing::error;

use crate::error::ErrorCode;
use crate::handlers;
use crate::protocol::messages::{self as m, KafkaDecode, KafkaEncode};
use crate::protocol::produce::{ProduceRequest, VERSION_MIN, refuse_old_version};
use crate::protocol::{Api, Malformed, Response};
use crate::services::Context;

/// What happens to a request in the end.
#[derive(Debug)]
pub enum Reply {
    Send(Response),
    /// acks=0.
    Nothing,
    Malformed(Malformed),
    /// Nothing true can be said in the protocol; the connection ends.
    Close(&'static str),
}

/// Takes a produce request: when this returns, it is on its way to the brokers. The answer comes
/// later.
pub async fn produce(
    context: Context,
    body: Bytes,
) -> Result<BoxFuture<'static, Reply>, Malformed> {
    let (version, correlation_id) = (context.version, context.correlation_id);
    if !Api::Produce.supports(version) {
        return Err(Malformed::UnsupportedVersion {
            api: Api::Produce.name(),
            version,
        });
    }
    let request = ProduceRequest::decode(body, version)?;
    if version < VERSION_MIN {
        let code = ErrorCode::UnsupportedVersion.code();
        let reply = match request.acks {
            0 => Reply::Close("produce version is not supported, and acks=0 has no answer"),
            _ => Reply::Send(refuse_old_version(&request, version, correlation_id, code)),
        };
        return Ok(std::future::ready(reply).boxed());
    }
    Ok(handlers::produce::begin(context, request).await)
}

/// Any other request; nothing happens before the future is polled.
pub fn other(api: Api, context: Context, body: Bytes) -> BoxFuture<'static, Reply> {
    if !api.supports(context.version) {
        return std::future::ready(unsupported(api, &context)).boxed();
    }
    macro_rules! answer {
        ($handler:ident) => {
            handle(api, context, body, handlers::$handler::handle).boxed()
        };
    }
    match api {
        Api::Produce => std::future::ready(Reply::Close("produce is not dispatched here")).boxed(),
        Api::Fetch => fetch(context, body).boxed(),
        Api::ListOffsets => answer!(list_offsets),
        Api::Metadata => answer!(metadata),
        Api::OffsetCommit => answer!(offset_commit),
        Api::OffsetFetch => answer!(offset_fetch),
        Api::FindCoordinator => answer!(find_coordinator),
        Api::JoinGroup => answer!(join_group),
        Api::Heartbeat => answer!(heartbeat),
        Api::LeaveGroup => answer!(leave_group),
        Api::SyncGroup => answer!(sync_group),
        Api::DescribeGroups => answer!(describe_groups),
        Api::ListGroups => answer!(list_groups),
        Api::ApiVersions => answer!(api_versions),
        Api::CreateTopics => answer!(create_topics),
        Api::DeleteTopics => answer!(delete_topics),
        Api::DeleteRecords => answer!(delete_records),
        Api::InitProducerId => answer!(init_producer_id),
        Api::OffsetForLeaderEpoch => answer!(offset_for_leader_epoch),
        Api::DescribeConfigs => answer!(describe_configs),
        Api::CreatePartitions => answer!(create_partitions),
        Api::DescribeLogDirs => answer!(describe_log_dirs),
        Api::ElectLeaders => answer!(elect_leaders),
        Api::IncrementalAlterConfigs => answer!(incremental_alter_configs),
        Api::AlterPartitionReassignments => answer!(alter_partition_reassignments),
        Api::ListPartitionReassignments => answer!(list_partition_reassignments),
        Api::DescribeCluster => answer!(describe_cluster),
        Api::UnregisterBroker => answer!(unregister_broker),
    }
}

async fn handle<Q, A, F>(
    api: Api,
    context: Context,
    body: Bytes,
    handler: impl FnOnce(Context, Q) -> F,
) -> Reply
where
    Q: KafkaDecode,
    A: KafkaEncode,
    F: Future<Output = A>,
{
    let (version, correlation_id) = (context.version, context.correlation_id);
    let request = match m::decode::<Q>(body, version) {
        Ok(request) => request,
        Err(error) => return Reply::Malformed(error),
    };
    let mut span = context.services.sampler.root(api.span_name());
    if let Some(span) = &mut span {
        span.attribute("client_id", context.client_id.clone());
    }
    let trace = span.as_ref().map(Span::context);
    let answer = rpc::within(trace, handler(context, request)).await;
    encode(api, version, correlation_id, &answer)
}

async fn fetch(context: Context, body: Bytes) -> Reply {
    let (version, correlation_id) = (context.version, context.correlation_id);
    match m::decode::<m::FetchRequest>(body, version) {
        Ok(request) => {
            let answer = handlers::fetch::handle(context, request).await;
            Reply::Send(answer.encode(version, correlation_id))
        }
        Err(error) => Reply::Malformed(error),
    }
}

fn encode<A: KafkaEncode>(api: Api, version: i16, correlation_id: i32, answer: &A) -> Reply {
    match m::encode(api, version, correlation_id, answer) {
        Ok(response) => Reply::Send(response),
        Err(error) => {
            // A bug of ours; the client must not wait for ever.
            error!(%error, "a response cannot be encoded");
            Reply::Close("the response cannot be encoded")
        }
    }
}

/// Answers a version that is not served, in the nearest one that is. Responses without an error
/// code of their own would read as success, so there the connection ends, as in Apache Kafka.
fn unsupported(api: Api, context: &Context) -> Reply {
    let (min, max) = api.versions();
    let version = context.version.clamp(min, max);
    let id = context.correlation_id;
    let code = ErrorCode::UnsupportedVersion.code();
    macro_rules! refuse {
        ($response:ident) => {
            encode(
                api,
                version,
                id,
                &message!(m::$response { error_code: code }),
            )
        };
    }
    match api {
        Api::ApiVersions => encode(api, 0, id, &handlers::api_versions::unsupported()),
        Api::Fetch if version >= 7 => {
            let answer = crate::protocol::fetch::FetchResponse {
                error_code: code,
                ..Default::default()
            };
            Reply::Send(answer.encode(version, id))
        }
        Api::Metadata if version >= 13 => refuse!(MetadataResponse),
        Api::JoinGroup => refuse!(JoinGroupResponse),
        Api::SyncGroup => refuse!(SyncGroupResponse),
        Api::Heartbeat => refuse!(HeartbeatResponse),
        Api::LeaveGroup => refuse!(LeaveGroupResponse),
        Api::ListGroups => refuse!(ListGroupsResponse),
        Api::InitProducerId => refuse!(InitProducerIdResponse),
        Api::DescribeCluster => refuse!(DescribeClusterResponse),
        Api::DescribeLogDirs if version >= 3 => refuse!(DescribeLogDirsResponse),
        Api::ElectLeaders if version >= 1 => refuse!(ElectLeadersResponse),
        Api::AlterPartitionReassignments => refuse!(AlterPartitionReassignmentsResponse),
        Api::ListPartitionReassignments => refuse!(ListPartitionReassignmentsResponse),
        Api::UnregisterBroker => refuse!(UnregisterBrokerResponse),
        Api::Produce
        | Api::Fetch
        | Api::ListOffsets
        | Api::Metadata
        | Api::OffsetCommit
        | Api::OffsetFetch
        | Api::FindCoordinator
        | Api::DescribeGroups
        | Api::CreateTopics
        | Api::DeleteTopics
        | Api::DeleteRecords
        | Api::OffsetForLeaderEpoch
        | Api::DescribeConfigs
        | Api::CreatePartitions
        | Api::DescribeLogDirs
        | Api::ElectLeaders
        | Api::IncrementalAlterConfigs => Reply::Malformed(Malformed::UnsupportedVersion {
            api: api.name(),
            version: context.version,
        }),
    }
}
