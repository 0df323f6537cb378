//! ListPartitionReassignments, version 0: what was asked for and is not done, moves that wait their
//! turn included.

use chronik_proto::v1;

use super::topic_results::call_outcome;
use crate::protocol::messages as m;
use crate::protocol::messages::list_partition_reassignments_response::{
    OngoingPartitionReassignment, OngoingTopicReassignment,
};
use crate::services::Context;

pub async fn handle(
    context: Context,
    request: m::ListPartitionReassignmentsRequest,
) -> m::ListPartitionReassignmentsResponse {
    let named = request.topics.as_ref().map(|topics| {
        let partitions = topics.iter().flat_map(|topic| {
            let reference = |partition: &i32| v1::PartitionRef {
                topic: topic.name.to_string(),
                partition: *partition,
            };
            topic.partition_indexes.iter().map(reference)
        });
        partitions.collect::<Vec<_>>()
    });
    if named.as_ref().is_some_and(Vec::is_empty) {
        return m::ListPartitionReassignmentsResponse::default();
    }
    let wire = v1::ListReassignmentsRequest {
        partitions: named.unwrap_or_default(),
    };
    let mut response = m::ListPartitionReassignmentsResponse::default();
    let listed = match context.services.controllers.list_reassignments(wire).await {
        Ok(answer) => answer.reassignments,
        Err(error) => {
            let (code, message) = call_outcome(&error);
            response.error_code = code.code();
            response.error_message = message;
            return response;
        }
    };
    for state in listed {
        let partition = message!(OngoingPartitionReassignment {
            partition_index: state.partition,
            replicas: state.replicas,
            adding_replicas: state.adding,
            removing_replicas: state.removing,
        });
        let topic = response
            .topics
            .iter_mut()
            .find(|topic| *topic.name == *state.topic);
        match topic {
            Some(topic) => topic.partitions.push(partition),
            None => response.topics.push(message!(OngoingTopicReassignment {
                name: state.topic.into(),
                partitions: vec![partition],
            })),
        }
    }
    response
}
