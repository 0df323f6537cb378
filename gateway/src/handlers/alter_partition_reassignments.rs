//! AlterPartitionReassignments, versions 0 and 1: replicas are moved by the partition's leader, on
//! the controllers' word. No replicas: the move is cancelled.

use chronik_proto::v1;

use super::topic_results::{Outcome, call_outcome, outcome};
use crate::error::ErrorCode;
use crate::protocol::messages as m;
use crate::protocol::messages::alter_partition_reassignments_response::{
    ReassignablePartitionResponse, ReassignableTopicResponse,
};
use crate::services::Context;

pub async fn handle(
    context: Context,
    request: m::AlterPartitionReassignmentsRequest,
) -> m::AlterPartitionReassignmentsResponse {
    let mut changes = Vec::new();
    for topic in &request.topics {
        for partition in &topic.partitions {
            let target = partition.replicas.clone();
            changes.push(v1::ReassignmentChange {
                topic: topic.name.to_string(),
                partition: partition.partition_index,
                target: target.map(|broker_ids| v1::BrokerList { broker_ids }),
            });
        }
    }
    let wire = v1::AlterReassignmentsRequest {
        changes,
        keep_replication_factor: !request.allow_replication_factor_change,
        ..Default::default()
    };
    let answer = context.services.controllers.alter_reassignments(wire).await;
    let mut response = message!(m::AlterPartitionReassignmentsResponse {
        allow_replication_factor_change: request.allow_replication_factor_change,
    });
    let results = match answer {
        Ok(answer) => answer.partitions,
        Err(error) => {
            let (code, message) = call_outcome(&error);
            response.error_code = code.code();
            response.error_message = message;
            return response;
        }
    };
    // One per partition of the request, in its order.
    let mut results = results.into_iter();
    response.responses = request
        .topics
        .into_iter()
        .map(|topic| {
            let partitions = topic.partitions.into_iter().map(|partition| {
                let (code, message): Outcome = match results.next() {
                    Some(result) => outcome(result.error(), &result.error_message),
                    None => (ErrorCode::UnknownServerError, None),
                };
                message!(ReassignablePartitionResponse {
                    partition_index: partition.partition_index,
                    error_code: code.code(),
                    error_message: message,
                })
            });
            message!(ReassignableTopicResponse {
                partitions: partitions.collect(),
                name: topic.name,
            })
        })
        .collect();
    response
}
