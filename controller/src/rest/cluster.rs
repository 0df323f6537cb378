//! GET of cluster, controllers, brokers and gateways: read from the applied image.

use axum::Json;
use axum::extract::State;
use chronik_types::cluster_image::ClusterImage;
use chronik_types::id::BrokerId;

use super::Api;
use super::dto;
use super::error::{PathOf, Problem};
use crate::placement::{Candidate, candidates};

/// The cluster at a glance.
#[utoipa::path(get, path = "/v1/cluster", tag = "cluster",
    responses((status = 200, body = dto::Cluster)))]
pub async fn describe_cluster(State(api): State<Api>) -> Json<dto::Cluster> {
    let image = api.controller.image();
    let partitions = || image.topics.values().flat_map(|topic| &topic.partitions);
    Json(dto::Cluster {
        cluster_id: image.cluster_id.clone(),
        revision: image.revision,
        controller_leader: image.controller_leader.map(|id| id.0),
        controller_count: image.controllers.len(),
        broker_count: image.brokers.len(),
        fenced_broker_count: image
            .brokers
            .values()
            .filter(|broker| broker.fenced)
            .count(),
        gateway_count: image.gateways.len(),
        topic_count: image.topics.len(),
        partition_count: partitions().count(),
        leaderless_partition_count: partitions().filter(|p| p.leader.is_none()).count(),
        under_replicated_partition_count: partitions().filter(|p| p.is_under_replicated()).count(),
        reassigning_partition_count: partitions().filter(|p| p.reassignment.is_some()).count(),
    })
}

/// All controllers.
#[utoipa::path(get, path = "/v1/controllers", tag = "cluster",
    responses((status = 200, body = dto::Controllers)))]
pub async fn list_controllers(State(api): State<Api>) -> Json<dto::Controllers> {
    let image = api.controller.image();
    let controllers = image
        .controllers
        .values()
        .map(|controller| dto::Controller {
            controller_id: controller.controller_id.0,
            rpc_address: controller.rpc_address.clone(),
            rest_address: controller.rest_address.clone(),
            is_leader: image.controller_leader == Some(controller.controller_id),
        })
        .collect();
    Json(dto::Controllers { controllers })
}

/// All registered brokers.
#[utoipa::path(get, path = "/v1/brokers", tag = "cluster",
    responses((status = 200, body = dto::Brokers)))]
pub async fn list_brokers(State(api): State<Api>) -> Json<dto::Brokers> {
    Json(dto::Brokers {
        brokers: brokers(&api.controller.image()),
    })
}

/// One broker.
#[utoipa::path(get, path = "/v1/brokers/{broker_id}", tag = "cluster",
    params(("broker_id" = i32, Path, description = "Broker id")),
    responses((status = 200, body = dto::Broker),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
pub async fn describe_broker(
    State(api): State<Api>,
    PathOf(broker_id): PathOf<i32>,
) -> Result<Json<dto::Broker>, Problem> {
    let brokers = brokers(&api.controller.image());
    let broker = brokers
        .into_iter()
        .find(|broker| broker.broker_id == broker_id);
    broker
        .map(Json)
        .ok_or_else(|| Problem::not_found(format!("broker {broker_id} is not registered")))
}

/// All live gateways.
#[utoipa::path(get, path = "/v1/gateways", tag = "cluster",
    responses((status = 200, body = dto::Gateways)))]
pub async fn list_gateways(State(api): State<Api>) -> Json<dto::Gateways> {
    let image = api.controller.image();
    Json(dto::Gateways {
        gateways: image.gateways.values().map(Into::into).collect(),
    })
}

fn brokers(image: &ClusterImage) -> Vec<dto::Broker> {
    let loads = candidates(image);
    let replica_count = |broker_id: BrokerId| {
        loads
            .iter()
            .find(|candidate: &&Candidate| candidate.broker_id == broker_id)
            .map_or(0, |candidate| candidate.replica_count)
    };
    let leader_count = |broker_id: BrokerId| {
        let partitions = image.topics.values().flat_map(|topic| &topic.partitions);
        partitions
            .filter(|partition| partition.leader == Some(broker_id))
            .count()
    };
    image
        .brokers
        .values()
        .map(|broker| dto::Broker {
            broker_id: broker.broker_id.0,
            rpc_address: broker.rpc_address.clone(),
            rack: broker.rack.clone(),
            fenced: broker.fenced,
            drain: broker.drain.into(),
            broker_epoch: broker.broker_epoch.0,
            incarnation_id: broker.incarnation_id.to_string(),
            leader_count: leader_count(broker.broker_id),
            replica_count: replica_count(broker.broker_id),
        })
        .collect()
}
