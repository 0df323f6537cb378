//! Makes the parts of the broker out of its config, and starts the workers among them.
//!
//! Invariant: `open` sets nothing going but the storage. Workers run from `spawn_workers` on, each
//! a named task, and a part reaches another only by a handle or a channel that it is given here.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use chronik_storage::{Disk, Storage, StorageConfig};
use chronik_telemetry::http::Health;
use chronik_telemetry::process::open_files_limit;
use chronik_types::cluster_image::ClusterImage;
use chronik_types::id::{BrokerId, RaftGroupId};
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::named;
use super::observer::Observer;
use crate::blocking::Background;
use crate::catch_up::{CatchUpOptions, Copies, run_catch_up};
use crate::config::Config;
use crate::consumer_group::replica_log::ConsumerGroups;
use crate::controller_client::{ClientOptions, ControllerClient, HeldLogs, Registration};
use crate::disk_watch::DiskWatch;
use crate::leadership::{
    CampaignTiming, DriverOptions, GroupEvent, ReporterOptions, run_driver, run_reporter,
};
use crate::log_life::{CompactionLimits, LogLifeOptions, run_log_life};
use crate::metrics::BrokerMetrics;
use crate::peers::{Behind, Nudge, Peers, PeersOptions};
use crate::process::Host;
use crate::reconcile::{ReconcileOptions, Reconciler};
use crate::replica::Upkeep;
use crate::replica::raft_config::raft_config;
use crate::replicas::Replicas;
use crate::resting;
use crate::throttle::Throttle;

/// Replicas here that need a copy of their leader's log and wait for their turn; leaders ask again.
const BEHIND_MAX: usize = 1024;

/// Threads that write and check what comes by copies.
const COPY_THREADS: usize = 3;

/// What a broker is made of, before anything of it runs.
pub(super) struct Parts {
    broker_id: BrokerId,
    pub(super) stop: CancellationToken,
    pub(super) storage: Storage,
    pub(super) client: ControllerClient,
    pub(super) registry: Registry,
    pub(super) metrics: BrokerMetrics,
    pub(super) replicas: Replicas,
    pub(super) peers: Peers,
    nudges: mpsc::Receiver<Nudge>,
    group_events: mpsc::UnboundedReceiver<GroupEvent>,
    behind: mpsc::Receiver<Behind>,
    copying: Background,
    compacting: Background,
    disk_watch: Option<DiskWatch>,
    upkeep_wanted: mpsc::UnboundedReceiver<RaftGroupId>,
    missing: watch::Sender<usize>,
    pub(super) reconciler: Reconciler,
    image: Arc<ArcSwap<ClusterImage>>,
    pub(super) groups: Arc<ConsumerGroups>,
}

/// The parts that stay reachable while the broker runs.
pub(super) struct Handles {
    pub(super) storage: Storage,
    pub(super) replicas: Replicas,
    pub(super) client: ControllerClient,
    pub(super) peers: Peers,
    pub(super) groups: Arc<ConsumerGroups>,
    pub(super) stop: CancellationToken,
}

impl Parts {
    pub(super) async fn open(
        config: &Config,
        rpc_address: SocketAddr,
        host: Host,
    ) -> anyhow::Result<Parts> {
        let storage = open_storage(config, host.disk).await?;
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
        let disk_watch = disk_watch(config, &storage, &metrics);
        let is_disk_stuck = match &disk_watch {
            Some(watch) => watch.is_stuck(),
            None => watch::channel(false).1,
        };
        let peers_options = PeersOptions {
            broker_id,
            incarnation,
            timing: config.replication.link_timing(),
            groups: Arc::new(replicas.downgrade()),
            behind: behind_sender,
            replication_seconds: metrics.replication_seconds.clone(),
            fill_throttle: Throttle::new(None, client.view()),
            is_disk_stuck,
            stop: stop.clone(),
        };
        let (peers, nudges) = Peers::with_connector(peers_options, host.connector);
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
            copying: Background::new("copy", COPY_THREADS).context("cannot start threads")?,
            compacting: Background::new("compaction", 1).context("cannot start threads")?,
            disk_watch,
            upkeep_wanted,
            missing,
            reconciler,
            image,
            groups,
        })
    }

    pub(super) fn observer(&self, health: Health) -> Observer {
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
    pub(super) fn spawn_workers(
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
        let copies = Copies::default();
        let reporter = ReporterOptions {
            broker_id: self.broker_id,
            lag_max: Duration::from_millis(settings.replica_lag_time_max_ms),
            client: self.client.clone(),
            view: self.client.view(),
            links: self.peers.links(),
            led,
            copies: copies.clone(),
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
            background: self.copying,
            copies,
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
            background: self.compacting,
            metrics: self.metrics,
            stop: self.stop.clone(),
        };
        if let Some(watch) = self.disk_watch {
            tasks.spawn(named("disk watch", watch.run(self.stop.clone())));
        }
        tasks.spawn(named("catch-up", run_catch_up(catch_up)));
        tasks.spawn(named("log life", run_log_life(log_life)));
        tasks.spawn(named("leadership", run_driver(driver)));
        tasks.spawn(named("reporter", run_reporter(reporter)));
        let rest = resting::run(
            self.replicas.clone(),
            self.peers.clone(),
            settings.rest_timing(),
            rest_metrics,
            self.stop.clone(),
        );
        tasks.spawn(named("resting", rest));
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

/// Who watches the disk; nobody, if that is not wanted.
fn disk_watch(config: &Config, storage: &Storage, metrics: &BrokerMetrics) -> Option<DiskWatch> {
    let stuck_after = NonZeroU64::new(config.replication.disk_stuck_ms)?;
    let stuck_after = Duration::from_millis(stuck_after.get());
    Some(DiskWatch::new(
        storage.clone(),
        stuck_after,
        metrics.disk_stuck.clone(),
    ))
}

/// Segment files that may be open at a time, of all that the process may: connections and the WAL have the
/// other half.
fn open_files_max(limit: u64) -> usize {
    let half = usize::try_from(limit / 2).unwrap_or(usize::MAX);
    half.min(StorageConfig::default().open_files_max)
}

async fn open_storage(config: &Config, disk: Arc<dyn Disk>) -> anyhow::Result<Storage> {
    let folder = config.data_dir.clone();
    let storage = StorageConfig {
        dir: folder.join("storage"),
        wal_file_size_bytes: config.storage.wal_file_size_bytes,
        memory_max_bytes: config.storage.memory_max_bytes,
        reserve_bytes: config.storage.reserve_bytes,
        scrub_bytes_per_second: config.storage.scrub_bytes_per_second,
        scrub_interval: Duration::from_millis(config.storage.scrub_interval_ms),
        open_files_max: open_files_max(open_files_limit()),
        ..StorageConfig::default()
    };
    let opened = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&storage.dir)
            .with_context(|| format!("cannot create {}; check data-dir", storage.dir.display()))?;
        Storage::open(storage, disk).context("cannot open the storage")
    });
    opened.await?
}
