//! ElectLeaders, versions 0 to 2: the preferred leader of each partition. Unclean elections are
//! refused: a Raft group without a majority has no leader.

use chronik_proto::v1;

use super::topic_results::{call_outcome, outcome, timeout_ms};
use crate::protocol::messages as m;
use crate::protocol::messages::elect_leaders_response::{PartitionResult, ReplicaElectionResult};
use crate::services::Context;

const PREFERRED: i8 = 0;

pub async fn handle(context: Context, request: m::ElectLeadersRequest) -> m::ElectLeadersResponse {
    let mut partitions = Vec::new();
    for topic in request.topic_partitions.iter().flatten() {
        for partition in &topic.partitions {
            partitions.push(v1::PartitionRef {
                topic: topic.topic.to_string(),
                partition: *partition,
            });
        }
    }
    let wire = v1::ElectLeadersRequest {
        all: request.topic_partitions.is_none(),
        unclean: request.election_type != PREFERRED,
        timeout_ms: timeout_ms(request.timeout_ms),
        partitions: partitions.clone(),
    };
    let mut response = m::ElectLeadersResponse::default();
    let answer = context.services.controllers.elect_leaders(wire).await;
    let results = match answer {
        Ok(answer) => answer.partitions,
        Err(error) => {
            // Version 0 has no error code for the whole: each partition gets its own.
            let (code, message) = call_outcome(&error);
            response.error_code = code.code();
            for named in partitions {
                let result = message!(PartitionResult {
                    partition_id: named.partition,
                    error_code: code.code(),
                    error_message: message.clone(),
                });
                add(&mut response, &named.topic, result);
            }
            return response;
        }
    };
    for result in results {
        let (code, message) = outcome(result.error(), &result.error_message);
        let partition = message!(PartitionResult {
            partition_id: result.partition,
            error_code: code.code(),
            error_message: message,
        });
        add(&mut response, &result.topic, partition);
    }
    response
}

fn add(response: &mut m::ElectLeadersResponse, topic: &str, partition: PartitionResult) {
    let results = &mut response.replica_election_results;
    match results.iter_mut().find(|result| *result.topic == *topic) {
        Some(result) => result.partition_result.push(partition),
        None => results.push(message!(ReplicaElectionResult {
            topic: topic.into(),
            partition_result: vec![partition],
        })),
    }
}
