//! The REST admin API: router, OpenAPI, and the answers to what no route takes.
//!
//! Invariant: every error is a problem document (RFC 9457). Writes go the same way as those that
//! come over gRPC, so any controller takes them.

mod backup;
mod cluster;
mod dto;
mod error;
mod operations;
mod partition_state;
mod placement;
mod placement_dto;
mod topics;

pub use dto::PartitionState;
pub use partition_state::is_in as is_partition_in;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{Method, Uri};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use chronik_telemetry::http::Health;
use prometheus_client::registry::Registry;
use tokio::sync::Semaphore;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::controller::Controller;
use crate::rpc::admin::AdminRpc;
use error::Problem;

/// Largest request body.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What handlers work with.
#[derive(Clone)]
pub struct Api {
    controller: Controller,
    admin: AdminRpc,
    /// Backups that may be under way.
    backups: Arc<Semaphore>,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Chronik controller",
        description = "Admin API of a Chronik cluster. Any controller takes any request."
    ),
    tags(
        (name = "cluster", description = "Controllers, brokers, gateways"),
        (name = "topics", description = "Topics, partitions, configs"),
        (name = "placement", description = "Where replicas and leaders are, and moves of them")
    )
)]
struct ApiDoc;

/// The routes of the API, and their description.
pub fn api(controller: Controller) -> (Router, utoipa::openapi::OpenApi) {
    let admin = AdminRpc::new(controller.clone());
    let (router, document) = OpenApiRouter::with_openapi(ApiDoc::openapi())
        .routes(routes!(cluster::describe_cluster))
        .routes(routes!(backup::backup_cluster))
        .routes(routes!(cluster::list_controllers))
        .routes(routes!(cluster::list_brokers))
        .routes(routes!(
            operations::describe_settings,
            operations::alter_settings
        ))
        .routes(routes!(
            cluster::describe_broker,
            operations::unregister_broker
        ))
        .routes(routes!(
            operations::drain_broker,
            operations::describe_drain,
            operations::end_drain
        ))
        .routes(routes!(cluster::list_gateways))
        .routes(routes!(topics::list_topics, topics::create_topic))
        .routes(routes!(topics::describe_topic, topics::delete_topic))
        .routes(routes!(topics::alter_configs))
        .routes(routes!(topics::add_partitions))
        .routes(routes!(placement::list_partitions))
        .routes(routes!(
            placement::list_reassignments,
            placement::alter_reassignments,
            placement::cancel_reassignments
        ))
        .routes(routes!(placement::elect_leaders))
        .routes(routes!(placement::rebalance))
        .split_for_parts();
    let state = Api {
        controller,
        admin,
        backups: Arc::new(Semaphore::new(backup::BACKUPS_MAX)),
    };
    (router.with_state(state), document)
}

/// Everything on the REST port.
pub fn router(controller: Controller, registry: Arc<Registry>, health: Health) -> Router {
    let (router, document) = api(controller.clone());
    let probes = chronik_telemetry::http::router(registry, health)
        .layer(middleware::from_fn_with_state(controller, observe));
    let document = Arc::new(document);
    router
        .route(
            "/openapi.json",
            get(move || async move { axum::Json((*document).clone()) }),
        )
        .merge(probes)
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(error::name_instance))
}

async fn unknown_route(uri: Uri) -> Problem {
    Problem::not_found(format!("there is nothing at {}", uri.path()))
}

async fn unknown_method(method: Method, uri: Uri) -> Problem {
    Problem::method_not_allowed(format!("{} does not take {method}", uri.path()))
}

/// Gauges are read when somebody asks.
async fn observe(State(controller): State<Controller>, request: Request, next: Next) -> Response {
    if request.uri().path() == "/metrics" {
        controller.metrics().observe(&controller);
    }
    next.run(request).await
}
