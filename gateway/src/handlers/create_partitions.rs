//! CreatePartitions, versions 0 to 3.

use chronik_proto::v1;

use super::topic_results::{by_name, timeout_ms};
use crate::error::ErrorCode;
use crate::protocol::messages as m;
use crate::protocol::messages::create_partitions_response::CreatePartitionsTopicResult;
use crate::services::Context;

pub async fn handle(
    context: Context,
    request: m::CreatePartitionsRequest,
) -> m::CreatePartitionsResponse {
    let services = &context.services;
    let topics: Vec<v1::NewPartitions> = request
        .topics
        .iter()
        .map(|topic| v1::NewPartitions {
            name: topic.name.to_string(),
            total_count: topic.count,
            assignments: topic
                .assignments
                .iter()
                .flatten()
                .map(|a| v1::BrokerList {
                    broker_ids: a.broker_ids.clone(),
                })
                .collect(),
        })
        .collect();
    let wire = v1::CreatePartitionsRequest {
        topics,
        timeout_ms: timeout_ms(request.timeout_ms),
        validate_only: request.validate_only,
    };
    let mut outcome_of = by_name(services.controllers.create_partitions(wire).await);
    let mut grown = Vec::new();
    let results = request
        .topics
        .into_iter()
        .map(|topic| {
            let (code, message) = outcome_of(&topic.name);
            if code == ErrorCode::None && !request.validate_only {
                grown.push((
                    topic.name.clone(),
                    usize::try_from(topic.count).unwrap_or(0),
                ));
            }
            message!(CreatePartitionsTopicResult {
                name: topic.name,
                error_code: code.code(),
                error_message: message,
            })
        })
        .collect();
    let shown = |s: &crate::metadata_cache::Snapshot| {
        grown.iter().all(|(name, count)| {
            s.image
                .topic_by_name(name)
                .is_none_or(|topic| topic.partitions.len() >= *count)
        })
    };
    services.wait_for_image(shown).await;
    message!(m::CreatePartitionsResponse { results: results })
}
