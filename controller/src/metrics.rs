//! Names of the controller's metrics, and where they are fed.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use chronik_types::cluster_image::ClusterImage;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::command::Outcome;
use crate::controller::{Controller, Role, now};
use crate::raft::ProposeError;
use crate::rest::{PartitionState, is_partition_in};

/// Commands proposed by this controller; `result`: applied, not_leader, unknown, failed.
pub const COMMANDS: &str = "chronik_controller_commands";
/// Heartbeats of brokers and gateways taken by this controller as leader; `kind`: broker, gateway.
pub const HEARTBEATS: &str = "chronik_controller_heartbeats";
/// Watch streams open here.
pub const WATCHERS: &str = "chronik_controller_watchers";
/// Full images sent to watchers (the others got changes).
pub const FULL_IMAGES: &str = "chronik_controller_full_images_sent";
/// 1 where this controller leads.
pub const IS_LEADER: &str = "chronik_controller_is_leader";
/// Revision of the applied image.
pub const REVISION: &str = "chronik_controller_image_revision";
/// Brokers by `state`: active, fenced.
pub const BROKERS: &str = "chronik_controller_brokers";
pub const GATEWAYS: &str = "chronik_controller_gateways";
pub const TOPICS: &str = "chronik_controller_topics";
/// Partitions by `state`: led, leaderless, and those that need attention: under_replicated,
/// under_min_isr, at_min_isr, offline, reassigning, not_preferred_leader.
pub const PARTITIONS: &str = "chronik_controller_partitions";
/// Moves of replicas by `state`: active, waiting.
pub const REASSIGNMENTS: &str = "chronik_controller_reassignments";
/// Entries that the replicas being filled lack, all together; known to the leader only.
pub const REASSIGNMENT_LAG: &str = "chronik_controller_reassignment_lag_entries";
pub const RAFT_TERM: &str = "chronik_controller_raft_term";
/// Raft log positions; `position`: last, applied, snapshot, purged.
pub const RAFT_LOG_INDEX: &str = "chronik_controller_raft_log_index";

type NumberGauge = Gauge<u64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PositionLabel {
    position: &'static str,
}

/// Cheap to clone; all clones feed the same metrics.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    commands: Family<ResultLabel, Counter>,
    heartbeats: Family<KindLabel, Counter>,
    pub watchers: Gauge,
    pub full_images: Counter,
    is_leader: NumberGauge,
    revision: NumberGauge,
    brokers: Family<StateLabel, NumberGauge>,
    gateways: NumberGauge,
    topics: NumberGauge,
    partitions: Family<StateLabel, NumberGauge>,
    reassignments: Family<StateLabel, NumberGauge>,
    reassignment_lag: NumberGauge,
    raft_term: NumberGauge,
    raft_log_index: Family<PositionLabel, NumberGauge>,
}

impl Metrics {
    /// The metrics, and the registry that `/metrics` prints.
    pub fn new() -> (Self, Arc<Registry>) {
        let metrics = Self::default();
        let mut registry = Registry::default();
        registry.register(COMMANDS, "Commands proposed here", metrics.commands.clone());
        registry.register(
            HEARTBEATS,
            "Session heartbeats taken",
            metrics.heartbeats.clone(),
        );
        registry.register(WATCHERS, "Open watch streams", metrics.watchers.clone());
        registry.register(FULL_IMAGES, "Full images sent", metrics.full_images.clone());
        registry.register(
            IS_LEADER,
            "1 where this controller leads",
            metrics.is_leader.clone(),
        );
        registry.register(
            REVISION,
            "Revision of the applied image",
            metrics.revision.clone(),
        );
        registry.register(BROKERS, "Registered brokers", metrics.brokers.clone());
        registry.register(GATEWAYS, "Registered gateways", metrics.gateways.clone());
        registry.register(TOPICS, "Topics", metrics.topics.clone());
        registry.register(PARTITIONS, "Partitions", metrics.partitions.clone());
        registry.register(
            REASSIGNMENTS,
            "Moves of replicas",
            metrics.reassignments.clone(),
        );
        registry.register(
            REASSIGNMENT_LAG,
            "Entries that replicas being filled lack",
            metrics.reassignment_lag.clone(),
        );
        registry.register(RAFT_TERM, "Raft term", metrics.raft_term.clone());
        registry.register(RAFT_LOG_INDEX, "Raft log", metrics.raft_log_index.clone());
        (metrics, Arc::new(registry))
    }

    pub fn proposed(&self, result: &Result<Outcome, ProposeError>) {
        let result = match result {
            Ok(_) => "applied",
            Err(ProposeError::NotLeader) => "not_leader",
            Err(ProposeError::UnknownOutcome) => "unknown",
            Err(ProposeError::Stopped(_) | ProposeError::Unencodable(_)) => "failed",
        };
        self.commands.get_or_create(&ResultLabel { result }).inc();
    }

    pub fn broker_heartbeat(&self) {
        self.heartbeats
            .get_or_create(&KindLabel { kind: "broker" })
            .inc();
    }

    pub fn gateway_heartbeat(&self) {
        self.heartbeats
            .get_or_create(&KindLabel { kind: "gateway" })
            .inc();
    }

    /// Reads the gauges; called when somebody asks for `/metrics`, so that it costs nothing else.
    pub fn observe(&self, controller: &Controller) {
        let image = controller.image();
        self.is_leader
            .set(u64::from(*controller.role().borrow() == Role::Leader));
        self.revision.set(image.revision);
        let fenced = image
            .brokers
            .values()
            .filter(|broker| broker.fenced)
            .count() as u64;
        let registered = image.brokers.len() as u64;
        self.brokers
            .get_or_create(&StateLabel { state: "fenced" })
            .set(fenced);
        self.brokers
            .get_or_create(&StateLabel { state: "active" })
            .set(registered - fenced);
        self.gateways.set(image.gateways.len() as u64);
        self.topics.set(image.topics.len() as u64);
        let partitions = || image.topics.values().flat_map(|topic| &topic.partitions);
        let led = partitions()
            .filter(|partition| partition.leader.is_some())
            .count() as u64;
        let all = partitions().count() as u64;
        self.partitions
            .get_or_create(&StateLabel { state: "led" })
            .set(led);
        self.partitions
            .get_or_create(&StateLabel {
                state: "leaderless",
            })
            .set(all - led);
        self.observe_attention(&image);
        self.reassignment_lag
            .set(controller.moves().total_lag(now()));
        let raft = controller.node().status();
        self.raft_term.set(raft.term);
        for (position, index) in [
            ("last", raft.last_log_index),
            ("applied", raft.applied_log_index),
            ("snapshot", raft.snapshot_log_index),
            ("purged", raft.purged_log_index),
        ] {
            self.raft_log_index
                .get_or_create(&PositionLabel { position })
                .set(index);
        }
    }

    /// Partitions that need attention, as `GET /v1/partitions` lists them.
    fn observe_attention(&self, image: &ClusterImage) {
        for (label, state) in [
            ("under_replicated", PartitionState::UnderReplicated),
            ("under_min_isr", PartitionState::UnderMinIsr),
            ("at_min_isr", PartitionState::AtMinIsr),
            ("offline", PartitionState::Offline),
            ("reassigning", PartitionState::Reassigning),
            ("not_preferred_leader", PartitionState::NotPreferredLeader),
        ] {
            let topics = image.topics.values();
            let partitions = topics.flat_map(|t| t.partitions.iter().map(move |p| (t, p)));
            let found = partitions.filter(|(t, p)| is_partition_in(image, t, p, state));
            self.partitions
                .get_or_create(&StateLabel { state: label })
                .set(found.count() as u64);
        }
        let partitions = image.topics.values().flat_map(|topic| &topic.partitions);
        let moving = partitions.filter(|p| p.reassignment.is_some());
        let (active, waiting): (Vec<_>, Vec<_>) =
            moving.partition(|p| p.active_reassignment().is_some());
        for (state, count) in [("active", active.len()), ("waiting", waiting.len())] {
            self.reassignments
                .get_or_create(&StateLabel { state })
                .set(count as u64);
        }
    }
}
