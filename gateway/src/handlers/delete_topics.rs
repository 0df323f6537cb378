//! DeleteTopics, versions 1 to 6; by name, and in version 6 also by id.

use chronik_proto::v1;
use chronik_types::id::TopicId;

use super::resolve;
use super::topic_results::{Outcome, call_outcome, outcome, timeout_ms};
use crate::error::ErrorCode;
use crate::protocol::messages as m;
use crate::protocol::messages::delete_topics_response::DeletableTopicResult;
use crate::protocol::produce::TopicKey;
use crate::services::Context;

/// From this version on topics may come as ids.
const TOPIC_IDS_FROM: i16 = 6;

pub async fn handle(context: Context, request: m::DeleteTopicsRequest) -> m::DeleteTopicsResponse {
    let services = &context.services;
    let snapshot = services.cache.load();
    let keys: Vec<TopicKey> = if context.version >= TOPIC_IDS_FROM {
        let key = |topic: m::delete_topics_request::DeleteTopicState| match topic.name {
            Some(name) => TopicKey::Name(name),
            None => TopicKey::Id(m::uuid(topic.topic_id)),
        };
        request.topics.into_iter().map(key).collect()
    } else {
        request
            .topic_names
            .into_iter()
            .map(TopicKey::Name)
            .collect()
    };
    let topics = keys
        .iter()
        .map(|key| match key {
            TopicKey::Name(name) => v1::TopicRef {
                name: name.to_string(),
                ..Default::default()
            },
            TopicKey::Id(id) => v1::TopicRef {
                topic_id: chronik_proto::uuid_bytes(*id),
                ..Default::default()
            },
        })
        .collect();
    let wire = v1::DeleteTopicsRequest {
        topics,
        timeout_ms: timeout_ms(request.timeout_ms),
    };
    let answer = services.controllers.delete_topics(wire).await;
    let mut results = answer
        .map(|answer| answer.topics)
        .map_err(|error| call_outcome(&error));
    let mut gone = Vec::new();
    let responses = keys
        .into_iter()
        .map(|key| {
            let (code, message): Outcome = match &mut results {
                Ok(results) => take(results, &key),
                Err(outcome) => outcome.clone(),
            };
            let known = resolve::topic(&snapshot, &key).ok();
            if code == ErrorCode::None
                && let Some(topic) = known
            {
                gone.push(topic.topic_id);
            }
            let id = known.map(|topic| topic.topic_id);
            let name = known.map(|topic| (&*topic.name).into());
            message!(DeletableTopicResult {
                name: match &key {
                    TopicKey::Name(name) => Some(name.clone()),
                    TopicKey::Id(_) => name,
                },
                topic_id: m::wire_uuid(match key {
                    TopicKey::Id(id) => id,
                    TopicKey::Name(_) => id.map(|TopicId(id)| id).unwrap_or_default(),
                }),
                error_code: code.code(),
                error_message: message,
            })
        })
        .collect();
    services
        .wait_for_image(|s| gone.iter().all(|id| s.image.topic(*id).is_none()))
        .await;
    message!(m::DeleteTopicsResponse {
        responses: responses
    })
}

fn take(results: &mut Vec<v1::TopicResult>, key: &TopicKey) -> Outcome {
    let at = results.iter().position(|result| match key {
        TopicKey::Name(name) => result.name == **name,
        TopicKey::Id(id) => result.topic_id == id.as_bytes()[..],
    });
    let Some(result) = at.map(|at| results.swap_remove(at)) else {
        return (
            ErrorCode::UnknownServerError,
            Some("the controller did not answer".into()),
        );
    };
    let (code, message) = outcome(result.error(), &result.error_message);
    let by_id = matches!(key, TopicKey::Id(_));
    if by_id && code == ErrorCode::UnknownTopicOrPartition {
        return (ErrorCode::UnknownTopicId, message);
    }
    (code, message)
}
