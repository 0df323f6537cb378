//! The broker's metrics: names, meaning, and the handles that feed them.
//!
//! Invariant: every metric registered here is fed by the code that holds its handle; gauges of
//! totals are computed when they are read.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

pub const REPLICAS: &str = "chronik_broker_replicas";
pub const REPLICAS_OPEN: &str = "chronik_broker_replicas_open";
pub const REPLICAS_FAILED: &str = "chronik_broker_replicas_failed";
pub const PARTITIONS_LED: &str = "chronik_broker_partitions_led";
pub const REPLICAS_MISSING: &str = "chronik_broker_replicas_missing";
pub const LEADERS_ELECTED: &str = "chronik_broker_leaders_elected";
pub const CAMPAIGNS: &str = "chronik_broker_campaigns";
pub const ELECTION_SECONDS: &str = "chronik_broker_election_seconds";
pub const REPLICATION_SECONDS: &str = "chronik_broker_replication_seconds";
pub const REPORTS: &str = "chronik_broker_partition_reports";
pub const DISK_STUCK: &str = "chronik_broker_disk_stuck";
pub const PEERS_CONNECTED: &str = "chronik_broker_peers_connected";
pub const COPIED_BYTES: &str = "chronik_broker_copied_bytes";
pub const COPIED_BYTES_SERVED: &str = "chronik_broker_copied_bytes_served";
pub const COPIES_INSTALLED: &str = "chronik_broker_copies_installed";
pub const COPIES_FAILED: &str = "chronik_broker_copies_failed";
pub const LOGS_DAMAGED: &str = "chronik_broker_logs_damaged";
pub const REBUILDS: &str = "chronik_broker_rebuilds";
pub const REBUILDS_FAILED: &str = "chronik_broker_rebuilds_failed";
pub const RETENTION_RUNS: &str = "chronik_broker_retention_runs";
pub const COMPACTIONS: &str = "chronik_broker_compactions";
pub const REGISTERED: &str = "chronik_broker_registered";
pub const IMAGE_REVISION: &str = "chronik_broker_image_revision";

/// Cheap to clone; all clones feed the same metrics.
#[derive(Debug, Clone)]
pub struct BrokerMetrics {
    /// Replicas that run here.
    pub replicas: Gauge,
    /// Replicas whose Raft is open, as of the last look for those that may rest.
    pub replicas_open: Gauge,
    /// Replicas whose Raft ended by itself and waits to be opened again, as of the same look.
    pub replicas_failed: Gauge,
    /// Replicas that should run here and do not.
    pub replicas_missing: Gauge,
    /// Partitions that this broker leads.
    pub partitions_led: Gauge,
    /// Elections that this broker won.
    pub leaders_elected: Counter,
    /// Elections that this broker started.
    pub campaigns: Counter,
    /// From the decision to campaign to the election won.
    pub election_seconds: Histogram,
    /// From entries given to a follower's link, waits for its budget included, to the answer that they are on that
    /// follower's disk.
    pub replication_seconds: Histogram,
    /// Partition reports sent to the controllers.
    pub reports: Counter,
    /// 1 while the disk does not take the log, else 0.
    pub disk_stuck: Gauge,
    /// Peers that are connected.
    pub peers_connected: Gauge,
    /// Bytes of logs fetched from other brokers in bulk.
    pub copied_bytes: Counter,
    /// Bytes of logs given to other brokers in bulk.
    pub copied_bytes_served: Counter,
    /// Logs that were replaced by a copy of their leader's.
    pub copies_installed: Counter,
    /// Copies that were broken off.
    pub copies_failed: Counter,
    /// Logs with files that cannot be read as they were written.
    pub logs_damaged: Gauge,
    /// Logs whose damaged files were taken anew from another replica.
    pub rebuilds: Counter,
    /// Rebuilds that did not come about, and are tried again.
    pub rebuilds_failed: Counter,
    /// Log starts that were raised by retention.
    pub retention_runs: Counter,
    /// Compactions of logs that were done.
    pub compactions: Counter,
    /// 1 while the broker holds a session at the controllers.
    pub registered: Gauge,
    /// Revision of the cluster image in force.
    pub image_revision: Gauge,
}

impl BrokerMetrics {
    /// Makes the metrics and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            replicas: Gauge::default(),
            replicas_open: Gauge::default(),
            replicas_failed: Gauge::default(),
            replicas_missing: Gauge::default(),
            partitions_led: Gauge::default(),
            leaders_elected: Counter::default(),
            campaigns: Counter::default(),
            election_seconds: seconds_histogram(),
            replication_seconds: replication_histogram(),
            reports: Counter::default(),
            peers_connected: Gauge::default(),
            copied_bytes: Counter::default(),
            copied_bytes_served: Counter::default(),
            copies_installed: Counter::default(),
            copies_failed: Counter::default(),
            logs_damaged: Gauge::default(),
            rebuilds: Counter::default(),
            rebuilds_failed: Counter::default(),
            retention_runs: Counter::default(),
            compactions: Counter::default(),
            registered: Gauge::default(),
            image_revision: Gauge::default(),
            disk_stuck: Gauge::default(),
        };
        let m = &metrics;
        let gauges = [
            (
                DISK_STUCK,
                "1 while the disk does not take the log, and others lead what this broker led",
                &m.disk_stuck,
            ),
            (REPLICAS, "Replicas that run here", &m.replicas),
            (
                REPLICAS_MISSING,
                "Replicas that should run here and do not",
                &m.replicas_missing,
            ),
            (
                REPLICAS_OPEN,
                "Replicas whose Raft is open; the others rest",
                &m.replicas_open,
            ),
            (
                REPLICAS_FAILED,
                "Replicas whose Raft ended by itself and waits to be opened again",
                &m.replicas_failed,
            ),
            (
                PARTITIONS_LED,
                "Partitions that this broker leads",
                &m.partitions_led,
            ),
            (
                LOGS_DAMAGED,
                "Logs with files that cannot be read as they were written",
                &m.logs_damaged,
            ),
            (
                PEERS_CONNECTED,
                "Other brokers that are connected",
                &m.peers_connected,
            ),
            (
                REGISTERED,
                "1 while the broker holds a session at the controllers",
                &m.registered,
            ),
            (
                IMAGE_REVISION,
                "Revision of the cluster image in force",
                &m.image_revision,
            ),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
        let counters = [
            (
                LEADERS_ELECTED,
                "Elections that this broker won",
                &m.leaders_elected,
            ),
            (
                CAMPAIGNS,
                "Elections that this broker started",
                &m.campaigns,
            ),
            (
                REPORTS,
                "Partition reports sent to the controllers",
                &m.reports,
            ),
            (
                COPIED_BYTES,
                "Bytes of logs fetched from other brokers in bulk",
                &m.copied_bytes,
            ),
            (
                COPIED_BYTES_SERVED,
                "Bytes of logs given to other brokers in bulk",
                &m.copied_bytes_served,
            ),
            (
                COPIES_INSTALLED,
                "Logs that were replaced by a copy of their leader's",
                &m.copies_installed,
            ),
            (
                COPIES_FAILED,
                "Copies of logs that were broken off",
                &m.copies_failed,
            ),
            (
                REBUILDS,
                "Logs whose damaged files were taken anew from another replica",
                &m.rebuilds,
            ),
            (
                REBUILDS_FAILED,
                "Rebuilds that failed and are tried again",
                &m.rebuilds_failed,
            ),
            (
                RETENTION_RUNS,
                "Log starts that were raised by retention",
                &m.retention_runs,
            ),
            (COMPACTIONS, "Compactions of logs", &m.compactions),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        registry.register(
            ELECTION_SECONDS,
            "Time from the decision to campaign to the election won",
            m.election_seconds.clone(),
        );
        registry.register(
            REPLICATION_SECONDS,
            "Time from giving entries to a follower's link to the answer that they are on its disk",
            m.replication_seconds.clone(),
        );
        metrics
    }
}

/// 1 ms to 16 s.
pub fn seconds_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// Finer up to 0.2 s.
fn replication_histogram() -> Histogram {
    let fine = (1..=20).map(|step| f64::from(step) / 100.0);
    let bounds = [0.001, 0.002, 0.005].into_iter().chain(fine);
    Histogram::new(bounds.chain([0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_shown_under_its_name() {
        let mut registry = Registry::default();
        let metrics = BrokerMetrics::register(&mut registry);
        metrics.replicas.set(3);
        metrics.election_seconds.observe(0.01);
        metrics.replication_seconds.observe(0.01);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for name in [
            REPLICAS,
            REPLICAS_OPEN,
            REPLICAS_FAILED,
            REPLICAS_MISSING,
            PARTITIONS_LED,
            LEADERS_ELECTED,
            CAMPAIGNS,
            ELECTION_SECONDS,
            REPLICATION_SECONDS,
            REPORTS,
            DISK_STUCK,
            PEERS_CONNECTED,
            COPIED_BYTES,
            COPIED_BYTES_SERVED,
            COPIES_INSTALLED,
            COPIES_FAILED,
            LOGS_DAMAGED,
            REBUILDS,
            REBUILDS_FAILED,
            RETENTION_RUNS,
            COMPACTIONS,
            REGISTERED,
            IMAGE_REVISION,
        ] {
            assert!(text.contains(name), "{name}");
        }
        assert!(text.contains("chronik_broker_replicas 3"));
    }
}
