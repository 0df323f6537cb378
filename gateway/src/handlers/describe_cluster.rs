//! DescribeCluster, versions 0 to 2.

use super::metadata::CLUSTER_OPERATIONS;
use super::resolve;
use crate::error::ErrorCode;
use crate::protocol::messages::describe_cluster_response::DescribeClusterBroker;
use crate::protocol::messages::{self as m, StrBytes};
use crate::services::Context;

/// Endpoint types (KIP-919): 1 brokers, 2 controllers. Kafka clients cannot talk to controllers.
const BROKERS: i8 = 1;

pub async fn handle(
    context: Context,
    request: m::DescribeClusterRequest,
) -> m::DescribeClusterResponse {
    let snapshot = context.services.cache.load();
    let version = context.version;
    if version >= 1 && request.endpoint_type != BROKERS {
        return message!(m::DescribeClusterResponse {
            error_code: ErrorCode::UnsupportedEndpointType.code(),
            error_message: Some("only brokers can be described here".into()),
            endpoint_type: request.endpoint_type,
        });
    }
    let with_fenced = version >= 2 && request.include_fenced_brokers;
    let brokers = snapshot
        .image
        .brokers
        .values()
        .filter(|broker| with_fenced || !broker.fenced)
        .filter_map(|broker| Some((resolve::node(&snapshot, broker.broker_id)?, broker.fenced)))
        .map(|(node, fenced)| {
            message!(DescribeClusterBroker {
                broker_id: node.broker_id,
                host: node.host.into(),
                port: i32::from(node.port),
                rack: node.rack.map(StrBytes::from),
                is_fenced: fenced,
            })
        })
        .collect();
    let mut response = message!(m::DescribeClusterResponse {
        cluster_id: snapshot.image.cluster_id.as_str().into(),
        controller_id: resolve::controller_id(&snapshot),
        brokers: brokers,
    });
    if request.include_cluster_authorized_operations {
        response.cluster_authorized_operations = CLUSTER_OPERATIONS;
    }
    response
}
