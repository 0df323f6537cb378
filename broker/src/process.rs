//! The composition root: every part of the broker is made, started and stopped here.
//!
//! Invariant: replicas known from disk run before the first message of a peer is read; leadership is
//! handed over before anything else stops; storage is closed last.

mod observer;
mod parts;
mod serve;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use chronik_storage::{Disk, RealDisk, Storage};
use chronik_telemetry::http::{Health, serve_http};
use chronik_types::id::{BrokerId, RaftGroupId};
use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::parts::Parts;
use self::serve::{Services, serve_rpc};
use crate::config::Config;
use crate::consumer_group::replica_log::ConsumerGroups;
use crate::controller_client::ControllerClient;
use crate::leadership::{Successors, hand_over_all};
use crate::peers::{Connector, GrpcConnector, Peers};
use crate::replicas::Replicas;

const TELL_SHUTTING_DOWN_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the remaining tasks may take to end at a stop.
const TASKS_TIMEOUT: Duration = Duration::from_secs(2);
/// Replicas stopped at the same time.
const PARALLEL_MAX: usize = 64;

/// A broker that runs.
pub struct Running {
    pub broker_id: BrokerId,
    /// Where gRPC is served.
    pub rpc_address: SocketAddr,
    /// Where /metrics, /healthz and /readyz are served.
    pub http_address: SocketAddr,
    shutdown_transfer_timeout: Duration,
    storage: Storage,
    replicas: Replicas,
    client: ControllerClient,
    peers: Peers,
    groups: Arc<ConsumerGroups>,
    health: Health,
    draining: watch::Sender<bool>,
    /// Ends everything but the gRPC server.
    stop: CancellationToken,
    /// Ends the gRPC server.
    stop_rpc: CancellationToken,
    tasks: JoinSet<anyhow::Result<&'static str>>,
}

/// What a broker runs on: its network and its disk. Tests put others in their place.
pub(crate) struct Host {
    pub connector: Arc<dyn Connector>,
    pub disk: Arc<dyn Disk>,
}

impl Default for Host {
    fn default() -> Self {
        Host {
            connector: Arc::new(GrpcConnector),
            disk: Arc::new(RealDisk),
        }
    }
}

/// Starts a broker. It serves what it has on its disk at once, and registers as soon as a
/// controller answers. Boxed, so that all of it is compiled with this crate, not with its callers.
pub fn start(config: Config) -> BoxFuture<'static, anyhow::Result<Running>> {
    Box::pin(start_with(config, Host::default()))
}

/// As `start`, on another host.
pub(crate) async fn start_with(config: Config, host: Host) -> anyhow::Result<Running> {
    config.validate().map_err(anyhow::Error::msg)?;
    // 1. Ports first: a second process on the same machine fails before it touches anything.
    let rpc_listener = bind(config.rpc_listen, "rpc-listen").await?;
    let http_listener = bind(config.http_listen, "http-listen").await?;
    let rpc_address = rpc_listener.local_addr()?;
    let http_address = http_listener.local_addr()?;
    // 2. Storage, the last image, the transport.
    let mut parts = Parts::open(&config, rpc_address, host).await?;
    // 3. The replicas known from disk.
    let saved = parts.client.view().borrow().clone();
    parts.reconciler.reconcile(&saved).await;
    // 4. Everything that runs. A task that ends by itself ends the process.
    let health = Health::new();
    let draining = watch::Sender::new(false);
    let stop_rpc = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let services = Services {
        replicas: &parts.replicas,
        groups: &parts.groups,
        peers: &parts.peers,
        storage: &parts.storage,
        metrics: &parts.metrics,
        folder: config.data_dir.clone(),
    };
    tasks.spawn(serve_rpc(rpc_listener, services, stop_rpc.clone()));
    let registry = Arc::new(std::mem::take(&mut parts.registry));
    let http = serve_http(http_listener, registry, health.clone(), parts.stop.clone());
    tasks.spawn(async move { http.await.context("http server").map(|()| "http server") });
    let observer = parts.observer(health.clone());
    tasks.spawn(named("observer", observer.run(parts.stop.clone())));
    let running = parts.spawn_workers(&config, &draining, &mut tasks);
    running.client.start();
    let broker_id = config.broker_id;
    info!(broker_id, %rpc_address, %http_address, "broker started");
    Ok(Running {
        broker_id: BrokerId(broker_id),
        rpc_address,
        http_address,
        shutdown_transfer_timeout: Duration::from_millis(
            config.replication.shutdown_transfer_timeout_ms,
        ),
        storage: running.storage,
        replicas: running.replicas,
        client: running.client,
        peers: running.peers,
        groups: running.groups,
        health,
        draining,
        stop: running.stop,
        stop_rpc,
        tasks,
    })
}

impl Running {
    /// Runs until `stop` is cancelled, and then stops in order; or until something fails.
    pub async fn run_until(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let failed = self.storage.failed();
        tokio::select! {
            () = stop.cancelled() => self.shut_down().await,
            why = failed => {
                // What is on the disk is not known any more: stop at once, write nothing else.
                self.health.set_ready(false, "the storage failed");
                self.abort();
                Err(anyhow::Error::new(why).context("the storage failed, the broker must stop"))
            }
            ended = self.tasks.join_next() => {
                self.abort();
                let name = ended.context("no task is left")?.context("a task panicked")??;
                anyhow::bail!("{name} ended by itself")
            }
        }
    }

    /// Ends all work as a crash would, but for the process itself; for tests of recovery.
    pub fn abort(&mut self) {
        self.storage.leave_unfinished_copies();
        self.stop.cancel();
        self.stop_rpc.cancel();
        self.tasks.abort_all();
    }

    /// Replicas that run here.
    pub fn replicas(&self) -> &Replicas {
        &self.replicas
    }

    #[cfg(test)]
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    async fn shut_down(mut self) -> anyhow::Result<()> {
        self.health.set_ready(false, "shutting down");
        // 1. Nothing new comes here, and the others know why.
        self.draining.send_replace(true);
        if !self
            .client
            .tell_shutting_down(TELL_SHUTTING_DOWN_TIMEOUT)
            .await
        {
            warn!("no controller could be told that this broker stops");
        }
        // 2. Leadership goes to followers that have everything.
        let left = self.hand_over().await;
        if left > 0 {
            warn!(partitions = left, "stops while still leading partitions");
        }
        // 3. Requests, then coordinators, then Raft. Copies under way go on after the next start.
        self.storage.leave_unfinished_copies();
        self.stop_rpc.cancel();
        self.stop.cancel();
        let tasks = async { while self.tasks.join_next().await.is_some() {} };
        let parts = async {
            self.groups.shutdown().await;
            self.client.stopped().await;
            self.peers.stopped().await;
        };
        let ended = timeout(TASKS_TIMEOUT, futures::future::join(tasks, parts));
        if ended.await.is_err() {
            warn!("some tasks did not end in time");
            self.tasks.abort_all();
        }
        let all = self.replicas.all();
        futures::stream::iter(&all)
            .for_each_concurrent(PARALLEL_MAX, |(_, replica)| replica.shutdown())
            .await;
        // 4. Everything is on the disk, so that the next start replays almost nothing.
        let storage = self.storage.clone();
        tokio::task::spawn_blocking(move || storage.close())
            .await?
            .context("closing storage")
    }

    async fn hand_over(&self) -> usize {
        let image = self.client.view().borrow().image.clone();
        let partitions = image.topics.values().flat_map(|topic| &topic.partitions);
        let in_sync: HashMap<RaftGroupId, &Vec<BrokerId>> = partitions
            .map(|partition| (partition.raft_group_id, &partition.isr))
            .collect();
        let led = self
            .replicas
            .all()
            .into_iter()
            .filter(|(_, replica)| replica.leadership().borrow().is_leader)
            .map(|(group, replica)| {
                let isr = in_sync.get(&group).map(|isr| isr.to_vec());
                (replica, isr.unwrap_or_default())
            })
            .collect();
        let successors = Successors {
            links: self.peers.links(),
            view: self.client.view(),
        };
        hand_over_all(led, &successors, self.shutdown_transfer_timeout).await
    }
}

async fn named(name: &'static str, work: impl Future<Output = ()>) -> anyhow::Result<&'static str> {
    work.await;
    Ok(name)
}

async fn bind(address: SocketAddr, setting: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}; check {setting}"))
}
