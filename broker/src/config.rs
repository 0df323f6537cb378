//! Configuration of a broker: defaults, TOML file, environment, flags.
//!
//! Invariant: a `Config` that passed `validate` can be started; what is wrong is said before any
//! port is bound.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use chronik_telemetry::config::TelemetryConfig;
use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::consumer_group::GroupConfig;
use crate::peers::LinkTiming;
use crate::replica::raft_config::RaftTiming;
use crate::resting::RestTiming;

pub const ENV_PREFIX: &str = "CHRONIK_BROKER_";

/// The WAL and the partitions' logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct StorageSettings {
    /// Size of one WAL file.
    pub wal_file_size_bytes: u64,
    /// Memory for the newest batches of all partitions together.
    pub memory_max_bytes: usize,
    /// Records are refused when the disk has less room than this. By default a twentieth of the disk,
    /// between 1 and 4 GiB, but at most a tenth of it.
    pub reserve_bytes: Option<u64>,
    /// How fast sealed segments are looked through for damage; 0: not at all.
    pub scrub_bytes_per_second: u64,
    /// How often all of them are, if that is fast enough.
    pub scrub_interval_ms: u64,
}

impl Default for StorageSettings {
    fn default() -> Self {
        Self {
            wal_file_size_bytes: 64 * 1024 * 1024,
            memory_max_bytes: 256 * 1024 * 1024,
            reserve_bytes: None,
            scrub_bytes_per_second: 1024 * 1024,
            scrub_interval_ms: 24 * 60 * 60 * 1000,
        }
    }
}

/// Replication and leadership.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ReplicationSettings {
    /// Between two pings of a peer.
    pub ping_interval_ms: u64,
    /// A connected peer that is not heard for this long is taken for stopped.
    pub peer_silence_ms: u64,
    /// A broker whose log has not got on for this long, though it has to, leads nothing; 0: it leads on.
    pub disk_stuck_ms: u64,
    /// How long connecting to a peer may take.
    pub connect_timeout_ms: u64,
    /// How long a heartbeat of a Raft group may take.
    pub heartbeat_interval_ms: u64,
    /// Bounds of the leader lease of a Raft group.
    pub election_timeout_min_ms: u64,
    pub election_timeout_max_ms: u64,
    /// Of several survivors the first campaigns at once, and each next one so much later.
    pub campaign_stagger_ms: u64,
    /// A follower that did not reach the log end for this long leaves the ISR.
    pub replica_lag_time_max_ms: u64,
    /// How long an orderly stop may take to hand over leadership.
    pub shutdown_transfer_timeout_ms: u64,
    /// The Raft of a replica that nobody used for this long is closed until it is needed; 0: never.
    pub rest_after_ms: u64,
    /// Where more replicas are open, the longest unused are closed after two seconds.
    pub open_replicas_max: usize,
}

impl Default for ReplicationSettings {
    fn default() -> Self {
        Self {
            ping_interval_ms: 400,
            peer_silence_ms: 1_000,
            disk_stuck_ms: 5_000,
            connect_timeout_ms: 1_000,
            heartbeat_interval_ms: 500,
            election_timeout_min_ms: 1_500,
            election_timeout_max_ms: 3_000,
            campaign_stagger_ms: 150,
            replica_lag_time_max_ms: 10_000,
            shutdown_transfer_timeout_ms: 10_000,
            rest_after_ms: 30_000,
            open_replicas_max: 2_000,
        }
    }
}

impl ReplicationSettings {
    pub fn link_timing(&self) -> LinkTiming {
        LinkTiming {
            ping_interval: Duration::from_millis(self.ping_interval_ms),
            silence: Duration::from_millis(self.peer_silence_ms),
            connect_timeout: Duration::from_millis(self.connect_timeout_ms),
            ..LinkTiming::default()
        }
    }

    pub fn raft_timing(&self) -> RaftTiming {
        RaftTiming {
            heartbeat_interval: Duration::from_millis(self.heartbeat_interval_ms),
            election_timeout_min: Duration::from_millis(self.election_timeout_min_ms),
            election_timeout_max: Duration::from_millis(self.election_timeout_max_ms),
        }
    }

    pub fn rest_timing(&self) -> RestTiming {
        match self.rest_after_ms {
            0 => RestTiming::NEVER,
            idle => RestTiming::new(Duration::from_millis(idle), self.open_replicas_max),
        }
    }

    fn validate(&self) -> Result<(), String> {
        let positive = [
            ("ping-interval-ms", self.ping_interval_ms),
            ("connect-timeout-ms", self.connect_timeout_ms),
            ("heartbeat-interval-ms", self.heartbeat_interval_ms),
            ("replica-lag-time-max-ms", self.replica_lag_time_max_ms),
        ];
        if let Some((name, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return Err(format!("replication.{name} must be above 0"));
        }
        if self.peer_silence_ms < self.ping_interval_ms.saturating_mul(2) {
            return Err(
                "replication.peer-silence-ms must be at least twice ping-interval-ms".to_owned(),
            );
        }
        if self.election_timeout_min_ms < self.heartbeat_interval_ms.saturating_mul(2) {
            return Err(
                "replication.election-timeout-min-ms must be at least twice \
                        heartbeat-interval-ms"
                    .to_owned(),
            );
        }
        if self.election_timeout_max_ms <= self.election_timeout_min_ms {
            return Err("replication.election-timeout-max-ms must be above \
                        election-timeout-min-ms"
                .to_owned());
        }
        Ok(())
    }
}

/// The life of the partitions' logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct LogSettings {
    /// How often retention, sealing and compaction are looked at: log.retention.check.interval.ms.
    pub retention_check_interval_ms: u64,
    /// Bytes that Raft keeps readable for followers that are a little behind. One that is further
    /// behind gets a copy of the log.
    pub raft_keep_bytes: u64,
    /// What compaction may read and write per second; 0: no limit.
    pub compaction_bytes_per_second: u64,
    /// Memory for the keys of one compaction: log.cleaner.dedupe.buffer.size.
    pub compaction_map_max_bytes: usize,
    /// What copies from other brokers may take per second, all replicas together; 0: no limit. Clients share disk
    /// and cores with them.
    pub copy_bytes_per_second: u64,
    /// Logs copied from other brokers at the same time.
    pub copies_max: usize,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            retention_check_interval_ms: 300_000,
            raft_keep_bytes: 64 * 1024 * 1024,
            compaction_bytes_per_second: 0,
            compaction_map_max_bytes: 128 * 1024 * 1024,
            copy_bytes_per_second: 125_000_000,
            copies_max: 4,
        }
    }
}

impl LogSettings {
    fn validate(&self) -> Result<(), String> {
        if self.retention_check_interval_ms == 0 {
            return Err("log.retention-check-interval-ms must be above 0".to_owned());
        }
        if self.raft_keep_bytes < 1024 * 1024 {
            return Err("log.raft-keep-bytes must be at least 1048576".to_owned());
        }
        if self.compaction_map_max_bytes < 1024 * 1024 {
            return Err("log.compaction-map-max-bytes must be at least 1048576".to_owned());
        }
        if self.copies_max == 0 {
            return Err("log.copies-max must be above 0".to_owned());
        }
        Ok(())
    }
}

/// Configuration of a broker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// Number of this broker, 0 or more, as Kafka clients see it. There is no default.
    pub broker_id: i32,
    /// Where the broker stands; replicas of a partition are spread over racks.
    pub rack: Option<String>,
    /// Folder of everything the broker keeps. One process at a time.
    pub data_dir: PathBuf,
    /// Where gRPC is served, for gateways and other brokers.
    pub rpc_listen: SocketAddr,
    /// `host:port` that gateways and other brokers are told. Default: `rpc-listen`.
    pub rpc_advertised: Option<String>,
    /// `host:port` of the controllers' gRPC services.
    pub controllers: Vec<String>,
    /// Where /metrics, /healthz and /readyz are served.
    pub http_listen: SocketAddr,
    /// Threads of the process beside the WAL's; 1 is the cheapest, 0 is one per core.
    pub worker_threads: usize,
    pub storage: StorageSettings,
    pub replication: ReplicationSettings,
    pub log: LogSettings,
    pub consumer_groups: GroupConfig,
    pub telemetry: TelemetryConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            broker_id: -1,
            rack: None,
            data_dir: PathBuf::from("data/broker"),
            rpc_listen: SocketAddr::from(([127, 0, 0, 1], 7101)),
            rpc_advertised: None,
            controllers: Vec::new(),
            http_listen: SocketAddr::from(([127, 0, 0, 1], 9645)),
            worker_threads: 1,
            storage: StorageSettings::default(),
            replication: ReplicationSettings::default(),
            log: LogSettings::default(),
            consumer_groups: GroupConfig::default(),
            telemetry: TelemetryConfig {
                // Raft reports each step of each group, and each failed attempt to reach a dead peer.
                log_filter: "info,openraft=error".to_owned(),
                ..TelemetryConfig::default()
            },
        }
    }
}

impl Config {
    /// Says what is wrong with the values and how they relate, if anything.
    pub fn validate(&self) -> Result<(), String> {
        if self.broker_id < 0 {
            return Err("broker-id is missing; it must be 0 or more".to_owned());
        }
        if self.controllers.is_empty() {
            return Err("controllers is empty; name host:port of at least one".to_owned());
        }
        for address in self.controllers.iter().chain(&self.rpc_advertised) {
            let port = address
                .rsplit_once(':')
                .map(|(_, port)| port.parse::<u16>());
            if !matches!(port, Some(Ok(1..))) {
                return Err(format!("'{address}' is not host:port"));
            }
        }
        if self.rpc_advertised.is_none() && self.rpc_listen.ip().is_unspecified() {
            return Err(format!(
                "rpc-listen is {}, which nobody can connect to by that name; set rpc-advertised",
                self.rpc_listen
            ));
        }
        if self.storage.wal_file_size_bytes < 1024 * 1024 {
            return Err("storage.wal-file-size-bytes must be at least 1048576".to_owned());
        }
        if self.storage.memory_max_bytes < 1024 * 1024 {
            return Err("storage.memory-max-bytes must be at least 1048576".to_owned());
        }
        if self.storage.scrub_interval_ms == 0 {
            return Err("storage.scrub-interval-ms must be above 0".to_owned());
        }
        self.replication.validate()?;
        self.log.validate()?;
        self.consumer_groups
            .validate()
            .map_err(|error| format!("consumer-groups: {error}"))?;
        self.telemetry.validate()
    }
}

/// Flags of `chronik-broker`.
#[derive(Debug, Clone, Parser)]
#[command(name = "chronik-broker", version, about, after_long_help = SETTINGS_HELP)]
pub struct Args {
    /// Config file (TOML); its settings are listed below.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Only check the configuration: exit code 0 if it is good, 64 if not.
    #[arg(long)]
    pub check_config: bool,
    /// Number of this broker, 0 or more.
    #[arg(long)]
    pub broker_id: Option<i32>,
    /// Where the broker stands.
    #[arg(long)]
    pub rack: Option<String>,
    /// Folder of everything the broker keeps.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Address of the gRPC services.
    #[arg(long)]
    pub rpc_listen: Option<SocketAddr>,
    /// `host:port` that others are told.
    #[arg(long)]
    pub rpc_advertised: Option<String>,
    /// `host:port` of a controller; may be given several times.
    #[arg(long = "controller")]
    pub controllers: Vec<String>,
    /// Address of /metrics, /healthz and /readyz.
    #[arg(long)]
    pub http_listen: Option<SocketAddr>,
}

impl Args {
    /// Reads the configuration with all its layers and checks it.
    pub fn load(self) -> Result<Config, String> {
        let mut config: Config =
            chronik_telemetry::config::load(self.config.as_deref(), ENV_PREFIX)
                .map_err(|error| error.to_string())?;
        if let Some(broker_id) = self.broker_id {
            config.broker_id = broker_id;
        }
        if let Some(data_dir) = self.data_dir {
            config.data_dir = data_dir;
        }
        if let Some(rpc_listen) = self.rpc_listen {
            config.rpc_listen = rpc_listen;
        }
        if let Some(http_listen) = self.http_listen {
            config.http_listen = http_listen;
        }
        if !self.controllers.is_empty() {
            config.controllers = self.controllers;
        }
        config.rack = self.rack.or(config.rack);
        config.rpc_advertised = self.rpc_advertised.or(config.rpc_advertised);
        config.validate()?;
        Ok(config)
    }
}

const SETTINGS_HELP: &str = "\
Settings of the config file. Each may also come from the environment, as CHRONIK_BROKER_ and its
name in capitals with _ for -, and __ before a name of a table: CHRONIK_BROKER_DATA_DIR,
CHRONIK_BROKER_STORAGE__MEMORY_MAX_BYTES. Flags win over the environment, and that over the file.

  broker-id                 number of this broker, 0 or more [required]
  rack                      where the broker stands; replicas are spread over racks
  data-dir                  folder of everything the broker keeps [data/broker]
  rpc-listen                address of the gRPC services [127.0.0.1:7101]
  rpc-advertised            host:port that gateways and brokers are told [rpc-listen]
  controllers               list of the controllers' host:port [required]
  http-listen               address of /metrics, /healthz and /readyz [127.0.0.1:9645]
  worker-threads            threads beside the WAL's; 0: one per core [1]

  [storage]
  wal-file-size-bytes       size of one WAL file [67108864]
  memory-max-bytes          memory for the newest batches of all partitions [268435456]
  reserve-bytes             records are refused when the disk has less room than this [a
                            twentieth of the disk, 1 to 4 GiB, at most a tenth]
  scrub-bytes-per-second    how fast sealed segments are looked through for damage; 0: not at all
                            [1048576]
  scrub-interval-ms         how often all of them are looked through [86400000]

  [replication]
  ping-interval-ms          between two pings of a peer [400]
  peer-silence-ms           a peer not heard for so long is taken for stopped [1000]
  disk-stuck-ms             a broker whose log does not get on for so long leads nothing; 0: it
                            leads on [5000]
  connect-timeout-ms        how long connecting to a peer may take [1000]
  heartbeat-interval-ms     how long a heartbeat of a Raft group may take [500]
  election-timeout-min-ms   bounds of a leader's lease: from this [1500]
  election-timeout-max-ms   to this [3000]
  campaign-stagger-ms       each next survivor campaigns so much later [150]
  replica-lag-time-max-ms   a follower behind for so long leaves the ISR [10000]
  shutdown-transfer-timeout-ms  how long an orderly stop may take to hand over leadership [10000]
  rest-after-ms             the Raft of a replica not used for so long is closed until it is
                            needed, which saves its memory; 0: never [30000]
  open-replicas-max         above it, those longest unused are closed after two seconds [2000]

  [log]
  retention-check-interval-ms  how often retention, sealing and compaction are looked at [300000]
  raft-keep-bytes           kept of each log for followers a little behind; one that is further
                            behind gets a copy of the log's files [67108864]
  compaction-bytes-per-second  read and written by compaction; 0: no limit [0]
  compaction-map-max-bytes  memory for the keys of one compaction [134217728]
  copy-bytes-per-second     taken by all copies from other brokers; 0: no limit [125000000]
  copies-max                logs copied from other brokers at the same time [4]

  [consumer-groups]         as Apache Kafka's settings of the same meaning
  initial-rebalance-delay-ms [3000], session-timeout-min-ms [6000],
  session-timeout-max-ms [1800000], members-max [10000], group-size-max-bytes [458752],
  offset-metadata-max-bytes [4096], offsets-retention-seconds [604800],
  offsets-retention-check-interval-ms [600000], write-timeout-ms [5000],
  write-queue-max-bytes [16777216]

  [telemetry]
  log-filter                a level, or directives such as info,chronik_broker=debug
                            [info,openraft=error]
  log-format                text or json [text]
  otlp-endpoint             where traces go, such as http://127.0.0.1:4317 [none]
  trace-sample-ratio        only used by gateways [0.01]";

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> Config {
        Config {
            broker_id: 1,
            controllers: vec!["127.0.0.1:7001".to_owned()],
            ..Config::default()
        }
    }

    fn check(change: impl FnOnce(&mut Config), message: &str) {
        let mut config = valid();
        change(&mut config);
        let error = config.validate().unwrap_err();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(valid().validate(), Ok(()));
        check(|c| c.broker_id = -1, "broker-id");
        check(|c| c.controllers.clear(), "controllers");
        check(|c| c.controllers.push("nowhere".to_owned()), "nowhere");
        check(
            |c| c.rpc_listen = SocketAddr::from(([0, 0, 0, 0], 1)),
            "rpc-advertised",
        );
        check(|c| c.replication.ping_interval_ms = 0, "ping-interval-ms");
        check(|c| c.replication.peer_silence_ms = 1, "peer-silence-ms");
        check(
            |c| c.replication.election_timeout_max_ms = 1,
            "election-timeout-max-ms",
        );
        check(|c| c.storage.memory_max_bytes = 1, "memory-max-bytes");
        check(|c| c.consumer_groups.members_max = 0, "consumer-groups");
        check(|c| c.log.raft_keep_bytes = 1, "raft-keep-bytes");
        check(|c| c.log.copies_max = 0, "copies-max");
    }

    #[test]
    fn every_setting_is_documented() {
        let wrong = chronik_telemetry::config::wrong_in_help::<Config>(SETTINGS_HELP);
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn the_sample_config_is_valid() {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/config/broker.toml");
        let config: Config = chronik_telemetry::config::load(Some(&file), "CHRONIK_NONE_").unwrap();
        assert_eq!(config.validate(), Ok(()));
    }
}
