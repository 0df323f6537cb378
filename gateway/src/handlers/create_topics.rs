//! CreateTopics, versions 2 to 7.

use std::collections::HashMap;

use chronik_proto::v1;
use chronik_types::topic_config::{TOPIC_CONFIGS, effective};

use super::describe_configs::{DEFAULT_SOURCE, TOPIC_SOURCE};
use super::topic_results::{Outcome, call_outcome, outcome, timeout_ms};
use crate::error::ErrorCode;
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::create_topics_response::{
    CreatableTopicConfigs, CreatableTopicResult,
};
use crate::services::Context;

/// From this version on answers tell the topic's configs.
const CONFIGS_FROM: i16 = 5;

pub async fn handle(context: Context, request: m::CreateTopicsRequest) -> m::CreateTopicsResponse {
    let mut refused: Vec<(StrBytes, Outcome)> = Vec::new();
    let mut names = Vec::with_capacity(request.topics.len());
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        names.push(topic.name.clone());
        match new_topic(&topic) {
            Ok(new) => topics.push(new),
            Err(outcome) => refused.push((topic.name, outcome)),
        }
    }
    let wire = v1::CreateTopicsRequest {
        topics,
        timeout_ms: timeout_ms(request.timeout_ms),
        validate_only: request.validate_only,
    };
    let answer = if wire.topics.is_empty() {
        Ok(v1::CreateTopicsResponse::default())
    } else {
        context.services.controllers.create_topics(wire).await
    };
    if let Ok(answer) = &answer
        && !request.validate_only
    {
        let made: Vec<&str> = answer
            .topics
            .iter()
            .filter(|topic| topic.error() == v1::AdminError::None)
            .map(|topic| topic.name.as_str())
            .collect();
        context
            .services
            .wait_for_image(|s| {
                made.iter()
                    .all(|name| s.image.topic_by_name(name).is_some())
            })
            .await;
    }
    let failure = answer.as_ref().err().map(call_outcome);
    let mut created: HashMap<String, v1::CreatedTopic> = answer
        .into_iter()
        .flat_map(|answer| answer.topics)
        .map(|topic| (topic.name.clone(), topic))
        .collect();
    let topics = names
        .into_iter()
        .map(|name| {
            let refusal = refused
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, o)| o.clone());
            match (refusal, created.remove(&*name)) {
                (Some(refusal), _) => failed(name, refusal),
                (None, Some(topic)) => result(name, topic, context.version),
                (None, None) => {
                    let missing = || (ErrorCode::InvalidRequest, Some("named twice".into()));
                    failed(name, failure.clone().unwrap_or_else(missing))
                }
            }
        })
        .collect();
    message!(m::CreateTopicsResponse { topics: topics })
}

fn new_topic(topic: &m::create_topics_request::CreatableTopic) -> Result<v1::NewTopic, Outcome> {
    let mut assignments: Vec<_> = topic.assignments.iter().collect();
    assignments.sort_by_key(|assignment| assignment.partition_index);
    let consecutive = (0i32..)
        .zip(&assignments)
        .all(|(i, a)| a.partition_index == i);
    if !consecutive {
        let why = "partitions of an assignment must be numbered from 0 without gaps";
        return Err((ErrorCode::InvalidReplicaAssignment, Some(why.into())));
    }
    let given = topic.num_partitions != -1 || topic.replication_factor != -1;
    if !assignments.is_empty() && given {
        let why = "an assignment and a number of partitions or replicas exclude each other";
        return Err((ErrorCode::InvalidRequest, Some(why.into())));
    }
    let mut configs = HashMap::new();
    for config in &topic.configs {
        // A null value means the default.
        if let Some(value) = &config.value {
            configs.insert(config.name.to_string(), value.to_string());
        }
    }
    Ok(v1::NewTopic {
        name: topic.name.to_string(),
        partition_count: topic.num_partitions,
        replication_factor: i32::from(topic.replication_factor),
        configs,
        assignments: assignments
            .into_iter()
            .map(|assignment| v1::BrokerList {
                broker_ids: assignment.broker_ids.clone(),
            })
            .collect(),
    })
}

fn failed(name: StrBytes, (code, message): Outcome) -> CreatableTopicResult {
    message!(CreatableTopicResult {
        name: name,
        error_code: code.code(),
        error_message: message,
        num_partitions: -1,
        replication_factor: -1,
    })
}

fn result(name: StrBytes, topic: v1::CreatedTopic, version: i16) -> CreatableTopicResult {
    let (code, message) = outcome(topic.error(), &topic.error_message);
    if code.is_error() {
        return failed(name, (code, message));
    }
    let topic_id = chronik_proto::uuid("topic_id", &topic.topic_id).unwrap_or_default();
    let mut result = message!(CreatableTopicResult {
        name: name,
        topic_id: m::wire_uuid(topic_id),
        num_partitions: topic.partition_count,
        replication_factor: i16::try_from(topic.replication_factor).unwrap_or(i16::MAX),
    });
    if version >= CONFIGS_FROM {
        let own = topic.configs.into_iter().collect();
        let config = |key: &chronik_types::topic_config::ConfigKey| {
            message!(CreatableTopicConfigs {
                name: key.name.into(),
                value: Some(effective(&own, key.name).into()),
                config_source: match own.contains_key(key.name) {
                    true => TOPIC_SOURCE,
                    false => DEFAULT_SOURCE,
                },
            })
        };
        result.configs = Some(TOPIC_CONFIGS.iter().map(config).collect());
    }
    result
}
