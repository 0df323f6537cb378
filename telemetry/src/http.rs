//! `/metrics`, `/healthz` and `/readyz` of a service.
//!
//! Invariant: `/healthz` says that the process runs; `/readyz` says that it can do its work now,
//! and if not, why.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether a service can do its work now. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Health {
    /// `Err` holds why not.
    ready: Arc<Mutex<Result<(), String>>>,
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl Health {
    /// Not ready, because it starts.
    pub fn new() -> Self {
        Self {
            ready: Arc::new(Mutex::new(Err("starting".to_owned()))),
        }
    }

    /// Sets the answer of `/readyz`; `why` is shown where it is not ready.
    pub fn set_ready(&self, ready: bool, why: &str) {
        let state = if ready { Ok(()) } else { Err(why.to_owned()) };
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// `Err` says why the service is not ready.
    pub fn readiness(&self) -> Result<(), String> {
        self.ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// The three routes, to be merged into a service's own router.
pub fn router(registry: Arc<Registry>, health: Health) -> Router {
    Router::new()
        .route("/metrics", get(move || metrics(registry.clone())))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(move || readyz(health.clone())))
}

/// Serves the three routes until `stop`.
pub async fn serve_http(
    listener: TcpListener,
    registry: Arc<Registry>,
    health: Health,
    stop: CancellationToken,
) -> io::Result<()> {
    axum::serve(listener, router(registry, health))
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn metrics(registry: Arc<Registry>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn readyz(health: Health) -> Response {
    match health.readiness() {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {why}\n"),
        )
            .into_response(),
    }
}
