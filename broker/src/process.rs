//! The composition root: every part of the broker is made, started and stopped here.
//!
//! Invariant: replicas known from disk run before the first message of a peer is read; leadership is
//! handed over before anything else stops; storage is closed last.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use chronik_proto::v1::data_server::DataServer;
use chronik_proto::v1::groups_server::GroupsServer;
use chronik_proto::v1::segments_server::SegmentsServer;
use chronik_proto::{
    HTTP2_CONNECTION_WINDOW, HTTP2_FRAME_SIZE, HTTP2_STREAM_WINDOW, MESSAGE_SIZE_MAX,
};
use chronik_storage::{RealDisk, Storage, StorageConfig};
use chronik_telemetry::http::{Health, serve_http};
use chronik_types::cluster_image::ClusterImage;
use chronik_types::epoch::BrokerEpoch;
use chronik_types::id::{BrokerId, RaftGroupId};
use futures::StreamExt;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tracing::{info, warn};
use uuid::Uuid;

use crate::catch_up::{CatchUpOptions, run_catch_up};
use crate::config::Config;
use crate::consumer_group::replica_log::ConsumerGroups;
use crate::controller_client::{
    ClientOptions, ClusterView, ControllerClient, HeldLogs, Registration,
};
use crate::leadership::{
    CampaignTiming, DriverOptions, GroupEvent, ReporterOptions, Successors, hand_over_all,
    run_driver, run_reporter,
};
use crate::log_life::{CompactionLimits, LogLifeOptions, run_log_life};
use crate::metrics::BrokerMetrics;
use crate::peers::{Behind, Connector, GrpcConnector, LinkTable, Peers, PeersOptions};
use crate::reconcile::{ReconcileOptions, Reconciler};
use crate::replica::Upkeep;
use crate::replica::raft_config::raft_config;
use crate::replicas::Replicas;
use crate::resting;
use crate::rpc::data::DataService;
use crate::rpc::groups::GroupsService;
use crate::rpc::segments::SegmentsService;

/// An idle connection whose other end is gone is noticed by this.
const HTTP2_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const TELL_SHUTTING_DOWN_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the remaining tasks may take to end at a stop.
const TASKS_TIMEOUT: Duration = Duration::from_secs(2);
/// Replicas here that need a copy of their leader's log and wait for their turn; leaders ask again.
const BEHIND_MAX: usize = 1024;
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

/// Starts a broker. It serves what it has on its disk at once, and registers as soon as a
/// controller answers.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    start_with(config, Arc::new(GrpcConnector)).await
}

/// As `start`, with another way to connect to peers.
pub(crate) async fn start_with(
    config: Config,
    connector: Arc<dyn Connector>,
) -> anyhow::Result<Running> {
    config.validate().map_err(anyhow::Error::msg)?;
    // 1. Ports first: a second process on the same machine fails before it touches anything.
    let rpc_listener = bind(config.rpc_listen, "rpc-listen").await?;
    let http_listener = bind(config.http_listen, "http-listen").await?;
    let rpc_address = rpc_listener.local_addr()?;
    let http_address = http_listener.local_addr()?;
    // 2. Storage, the last image, the transport.
    let mut parts = Parts::open(&config, rpc_address, connector).await?;
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

/// What a broker is made of, before anything of it runs.
struct Parts {
    broker_id: BrokerId,
    stop: CancellationToken,
    storage: Storage,
    client: ControllerClient,
    registry: Registry,
    metrics: BrokerMetrics,
    replicas: Replicas,
    peers: Peers,
    nudges: mpsc::Receiver<RaftGroupId>,
    group_events: mpsc::UnboundedReceiver<GroupEvent>,
    behind: mpsc::Receiver<Behind>,
    upkeep_wanted: mpsc::UnboundedReceiver<RaftGroupId>,
    missing: watch::Sender<usize>,
    reconciler: Reconciler,
    image: Arc<ArcSwap<ClusterImage>>,
    groups: Arc<ConsumerGroups>,
}

/// The parts that stay reachable while the broker runs.
struct Handles {
    storage: Storage,
    replicas: Replicas,
    client: ControllerClient,
    peers: Peers,
    groups: Arc<ConsumerGroups>,
    stop: CancellationToken,
}

impl Parts {
    async fn open(
        config: &Config,
        rpc_address: SocketAddr,
        connector: Arc<dyn Connector>,
    ) -> anyhow::Result<Parts> {
        let storage = open_storage(config).await?;
        let stop = CancellationToken::new();
        let broker_id = BrokerId(config.broker_id);
        let incarnation = Uuid::new_v4();
        let replicas = Replicas::new();
        let held = {
            let (storage, replicas) = (storage.clone(), replicas.clone());
            HeldLogs::new(move || {
                let incarnation = |group| Some(replicas.get(group)?.replica_id().incarnation);
                let groups = storage.group_ids().into_iter();
                groups.map(|group| (group, incarnation(group))).collect()
            })
        };
        let client = ControllerClient::open(ClientOptions {
            registration: Registration {
                broker_id,
                incarnation_id: incarnation,
                rpc_address: config
                    .rpc_advertised
                    .clone()
                    .unwrap_or(rpc_address.to_string()),
                rack: config.rack.clone(),
                storage_id: storage.storage_id(),
            },
            controllers: config.controllers.clone(),
            data_dir: config.data_dir.clone(),
            held,
            stop: stop.clone(),
        })?;
        let mut registry = Registry::default();
        let metrics = BrokerMetrics::register(&mut registry);
        let (behind_sender, behind) = mpsc::channel(BEHIND_MAX);
        let peers_options = PeersOptions {
            broker_id,
            incarnation,
            timing: config.replication.link_timing(),
            groups: Arc::new(replicas.downgrade()),
            behind: behind_sender,
            replication_seconds: metrics.replication_seconds.clone(),
            stop: stop.clone(),
        };
        let (peers, nudges) = Peers::with_connector(peers_options, connector);
        let (wanted, upkeep_wanted) = mpsc::unbounded_channel();
        let (groups_sender, group_events) = mpsc::unbounded_channel();
        let missing = watch::Sender::new(0);
        let reconciler = Reconciler::new(ReconcileOptions {
            broker_id,
            incarnation,
            storage: storage.clone(),
            replicas: replicas.clone(),
            peers: peers.clone(),
            raft_config: raft_config(config.replication.raft_timing()),
            client: client.clone(),
            groups: groups_sender,
            upkeep: Upkeep {
                wanted: Some(wanted),
                keep_bytes: config.log.raft_keep_bytes,
            },
            missing: missing.clone(),
            stop: stop.clone(),
        });
        let image = Arc::new(ArcSwap::new(client.view().borrow().image.clone()));
        let groups = Arc::new(ConsumerGroups::new(
            replicas.clone(),
            image.clone(),
            config.consumer_groups.clone(),
            stop.child_token(),
        ));
        Ok(Parts {
            broker_id,
            stop,
            storage,
            client,
            registry,
            metrics,
            replicas,
            peers,
            nudges,
            group_events,
            behind,
            upkeep_wanted,
            missing,
            reconciler,
            image,
            groups,
        })
    }

    fn observer(&self, health: Health) -> Observer {
        Observer {
            view: self.client.view(),
            links: self.peers.links(),
            missing: self.missing.subscribe(),
            epoch: self.client.epoch(),
            image: self.image.clone(),
            groups: self.groups.clone(),
            replicas: self.replicas.clone(),
            health,
            metrics: self.metrics.clone(),
        }
    }

    /// Starts who decides about leadership, who reports it, who opens and closes replicas, and who
    /// looks after their logs.
    fn spawn_workers(
        self,
        config: &Config,
        draining: &watch::Sender<bool>,
        tasks: &mut JoinSet<anyhow::Result<&'static str>>,
    ) -> Handles {
        let settings = &config.replication;
        let (led_events, led) = mpsc::unbounded_channel();
        let rest_metrics = self.metrics.clone();
        let driver = DriverOptions {
            broker_id: self.broker_id,
            timing: CampaignTiming::new(Duration::from_millis(settings.campaign_stagger_ms)),
            step_down_after: settings.raft_timing().election_timeout_max,
            peers: self.peers.clone(),
            replicas: self.replicas.clone(),
            view: self.client.view(),
            groups: self.group_events,
            nudges: self.nudges,
            led: led_events,
            metrics: self.metrics.clone(),
            draining: draining.subscribe(),
            stop: self.stop.clone(),
        };
        let reporter = ReporterOptions {
            broker_id: self.broker_id,
            lag_max: Duration::from_millis(settings.replica_lag_time_max_ms),
            client: self.client.clone(),
            view: self.client.view(),
            links: self.peers.links(),
            led,
            metrics: self.metrics.clone(),
            stop: self.stop.clone(),
        };
        let catch_up = CatchUpOptions {
            storage: self.storage.clone(),
            replicas: self.replicas.clone(),
            view: self.client.view(),
            behind: self.behind,
            bytes_per_second: NonZeroU64::new(config.log.copy_bytes_per_second),
            parallel_max: config.log.copies_max,
            metrics: self.metrics.clone(),
            stop: self.stop.clone(),
        };
        let log_life = LogLifeOptions {
            replicas: self.replicas.clone(),
            wanted: self.upkeep_wanted,
            check_interval: Duration::from_millis(config.log.retention_check_interval_ms),
            compaction: CompactionLimits {
                bytes_per_second: NonZeroU64::new(config.log.compaction_bytes_per_second),
                map_max_bytes: config.log.compaction_map_max_bytes,
            },
            metrics: self.metrics,
            stop: self.stop.clone(),
        };
        tasks.spawn(named("catch-up", run_catch_up(catch_up)));
        tasks.spawn(named("log life", run_log_life(log_life)));
        tasks.spawn(named("leadership", run_driver(driver)));
        tasks.spawn(named("reporter", run_reporter(reporter)));
        if let Some(timing) = settings.rest_timing() {
            let rest = resting::run(
                self.replicas.clone(),
                timing,
                rest_metrics,
                self.stop.clone(),
            );
            tasks.spawn(named("resting", rest));
        }
        tasks.spawn(named("reconcile", self.reconciler.run(self.client.view())));
        Handles {
            storage: self.storage,
            replicas: self.replicas,
            client: self.client,
            peers: self.peers,
            groups: self.groups,
            stop: self.stop,
        }
    }
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
        self.stop.cancel();
        self.stop_rpc.cancel();
        self.tasks.abort_all();
    }

    /// Replicas that run here.
    pub fn replicas(&self) -> &Replicas {
        &self.replicas
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
        // 3. Requests, then coordinators, then Raft.
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

async fn open_storage(config: &Config) -> anyhow::Result<Storage> {
    let folder = config.data_dir.clone();
    let storage = StorageConfig {
        dir: folder.join("storage"),
        wal_file_size_bytes: config.storage.wal_file_size_bytes,
        memory_max_bytes: config.storage.memory_max_bytes,
        reserve_bytes: config.storage.reserve_bytes,
        scrub_bytes_per_second: config.storage.scrub_bytes_per_second,
        scrub_interval: Duration::from_millis(config.storage.scrub_interval_ms),
        ..StorageConfig::default()
    };
    let opened = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&storage.dir)
            .with_context(|| format!("cannot create {}; check data-dir", storage.dir.display()))?;
        Storage::open(storage, Arc::new(RealDisk)).context("cannot open the storage")
    });
    opened.await?
}

struct Services<'a> {
    replicas: &'a Replicas,
    groups: &'a ConsumerGroups,
    peers: &'a Peers,
    storage: &'a Storage,
    folder: PathBuf,
}

fn serve_rpc(
    listener: TcpListener,
    services: Services<'_>,
    stop: CancellationToken,
) -> impl Future<Output = anyhow::Result<&'static str>> + use<> {
    let data = DataService::new(
        services.replicas.clone(),
        services.storage.clone(),
        services.folder,
    );
    let data = DataServer::new(data)
        .max_decoding_message_size(MESSAGE_SIZE_MAX)
        .max_encoding_message_size(MESSAGE_SIZE_MAX);
    let groups = GroupsServer::new(GroupsService::new(services.groups.coordinators().clone()))
        .max_decoding_message_size(MESSAGE_SIZE_MAX)
        .max_encoding_message_size(MESSAGE_SIZE_MAX);
    let segments = SegmentsServer::new(SegmentsService::new(services.replicas.clone()))
        .max_decoding_message_size(MESSAGE_SIZE_MAX)
        .max_encoding_message_size(MESSAGE_SIZE_MAX);
    let router = Server::builder()
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME_SIZE)
        .http2_keepalive_interval(Some(HTTP2_KEEP_ALIVE_INTERVAL))
        .add_service(data)
        .add_service(groups)
        .add_service(segments)
        .add_service(services.peers.service());
    async move {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        // Streams of gateways and peers never end by themselves: nothing is waited for.
        tokio::select! {
            () = stop.cancelled() => Ok("gRPC server"),
            served = router.serve_with_incoming(incoming) => {
                served.context("gRPC server").map(|()| "gRPC server")
            }
        }
    }
}

/// Keeps what is derived from image, links and replicas up to date: coordinators, readiness,
/// gauges.
struct Observer {
    view: watch::Receiver<ClusterView>,
    links: watch::Receiver<LinkTable>,
    missing: watch::Receiver<usize>,
    epoch: watch::Receiver<Option<BrokerEpoch>>,
    image: Arc<ArcSwap<ClusterImage>>,
    groups: Arc<ConsumerGroups>,
    replicas: Replicas,
    health: Health,
    metrics: BrokerMetrics,
}

impl Observer {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            self.refresh();
            let changed = tokio::select! {
                () = stop.cancelled() => return,
                changed = self.view.changed() => changed,
                changed = self.links.changed() => changed,
                changed = self.missing.changed() => changed,
                changed = self.epoch.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    fn refresh(&mut self) {
        let view = self.view.borrow_and_update().clone();
        let missing = *self.missing.borrow_and_update();
        let revision = view.image.revision;
        self.image.store(view.image);
        self.groups.refresh();

        let gauge = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        let connected = self
            .links
            .borrow_and_update()
            .0
            .values()
            .filter(|s| s.is_up())
            .count();
        let registered = self.epoch.borrow_and_update().is_some();
        self.metrics.replicas.set(gauge(self.replicas.count()));
        self.metrics.replicas_missing.set(gauge(missing));
        self.metrics.peers_connected.set(gauge(connected));
        self.metrics.registered.set(i64::from(registered));
        self.metrics
            .image_revision
            .set(i64::try_from(revision).unwrap_or(i64::MAX));

        match (revision, missing) {
            (0, _) => self
                .health
                .set_ready(false, "no cluster image yet: waiting for a controller"),
            (_, 0) => self.health.set_ready(true, ""),
            (_, _) => self
                .health
                .set_ready(false, "some replicas are not open yet"),
        }
    }
}
