//! Where replicas and leaders are: partitions by state, moves of replicas, elections, rebalancing.

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use chronik_proto::v1;
use chronik_proto::v1::admin_server::Admin;
use chronik_types::cluster_image::{ClusterImage, Partition, Topic};
use chronik_types::id::BrokerId;
use serde::Deserialize;
use utoipa::IntoParams;

use super::dto;
use super::error::{JsonBody, Problem, QueryOf};
use super::topics::traced;
use super::{Api, partition_state};
use crate::rebalance::balance_moves;

const TIMEOUT_MS: u32 = 10_000;

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct PartitionQuery {
    /// Only of this topic.
    pub topic: Option<String>,
    /// Only partitions in this state.
    pub state: Option<dto::PartitionState>,
}

/// Partitions of all topics, or those in a state that needs attention.
#[utoipa::path(get, path = "/v1/partitions", tag = "placement", params(PartitionQuery),
    responses((status = 200, body = dto::Partitions),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
pub async fn list_partitions(
    State(api): State<Api>,
    QueryOf(query): QueryOf<PartitionQuery>,
) -> Result<Json<dto::Partitions>, Problem> {
    let image = api.controller.image();
    let mut topics: Vec<&Topic> = match &query.topic {
        None => image.topics.values().map(|topic| &**topic).collect(),
        Some(name) => {
            let topic = image.topic_by_name(name);
            vec![topic.ok_or_else(|| Problem::unknown_topic(name))?]
        }
    };
    topics.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let mut partitions = Vec::new();
    for topic in topics {
        for partition in &topic.partitions {
            let is_wanted = |state| partition_state::is_in(&image, topic, partition, state);
            if query.state.is_none_or(is_wanted) {
                partitions.push(dto::PartitionOfTopic {
                    topic: topic.name.to_string(),
                    min_insync_replicas: partition_state::min_insync_replicas(topic),
                    partition: partition.into(),
                });
            }
        }
    }
    Ok(Json(dto::Partitions { partitions }))
}

/// Moves of replicas that were asked for and are not done, with their progress.
#[utoipa::path(get, path = "/v1/reassignments", tag = "placement",
    responses((status = 200, body = dto::Reassignments),
        (status = 503, body = Problem, content_type = "application/problem+json")))]
pub async fn list_reassignments(
    State(api): State<Api>,
    headers: HeaderMap,
) -> Result<Json<dto::Reassignments>, Problem> {
    let request = v1::ListReassignmentsRequest::default();
    let response = api
        .admin
        .list_reassignments(traced(request, &headers))
        .await?;
    let reassignments = response.into_inner().reassignments;
    Ok(Json(dto::Reassignments {
        reassignments: reassignments.into_iter().map(Into::into).collect(),
    }))
}

/// Asks for moves of replicas. Each partition has its own result; the moves go on by themselves.
#[utoipa::path(post, path = "/v1/reassignments", tag = "placement",
    request_body = dto::NewReassignments,
    responses((status = 200, body = dto::PartitionResults),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn alter_reassignments(
    State(api): State<Api>,
    headers: HeaderMap,
    JsonBody(wanted): JsonBody<dto::NewReassignments>,
) -> Result<Json<dto::PartitionResults>, Problem> {
    let change = |one: dto::NewReassignment| v1::ReassignmentChange {
        topic: one.topic,
        partition: one.partition,
        target: Some(v1::BrokerList {
            broker_ids: one.replicas,
        }),
    };
    let request = v1::AlterReassignmentsRequest {
        changes: wanted.partitions.into_iter().map(change).collect(),
        validate_only: wanted.validate_only,
        ..Default::default()
    };
    alter(&api, &headers, request).await
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct CancelQuery {
    /// Only of this topic.
    pub topic: Option<String>,
    /// Only this partition of the topic.
    pub partition: Option<i32>,
}

/// Cancels moves of replicas: all, those of a topic, or one. Partitions go back to where they were.
#[utoipa::path(delete, path = "/v1/reassignments", tag = "placement", params(CancelQuery),
    responses((status = 200, body = dto::PartitionResults),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn cancel_reassignments(
    State(api): State<Api>,
    headers: HeaderMap,
    QueryOf(query): QueryOf<CancelQuery>,
) -> Result<Json<dto::PartitionResults>, Problem> {
    let listed = v1::ListReassignmentsRequest::default();
    let listed = api
        .admin
        .list_reassignments(traced(listed, &headers))
        .await?;
    let moving = listed.into_inner().reassignments.into_iter().filter(|one| {
        query.topic.as_ref().is_none_or(|topic| *topic == one.topic)
            && query.partition.is_none_or(|index| index == one.partition)
    });
    let request = v1::AlterReassignmentsRequest {
        changes: moving
            .map(|one| v1::ReassignmentChange {
                topic: one.topic,
                partition: one.partition,
                target: None,
            })
            .collect(),
        ..Default::default()
    };
    if request.changes.is_empty() && query.partition.is_some() {
        return Err(Problem::not_found("no move of the partition is under way"));
    }
    alter(&api, &headers, request).await
}

/// Has preferred leaders elected at once: of the named partitions, or of all.
#[utoipa::path(post, path = "/v1/leader-elections", tag = "placement",
    request_body = dto::NewElections,
    responses((status = 200, body = dto::PartitionResults),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn elect_leaders(
    State(api): State<Api>,
    headers: HeaderMap,
    JsonBody(wanted): JsonBody<dto::NewElections>,
) -> Result<Json<dto::PartitionResults>, Problem> {
    let reference = |one: dto::PartitionRef| v1::PartitionRef {
        topic: one.topic,
        partition: one.partition,
    };
    let request = v1::ElectLeadersRequest {
        all: wanted.partitions.is_none(),
        partitions: wanted
            .partitions
            .unwrap_or_default()
            .into_iter()
            .map(reference)
            .collect(),
        unclean: wanted.unclean,
        timeout_ms: wanted.timeout_ms.unwrap_or(TIMEOUT_MS),
    };
    let response = api.admin.elect_leaders(traced(request, &headers)).await?;
    api.controller.await_revision_of(&response).await;
    results(response.into_inner())
}

/// Works out the moves that make brokers hold equal numbers of replicas and preferred leaders, and
/// asks for them unless it is a dry run.
#[utoipa::path(post, path = "/v1/rebalance", tag = "placement", request_body = dto::NewRebalance,
    responses((status = 200, body = dto::Rebalance),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn rebalance(
    State(api): State<Api>,
    headers: HeaderMap,
    JsonBody(wanted): JsonBody<dto::NewRebalance>,
) -> Result<Json<dto::Rebalance>, Problem> {
    let image = api.controller.image();
    let moves: Vec<dto::RebalanceMove> = balance_moves(&image)
        .into_iter()
        .filter_map(|change| {
            let (topic, partition) = of(&image, &change)?;
            Some(dto::RebalanceMove {
                topic: topic.name.to_string(),
                partition: partition.partition.0,
                from: partition.brokers().map(|id| id.0).collect(),
                to: ids(&change.target.unwrap_or_default()),
            })
        })
        .collect();
    if !wanted.dry_run && !moves.is_empty() {
        let change = |one: &dto::RebalanceMove| v1::ReassignmentChange {
            topic: one.topic.clone(),
            partition: one.partition,
            target: Some(v1::BrokerList {
                broker_ids: one.to.clone(),
            }),
        };
        let request = v1::AlterReassignmentsRequest {
            changes: moves.iter().map(change).collect(),
            cause: v1::reassignment::Cause::Balance.into(),
            ..Default::default()
        };
        let response = api
            .admin
            .alter_reassignments(traced(request, &headers))
            .await?;
        api.controller.await_revision_of(&response).await;
    }
    Ok(Json(dto::Rebalance {
        executed: !wanted.dry_run,
        moves,
    }))
}

fn of<'a>(
    image: &'a ClusterImage,
    change: &crate::command::ReassignmentChange,
) -> Option<(&'a Topic, &'a Partition)> {
    let topic = image.topic(change.topic_id)?;
    Some((topic, topic.partition(change.partition)?))
}

fn ids(brokers: &[BrokerId]) -> Vec<i32> {
    brokers.iter().map(|id| id.0).collect()
}

async fn alter(
    api: &Api,
    headers: &HeaderMap,
    request: v1::AlterReassignmentsRequest,
) -> Result<Json<dto::PartitionResults>, Problem> {
    let response = api
        .admin
        .alter_reassignments(traced(request, headers))
        .await?;
    api.controller.await_revision_of(&response).await;
    results(response.into_inner())
}

/// The results of all partitions; where every one was refused, the first one's problem.
fn results(results: v1::PartitionResults) -> Result<Json<dto::PartitionResults>, Problem> {
    let mut partitions = Vec::with_capacity(results.partitions.len());
    for result in results.partitions {
        let place = format!("{}-{}", result.topic, result.partition);
        let error = result.error();
        let detail = format!("{place}: {}", result.error_message);
        partitions.push(dto::PartitionResult {
            topic: result.topic,
            partition: result.partition,
            problem: Problem::of_result(error, detail),
        });
    }
    if partitions.iter().all(|one| one.problem.is_some())
        && let Some(problem) = partitions.iter_mut().find_map(|one| one.problem.take())
    {
        return Err(problem);
    }
    Ok(Json(dto::PartitionResults { partitions }))
}
