//! `chronik-gateway`: the Kafka protocol towards clients, gRPC towards brokers and controllers.
//!
//! Invariants: a gateway keeps nothing that must survive; it never reads into a record beyond the
//! `traceparent` header of a sampled request; only this crate knows Kafka's versions and error
//! codes.

#[macro_use]
mod message;

pub mod config;
pub mod protocol;

mod error;
mod log_limit;
mod metrics;

mod endpoints;
mod metadata_cache;

mod controller_client;
mod leader_router;
mod producer_ids;
mod rpc_channel;
mod trace_header;

mod services;

mod handlers;

mod dispatch;

mod connection;
mod listener;

#[cfg(test)]
mod testing;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use chronik_telemetry::http::{Health, serve_http};
use chronik_types::cluster_image::{Endpoint, Gateway};
use futures::future::BoxFuture;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use uuid::Uuid;

use config::{Config, parse_endpoint};
use controller_client::{ControllerClient, hold_session, keep_image_on_disk, watch_image};
use leader_router::LeaderRouter;
use listener::{Connections, Listener};
use metadata_cache::MetadataCache;
use metrics::Metrics;
use services::Services;

/// Starts a gateway: binds its ports and spawns its tasks. Nothing is waited for; `/readyz` says
/// when clients can be served. Boxed, so that all of it is compiled with this crate, not with its callers.
pub fn start(config: Config) -> BoxFuture<'static, anyhow::Result<Running>> {
    Box::pin(start_parts(config))
}

async fn start_parts(config: Config) -> anyhow::Result<Running> {
    config.validate().map_err(|why| anyhow!(why))?;
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot create data-dir {}", config.data_dir.display()))?;

    // 1. Ports.
    let listeners = bind_all(&config).await?;
    let kafka_addresses = listeners
        .iter()
        .map(|l| l.socket.local_addr())
        .collect::<Result<Vec<_>, _>>()?;
    let http = TcpListener::bind(&config.http_listen)
        .await
        .with_context(|| format!("cannot listen on http-listen {}", config.http_listen))?;
    let http_address = http.local_addr()?;

    // 2. Components.
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let own = Gateway {
        gateway_id: config.gateway_id.clone(),
        incarnation_id: Uuid::new_v4(),
        rack: config.rack.clone(),
        endpoints: listeners.iter().map(|l| l.endpoint.clone()).collect(),
    };
    let cache = Arc::new(MetadataCache::new(own));
    let mut revision_on_disk = 0;
    if let Some(image) = metadata_cache::read_from_disk(&config.data_dir) {
        info!(
            revision = image.revision,
            "starting with the last cluster image"
        );
        revision_on_disk = image.revision;
        metrics
            .image_revision
            .set(i64::try_from(image.revision).unwrap_or(i64::MAX));
        cache.store(image);
    }
    let in_flight_max = config.limits.broker_in_flight_bytes;
    let router = Arc::new(LeaderRouter::new(in_flight_max, metrics.clone()));
    let controllers = Arc::new(ControllerClient::new(&config.controllers).context("controllers")?);
    let drain_timeout = Duration::from_millis(config.limits.drain_timeout_ms);
    let data_dir = config.data_dir.clone();
    let services = Arc::new(Services::new(
        config,
        cache.clone(),
        router.clone(),
        controllers.clone(),
        metrics.clone(),
    ));

    // 3. Tasks. `drain` stops what brings new work, `stop` what the remaining work needs.
    let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
    let tracker = TaskTracker::new();
    let health = Health::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(hold_session(
        controllers.clone(),
        cache.clone(),
        drain.clone(),
    ));
    tasks.spawn(watch_image(
        controllers,
        cache.clone(),
        metrics,
        stop.clone(),
    ));
    tasks.spawn(keep_image_on_disk(
        cache.clone(),
        data_dir,
        revision_on_disk,
        stop.clone(),
    ));
    tasks.spawn(router.follow_cache(cache.clone(), stop.clone()));
    tasks.spawn(report_health(cache, health.clone(), drain.clone()));
    let (registry, http_stop) = (Arc::new(registry), stop.clone());
    tasks.spawn(async move {
        if let Err(error) = serve_http(http, registry, health, http_stop).await {
            warn!(%error, "the HTTP endpoint failed");
        }
    });
    let connections = Arc::new(Connections::new(
        services,
        tracker.clone(),
        drain.clone(),
        stop.clone(),
    ));
    for listener in listeners {
        tasks.spawn(connections.clone().accept(listener));
    }
    info!(?kafka_addresses, %http_address, "listening");
    Ok(Running {
        kafka_addresses,
        http_address,
        tasks,
        tracker,
        drain,
        stop,
        drain_timeout,
    })
}

/// A started gateway. Dropping it stops nothing in order; call `run_until` or `shut_down`.
pub struct Running {
    /// Where the listeners are bound, in the configuration's order.
    pub kafka_addresses: Vec<SocketAddr>,
    pub http_address: SocketAddr,
    tasks: JoinSet<()>,
    tracker: TaskTracker,
    drain: CancellationToken,
    stop: CancellationToken,
    drain_timeout: Duration,
}

impl Running {
    /// Runs until `stop`, or until a task ends that never should.
    pub async fn run_until(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let ended = tokio::select! {
            () = stop.cancelled() => None,
            ended = self.tasks.join_next() => ended,
        };
        self.shut_down().await;
        match ended {
            None => Ok(()),
            Some(Ok(())) => Err(anyhow!("a task of the gateway ended early")),
            Some(Err(error)) => Err(error).context("a task of the gateway failed"),
        }
    }

    /// Takes no new connections, lets open ones answer what they took, then stops.
    pub async fn shut_down(mut self) {
        self.drain.cancel();
        self.tracker.close();
        if timeout(self.drain_timeout, self.tracker.wait())
            .await
            .is_err()
        {
            warn!(
                connections = self.tracker.len(),
                "drain deadline passed; closing connections"
            );
        }
        self.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(Duration::from_secs(3), all).await.is_err() {
            warn!("some tasks did not stop in time");
        }
    }
}

async fn bind_all(config: &Config) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Vec::with_capacity(config.listeners.len());
    for (number, address) in config.listeners.iter().enumerate() {
        let socket = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}; is it in use?"))?;
        let advertised = config.advertised_listeners.get(number).unwrap_or(address);
        let mut endpoint: Endpoint =
            parse_endpoint("advertised-listeners", advertised).map_err(|why| anyhow!(why))?;
        if endpoint.port == 0 {
            endpoint.port = socket.local_addr()?.port();
        }
        listeners.push(Listener { socket, endpoint });
    }
    Ok(listeners)
}

/// Ready as soon as any image is known: with the last one from disk, produce and fetch work while
/// no controller answers.
async fn report_health(cache: Arc<MetadataCache>, health: Health, drain: CancellationToken) {
    health.set_ready(false, "no cluster image yet; no controller has answered");
    tokio::select! {
        _ = cache.wait_until(|snapshot| snapshot.is_known()) => health.set_ready(true, ""),
        () = drain.cancelled() => {}
    }
    drain.cancelled().await;
    health.set_ready(false, "stopping");
}
