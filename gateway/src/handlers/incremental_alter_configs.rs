//! IncrementalAlterConfigs, versions 0 and 1, for topics. Brokers are configured by their files.

use chronik_proto::v1;

use super::describe_configs::{BROKER, TOPIC};
use super::topic_results::{Outcome, by_name};
use crate::error::ErrorCode;
use crate::protocol::messages as m;
use crate::protocol::messages::incremental_alter_configs_request::AlterConfigsResource as Resource;
use crate::protocol::messages::incremental_alter_configs_response::AlterConfigsResourceResponse;
use crate::services::Context;

pub async fn handle(
    context: Context,
    request: m::IncrementalAlterConfigsRequest,
) -> m::IncrementalAlterConfigsResponse {
    let services = &context.services;
    let mut wire = v1::AlterTopicConfigsRequest {
        topics: Vec::new(),
        validate_only: request.validate_only,
    };
    let mut refused: Vec<Option<Outcome>> = Vec::with_capacity(request.resources.len());
    for resource in &request.resources {
        let outcome = match changes(resource) {
            Ok(Some(changes)) => {
                wire.topics.push(changes);
                None
            }
            Ok(None) => Some((ErrorCode::None, None)),
            Err(outcome) => Some(outcome),
        };
        refused.push(outcome);
    }
    let expected = wire.topics.clone();
    let answer = if wire.topics.is_empty() {
        Ok(v1::TopicResults::default())
    } else {
        services.controllers.alter_topic_configs(wire).await
    };
    let mut outcome_of = by_name(answer);
    let mut changed = Vec::new();
    let responses = request
        .resources
        .into_iter()
        .zip(refused)
        .map(|(resource, refused)| {
            let (code, message) = refused.unwrap_or_else(|| outcome_of(&resource.resource_name));
            if code == ErrorCode::None && !request.validate_only {
                changed.extend(
                    expected
                        .iter()
                        .filter(|t| t.name == *resource.resource_name),
                );
            }
            message!(AlterConfigsResourceResponse {
                error_code: code.code(),
                error_message: message,
                resource_type: resource.resource_type,
                resource_name: resource.resource_name,
            })
        })
        .collect();
    services
        .wait_for_image(|s| {
            changed.iter().all(|topic| {
                s.image
                    .topic_by_name(&topic.name)
                    .is_none_or(|known| topic.changes.iter().all(|c| is_shown(&known.configs, c)))
            })
        })
        .await;
    message!(m::IncrementalAlterConfigsResponse {
        responses: responses
    })
}

/// Whether a change can be seen in a topic's configs; list operations are not followed.
fn is_shown(
    configs: &std::collections::BTreeMap<String, String>,
    change: &v1::ConfigChange,
) -> bool {
    match change.operation() {
        v1::config_change::Operation::Set => configs
            .get(&change.name)
            .is_none_or(|value| *value == change.value),
        v1::config_change::Operation::Delete => !configs.contains_key(&change.name),
        v1::config_change::Operation::Append | v1::config_change::Operation::Subtract => true,
    }
}

/// Configs by which Kafka's kafka-reassign-partitions throttles moves. They are never set here, so
/// taking them back, which that tool does after every move, is done already.
const THROTTLES: [&str; 5] = [
    "leader.replication.throttled.rate",
    "follower.replication.throttled.rate",
    "replica.alter.log.dirs.io.max.bytes.per.second",
    "leader.replication.throttled.replicas",
    "follower.replication.throttled.replicas",
];
const DELETE: i8 = 1;

/// None: there is nothing to do.
fn changes(resource: &Resource) -> Result<Option<v1::TopicConfigChanges>, Outcome> {
    let is_throttle = |name: &str| THROTTLES.contains(&name);
    if let Some(throttle) = resource
        .configs
        .iter()
        .find(|config| is_throttle(&config.name) && config.config_operation != DELETE)
    {
        let why = format!(
            "{} is not a config here: moves are throttled for the whole cluster, by `chronik cluster \
             set --reassignment-bytes-per-second`",
            &*throttle.name
        );
        return Err((ErrorCode::InvalidRequest, Some(why.into())));
    }
    if !resource.configs.is_empty() && resource.configs.iter().all(|c| is_throttle(&c.name)) {
        return Ok(None);
    }
    match resource.resource_type {
        TOPIC => {}
        BROKER => {
            let why = "configs of brokers are set in their configuration files";
            return Err((ErrorCode::InvalidRequest, Some(why.into())));
        }
        other => {
            let why = format!("resource type {other} has no configs here");
            return Err((ErrorCode::InvalidRequest, Some(why.into())));
        }
    }
    let mut changes = Vec::with_capacity(resource.configs.len());
    for config in resource.configs.iter().filter(|c| !is_throttle(&c.name)) {
        let operation = match config.config_operation {
            0 => v1::config_change::Operation::Set,
            1 => v1::config_change::Operation::Delete,
            2 => v1::config_change::Operation::Append,
            3 => v1::config_change::Operation::Subtract,
            other => {
                let why = format!("config operation {other} is not known");
                return Err((ErrorCode::InvalidRequest, Some(why.into())));
            }
        };
        let needs_value = operation != v1::config_change::Operation::Delete;
        let value = match &config.value {
            Some(value) => value.to_string(),
            None if needs_value => {
                let why = format!("config {} has no value", &*config.name);
                return Err((ErrorCode::InvalidConfig, Some(why.into())));
            }
            None => String::new(),
        };
        changes.push(v1::ConfigChange {
            name: config.name.to_string(),
            operation: operation.into(),
            value,
        });
    }
    Ok(Some(v1::TopicConfigChanges {
        name: resource.resource_name.to_string(),
        changes,
    }))
}
