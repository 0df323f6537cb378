//! How a simulated process comes to life: what `process.rs` and `reconcile.rs` of the broker do, with
//! an assignment that never changes.
//!
//! Invariant: replicas run before the first message of a peer is read; leadership is handed over
//! before anything else stops.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use chronik_broker::config::ReplicationSettings;
use chronik_broker::controller_client::ClusterView;
use chronik_broker::disk_watch::DiskWatch;
use chronik_broker::leadership::{
    Assigned, CampaignTiming, DriverOptions, GroupEvent, Successors, hand_over_all, run_driver,
};
use chronik_broker::metrics::{BrokerMetrics, seconds_histogram};
use chronik_broker::peers::{Nudge, Peers, PeersOptions};
use chronik_broker::replica::raft_config::raft_config;
use chronik_broker::replica::{PartitionState, Replica, ReplicaOptions, Upkeep};
use chronik_broker::replicas::Replicas;
use chronik_broker::resting::{self, RestTiming};
use chronik_broker::throttle::Throttle;
use chronik_storage::Storage;
use chronik_types::id::BrokerId;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::host::replica_id;
use crate::network::Network;
use crate::plan::GroupPlan;
use crate::requests::{self, Request, Response};

/// How long an orderly stop may take to give leadership away.
const HAND_OVER_LIMIT: Duration = Duration::from_millis(2_500);

/// What the process's first task does.
pub struct Boot {
    pub broker_id: BrokerId,
    pub storage: Storage,
    pub replicas: Replicas,
    pub network: Network,
    pub view: watch::Receiver<ClusterView>,
    pub groups: Vec<(GroupPlan, watch::Receiver<PartitionState>)>,
    pub stagger_ms: u64,
    pub rest_after: Option<Duration>,
    pub requests: mpsc::UnboundedReceiver<Request>,
    pub responses: Arc<Mutex<Vec<Response>>>,
    pub stop: CancellationToken,
    pub stopped: watch::Sender<bool>,
}

impl Boot {
    /// As `process.rs` and `reconcile.rs` do: the replicas before the first message of a peer.
    pub async fn run(self) {
        let settings = ReplicationSettings::default();
        let end = CancellationToken::new();
        let (peers, nudges) = self.peers(&settings, &end);
        let (events, groups) = mpsc::unbounded_channel();
        let (led, _led) = mpsc::unbounded_channel();
        let opener = Opener {
            broker_id: self.broker_id,
            storage: self.storage,
            replicas: self.replicas.clone(),
            peers: peers.clone(),
            raft_config: raft_config(settings.raft_timing()),
            events,
        };
        let opens = self
            .groups
            .into_iter()
            .map(|(group, state)| opener.open(group, state));
        futures::future::join_all(opens).await;
        let draining = watch::Sender::new(false);
        let metrics = BrokerMetrics::register(&mut Registry::default());
        tokio::spawn(run_driver(DriverOptions {
            broker_id: self.broker_id,
            timing: CampaignTiming::new(Duration::from_millis(self.stagger_ms)),
            step_down_after: settings.raft_timing().election_timeout_max,
            peers: peers.clone(),
            replicas: self.replicas.clone(),
            view: self.view.clone(),
            groups,
            nudges,
            led,
            metrics: metrics.clone(),
            draining: draining.subscribe(),
            stop: end.clone(),
        }));
        let timing = match self.rest_after {
            Some(idle) => RestTiming::new(idle, settings.open_replicas_max),
            None => RestTiming::NEVER,
        };
        let (replicas, peers_at_rest) = (self.replicas.clone(), peers.clone());
        let rest = resting::run(replicas, peers_at_rest, timing, metrics, end.clone());
        tokio::spawn(rest);
        let mut listener = self.network.listen(self.broker_id);
        let (replicas, responses) = (self.replicas.clone(), self.responses);
        tokio::spawn(requests::serve(replicas, self.requests, responses));
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                called = listener.recv() => match called {
                    Some(called) => called.serve(&peers),
                    None => return,
                },
            }
        }
        draining.send_replace(true);
        let successors = Successors {
            links: peers.links(),
            view: self.view,
        };
        hand_over(&self.replicas, &successors).await;
        drop(listener);
        end.cancel();
        for (_, replica) in self.replicas.all() {
            replica.shutdown().await;
        }
        self.stopped.send_replace(true);
        std::future::pending().await
    }

    /// The transport, which calls everybody that shares a partition with this broker.
    fn peers(
        &self,
        settings: &ReplicationSettings,
        end: &CancellationToken,
    ) -> (Peers, mpsc::Receiver<Nudge>) {
        let stuck_after = Duration::from_millis(settings.disk_stuck_ms);
        let watch = DiskWatch::new(self.storage.clone(), stuck_after, Gauge::default());
        let is_disk_stuck = watch.is_stuck();
        tokio::spawn(watch.run(end.clone()));
        let (peers, nudges) = Peers::with_connector(
            PeersOptions {
                broker_id: self.broker_id,
                incarnation: Uuid::new_v4(),
                timing: settings.link_timing(),
                groups: Arc::new(self.replicas.downgrade()),
                // Nobody is ever so far behind here that it needs a copy of segment files.
                behind: mpsc::channel(1).0,
                replication_seconds: seconds_histogram(),
                fill_throttle: Throttle::of(None),
                is_disk_stuck,
                stop: end.clone(),
            },
            self.network.connector(self.broker_id),
        );
        let addresses = self
            .groups
            .iter()
            .flat_map(|(group, _)| &group.replicas)
            .filter(|replica| replica.broker_id != self.broker_id)
            .map(|replica| (replica.broker_id, replica.broker_id.0.to_string()))
            .collect();
        peers.set_addresses(&addresses);
        (peers, nudges)
    }
}

async fn hand_over(replicas: &Replicas, successors: &Successors) {
    let led = |(_, replica): &(_, Arc<Replica>)| replica.leadership().borrow().is_leader;
    let led = replicas.all().into_iter().filter(led);
    let led = led.map(|(_, replica)| (replica, Vec::new())).collect();
    hand_over_all(led, successors, HAND_OVER_LIMIT).await;
}

struct Opener {
    broker_id: BrokerId,
    storage: Storage,
    replicas: Replicas,
    peers: Peers,
    raft_config: Arc<openraft::Config>,
    events: mpsc::UnboundedSender<GroupEvent>,
}

impl Opener {
    async fn open(&self, group: GroupPlan, state: watch::Receiver<PartitionState>) {
        let replica_id = replica_id(self.broker_id);
        let log = self.storage.open_log(group.id).unwrap();
        let is_new = log.last_entry_id().is_none();
        let replica = Peers::open_replica(ReplicaOptions {
            replica_id,
            log,
            network: self.peers.network(group.id, replica_id),
            raft_config: self.raft_config.clone(),
            state,
            upkeep: Upkeep::default(),
        })
        .unwrap();
        if is_new {
            let voters = group.replicas.iter().copied().collect();
            replica.initialize(voters).await.unwrap();
        }
        self.replicas.insert(group.id, replica.clone());
        let assigned = Assigned {
            group: group.id,
            place: group.place,
            voters: group.replicas.clone(),
            replicas: group.replicas,
            moving: None,
        };
        self.events.send(GroupEvent::Opened(assigned, replica)).ok();
    }
}
