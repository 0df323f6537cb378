//! Operating brokers and the cluster: drain, decommission, unregister, settings.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use chronik_proto::v1;
use chronik_proto::v1::admin_server::Admin;
use chronik_types::id::BrokerId;

use super::Api;
use super::dto;
use super::error::{JsonBody, PathOf, Problem};
use super::topics::traced;

/// Begins to move leaders, and for a decommission all replicas, off a broker.
#[utoipa::path(post, path = "/v1/brokers/{broker_id}/drain", tag = "cluster",
    params(("broker_id" = i32, Path, description = "Broker id")),
    request_body = dto::NewDrain,
    responses((status = 200, body = dto::Drain),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn drain_broker(
    State(api): State<Api>,
    headers: HeaderMap,
    PathOf(broker_id): PathOf<i32>,
    JsonBody(wanted): JsonBody<dto::NewDrain>,
) -> Result<Json<dto::Drain>, Problem> {
    let drain = match wanted.decommission {
        true => v1::Drain::Replicas,
        false => v1::Drain::Leaders,
    };
    set_drain(&api, &headers, broker_id, drain).await
}

/// What a drain has still to do.
#[utoipa::path(get, path = "/v1/brokers/{broker_id}/drain", tag = "cluster",
    params(("broker_id" = i32, Path, description = "Broker id")),
    responses((status = 200, body = dto::Drain),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
pub async fn describe_drain(
    State(api): State<Api>,
    PathOf(broker_id): PathOf<i32>,
) -> Result<Json<dto::Drain>, Problem> {
    drain_now(&api, broker_id)
}

/// Ends a drain: the broker may lead and hold replicas again. Moves off it that are not done go back.
#[utoipa::path(delete, path = "/v1/brokers/{broker_id}/drain", tag = "cluster",
    params(("broker_id" = i32, Path, description = "Broker id")),
    responses((status = 200, body = dto::Drain),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn end_drain(
    State(api): State<Api>,
    headers: HeaderMap,
    PathOf(broker_id): PathOf<i32>,
) -> Result<Json<dto::Drain>, Problem> {
    set_drain(&api, &headers, broker_id, v1::Drain::None).await
}

/// Removes a broker from the cluster that is stopped and holds nothing.
#[utoipa::path(delete, path = "/v1/brokers/{broker_id}", tag = "cluster",
    params(("broker_id" = i32, Path, description = "Broker id")),
    responses((status = 204),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn unregister_broker(
    State(api): State<Api>,
    headers: HeaderMap,
    PathOf(broker_id): PathOf<i32>,
) -> Result<StatusCode, Problem> {
    let request = v1::UnregisterBrokerRequest { broker_id };
    let response = api
        .admin
        .unregister_broker(traced(request, &headers))
        .await?;
    api.controller.await_revision_of(&response).await;
    done(response.into_inner())?;
    Ok(StatusCode::NO_CONTENT)
}

/// Settings of the whole cluster that can be changed while it runs.
#[utoipa::path(get, path = "/v1/cluster/settings", tag = "cluster",
    responses((status = 200, body = dto::ClusterSettings)))]
pub async fn describe_settings(State(api): State<Api>) -> Json<dto::ClusterSettings> {
    let image = api.controller.image();
    Json(v1::ClusterSettings::from(&image.settings).into())
}

/// Changes settings of the whole cluster; what is not named stays as it is.
#[utoipa::path(patch, path = "/v1/cluster/settings", tag = "cluster",
    request_body = dto::ClusterSettingsChange,
    responses((status = 200, body = dto::ClusterSettings),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
        (status = 504, body = Problem, content_type = "application/problem+json")))]
pub async fn alter_settings(
    State(api): State<Api>,
    headers: HeaderMap,
    JsonBody(change): JsonBody<dto::ClusterSettingsChange>,
) -> Result<Json<dto::ClusterSettings>, Problem> {
    let request = v1::AlterClusterSettingsRequest {
        reassignment_parallel_max: change.reassignment_parallel_max,
        reassignment_bytes_per_second: change.reassignment_bytes_per_second,
        leader_balance_enable: change.leader_balance_enable,
    };
    let response = api
        .admin
        .alter_cluster_settings(traced(request, &headers))
        .await?;
    api.controller.await_revision_of(&response).await;
    Ok(Json(response.into_inner().into()))
}

async fn set_drain(
    api: &Api,
    headers: &HeaderMap,
    broker_id: i32,
    drain: v1::Drain,
) -> Result<Json<dto::Drain>, Problem> {
    let request = v1::SetBrokerDrainRequest {
        broker_id,
        drain: drain.into(),
    };
    let response = api.admin.set_broker_drain(traced(request, headers)).await?;
    api.controller.await_revision_of(&response).await;
    done(response.into_inner())?;
    drain_now(api, broker_id)
}

fn done(result: v1::BrokerResult) -> Result<(), Problem> {
    match Problem::of_result(result.error(), result.error_message) {
        Some(problem) => Err(problem),
        None => Ok(()),
    }
}

fn drain_now(api: &Api, broker_id: i32) -> Result<Json<dto::Drain>, Problem> {
    let image = api.controller.image();
    let id = BrokerId(broker_id);
    let broker = image.brokers.get(&id);
    let broker =
        broker.ok_or_else(|| Problem::not_found(format!("broker {id} is not registered")))?;
    let partitions = || image.topics.values().flat_map(|topic| &topic.partitions);
    let held = || partitions().filter(|partition| partition.replica_on(id).is_some());
    let leader_count = partitions().filter(|p| p.leader == Some(id)).count();
    // Nobody else could lead these: they have one replica, or no other one is in sync.
    let stuck_count = held()
        .filter(|p| p.leader == Some(id) && p.isr.iter().all(|other| *other == id))
        .count();
    let replica_count = held().count();
    let drain = dto::DrainKind::from(broker.drain);
    let left = match drain {
        dto::DrainKind::None => None,
        dto::DrainKind::Leaders => Some(leader_count),
        dto::DrainKind::Replicas => Some(replica_count),
    };
    Ok(Json(dto::Drain {
        broker_id,
        drain,
        leader_count,
        replica_count,
        moving_count: held().filter(|p| p.removing().contains(&id)).count(),
        stuck_leader_count: stuck_count,
        done: left == Some(0),
    }))
}
