//! Topics over REST: the same requests as over gRPC, in JSON.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chronik_proto::v1;
use chronik_proto::v1::admin_server::Admin;
use chronik_types::id::TopicId;
use tonic::Request;

use super::Api;
use super::dto;
use super::error::{JsonBody, PathOf, Problem};

const TIMEOUT_MS: u32 = 10_000;

/// All topics, by name.
#[utoipa::path(get, path = "/v1/topics", tag = "topics",
    responses((status = 200, body = dto::Topics)))]
pub async fn list_topics(State(api): State<Api>) -> Json<dto::Topics> {
    let image = api.controller.image();
    let mut topics: Vec<dto::TopicSummary> = image
        .topics
        .values()
        .map(|topic| (&**topic).into())
        .collect();
    topics.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Json(dto::Topics { topics })
}

/// Creates a topic; answers when its partitions have leaders.
#[utoipa::path(post, path = "/v1/topics", tag = "topics", request_body = dto::NewTopic,
    responses((status = 201, body = dto::Topic),
        (status = 200, description = "Only checked, and found valid"),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn create_topic(
    State(api): State<Api>,
    headers: HeaderMap,
    JsonBody(topic): JsonBody<dto::NewTopic>,
) -> Result<Response, Problem> {
    let name = topic.name.clone();
    let validate_only = topic.validate_only;
    let request = v1::CreateTopicsRequest {
        timeout_ms: topic.timeout_ms.unwrap_or(TIMEOUT_MS),
        validate_only,
        topics: vec![v1::NewTopic {
            name: topic.name,
            partition_count: topic.partition_count.unwrap_or(-1),
            replication_factor: topic.replication_factor.unwrap_or(-1),
            configs: topic.configs.into_iter().collect(),
            assignments: broker_lists(topic.assignments),
        }],
    };
    let response = api.admin.create_topics(traced(request, &headers)).await?;
    api.controller.await_revision_of(&response).await;
    let created = response.into_inner().topics.pop().ok_or_else(no_result)?;
    if let Some(problem) = Problem::of_result(created.error(), created.error_message) {
        return Err(problem);
    }
    if validate_only {
        return Ok(StatusCode::OK.into_response());
    }
    let location = [(header::LOCATION, format!("/v1/topics/{name}"))];
    Ok((StatusCode::CREATED, location, topic_now(&api, &name)?).into_response())
}

/// One topic with its partitions.
#[utoipa::path(get, path = "/v1/topics/{name}", tag = "topics",
    params(("name" = String, Path, description = "Topic name")),
    responses((status = 200, body = dto::Topic),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
pub async fn describe_topic(
    State(api): State<Api>,
    PathOf(name): PathOf<String>,
) -> Result<Json<dto::Topic>, Problem> {
    topic_now(&api, &name)
}

/// Deletes a topic and its records.
#[utoipa::path(delete, path = "/v1/topics/{name}", tag = "topics",
    params(("name" = String, Path, description = "Topic name")),
    responses((status = 204),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn delete_topic(
    State(api): State<Api>,
    headers: HeaderMap,
    PathOf(name): PathOf<String>,
) -> Result<StatusCode, Problem> {
    let topics = vec![v1::TopicRef {
        name: name.clone(),
        ..Default::default()
    }];
    let request = v1::DeleteTopicsRequest {
        topics,
        timeout_ms: TIMEOUT_MS,
    };
    let response = api.admin.delete_topics(traced(request, &headers)).await?;
    api.controller.await_revision_of(&response).await;
    done(response.into_inner())?;
    Ok(StatusCode::NO_CONTENT)
}

/// Changes configs of a topic.
#[utoipa::path(patch, path = "/v1/topics/{name}/configs", tag = "topics",
    params(("name" = String, Path, description = "Topic name")),
    request_body = dto::ConfigChanges,
    responses((status = 200, body = dto::Topic),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn alter_configs(
    State(api): State<Api>,
    headers: HeaderMap,
    PathOf(name): PathOf<String>,
    JsonBody(changes): JsonBody<dto::ConfigChanges>,
) -> Result<Json<dto::Topic>, Problem> {
    use v1::config_change::Operation;
    let change = |name: String, operation: Operation, value: String| v1::ConfigChange {
        name,
        operation: operation.into(),
        value,
    };
    let set = changes
        .configs
        .into_iter()
        .map(|(name, value)| match value {
            Some(value) => change(name, Operation::Set, value),
            None => change(name, Operation::Delete, String::new()),
        });
    let append = changes
        .append
        .into_iter()
        .map(|(n, value)| change(n, Operation::Append, value));
    let subtract = changes
        .subtract
        .into_iter()
        .map(|(n, value)| change(n, Operation::Subtract, value));
    let request = v1::AlterTopicConfigsRequest {
        validate_only: changes.validate_only,
        topics: vec![v1::TopicConfigChanges {
            name: name.clone(),
            changes: set.chain(append).chain(subtract).collect(),
        }],
    };
    let response = api
        .admin
        .alter_topic_configs(traced(request, &headers))
        .await?;
    api.controller.await_revision_of(&response).await;
    done(response.into_inner())?;
    topic_now(&api, &name)
}

/// Adds partitions to a topic.
#[utoipa::path(post, path = "/v1/topics/{name}/partitions", tag = "topics",
    params(("name" = String, Path, description = "Topic name")),
    request_body = dto::NewPartitions,
    responses((status = 200, body = dto::Topic),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn add_partitions(
    State(api): State<Api>,
    headers: HeaderMap,
    PathOf(name): PathOf<String>,
    JsonBody(partitions): JsonBody<dto::NewPartitions>,
) -> Result<Json<dto::Topic>, Problem> {
    let request = v1::CreatePartitionsRequest {
        timeout_ms: partitions.timeout_ms.unwrap_or(TIMEOUT_MS),
        validate_only: partitions.validate_only,
        topics: vec![v1::NewPartitions {
            name: name.clone(),
            total_count: partitions.total_count,
            assignments: broker_lists(partitions.assignments),
        }],
    };
    let response = api
        .admin
        .create_partitions(traced(request, &headers))
        .await?;
    api.controller.await_revision_of(&response).await;
    done(response.into_inner())?;
    topic_now(&api, &name)
}

fn broker_lists(assignments: Vec<Vec<i32>>) -> Vec<v1::BrokerList> {
    assignments
        .into_iter()
        .map(|broker_ids| v1::BrokerList { broker_ids })
        .collect()
}

/// The request with the trace context that came over HTTP.
pub fn traced<T>(message: T, headers: &HeaderMap) -> Request<T> {
    let mut request = Request::new(message);
    let traceparent = headers
        .get("traceparent")
        .and_then(|value| value.to_str().ok());
    if let Some(Ok(traceparent)) = traceparent.map(str::parse) {
        request.metadata_mut().insert("traceparent", traceparent);
    }
    request
}

fn done(results: v1::TopicResults) -> Result<TopicId, Problem> {
    let result = results.topics.into_iter().next().ok_or_else(no_result)?;
    match Problem::of_result(result.error(), result.error_message) {
        Some(problem) => Err(problem),
        None => Ok(TopicId(
            chronik_proto::uuid("topic_id", &result.topic_id)
                .map_err(|error| Problem::internal(error.to_string()))?,
        )),
    }
}

fn topic_now(api: &Api, name: &str) -> Result<Json<dto::Topic>, Problem> {
    let image = api.controller.image();
    let topic = image
        .topic_by_name(name)
        .ok_or_else(|| Problem::unknown_topic(name))?;
    Ok(Json((&**topic).into()))
}

fn no_result() -> Problem {
    Problem::internal("the answer has no result")
}
