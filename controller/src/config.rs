//! Configuration of a controller: defaults, TOML file, environment, flags.
//!
//! Invariant: a `Config` that passed `validate` can be started; what is wrong is said before any
//! port is bound.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use chronik_telemetry::config::TelemetryConfig;
use clap::{Parser, Subcommand};
use serde::{Deserialize, Serialize};

use crate::founding::CONTROLLER_ID_MAX;

pub const ENV_PREFIX: &str = "CHRONIK_CONTROLLER_";

/// One controller of the group, as the others and clients reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ControllerAddress {
    /// Its `controller-id`.
    pub id: u64,
    /// `host:port` of its gRPC services.
    pub rpc_address: String,
    /// `host:port` of its REST admin API.
    pub rest_address: String,
}

/// Raft of the controllers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RaftSettings {
    /// Between two heartbeats of the leader.
    pub heartbeat_interval_ms: u64,
    /// A follower that hears nothing for about this long asks for an election.
    pub election_timeout_min_ms: u64,
    pub election_timeout_max_ms: u64,
    /// A snapshot is made after this many log entries.
    pub snapshot_log_entries: u64,
    /// A snapshot is made, and the log before it removed, when the log holds so many bytes.
    pub snapshot_log_bytes: u64,
    /// Entries kept behind a snapshot, for followers that are a little late.
    pub retained_log_entries: u64,
}

impl Default for RaftSettings {
    fn default() -> Self {
        Self {
            heartbeat_interval_ms: 500,
            election_timeout_min_ms: 1000,
            election_timeout_max_ms: 1500,
            snapshot_log_entries: 5000,
            snapshot_log_bytes: 64 * 1024 * 1024,
            retained_log_entries: 1000,
        }
    }
}

/// What a topic gets that does not say otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct TopicDefaults {
    /// Kafka's `num.partitions`.
    pub partition_count: i32,
    /// Kafka's `default.replication.factor`. With fewer brokers a topic is refused.
    pub replication_factor: i32,
    /// Partitions of `__consumer_offsets`.
    pub consumer_offsets_partition_count: i32,
}

impl Default for TopicDefaults {
    fn default() -> Self {
        Self {
            partition_count: 1,
            replication_factor: 3,
            consumer_offsets_partition_count: 50,
        }
    }
}

/// Configuration of a controller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// Number of this controller, 1 or more; one of `controllers`.
    pub controller_id: u64,
    /// Folder of the database. One process at a time.
    pub data_dir: PathBuf,
    /// Where gRPC is served: brokers, gateways, other controllers.
    pub rpc_listen: SocketAddr,
    /// Where the REST admin API, /metrics, /healthz and /readyz are served.
    pub rest_listen: SocketAddr,
    /// All controllers: 1, 3 or 5, the same list everywhere. Empty: this one alone.
    pub controllers: Vec<ControllerAddress>,
    /// Name of a new cluster. Empty: the first leader makes one up.
    pub cluster_id: String,
    /// A broker or gateway not heard of for this long is fenced.
    pub session_timeout_ms: u32,
    /// How often brokers and gateways send a heartbeat.
    pub session_heartbeat_interval_ms: u32,
    /// A preferred leader gets its partitions back so long after its broker has registered.
    pub leader_balance_delay_ms: u64,
    /// How long a request waits for a leader before it fails with UNAVAILABLE.
    pub leader_wait_ms: u64,
    /// How long a change waits for a majority before its outcome is called unknown.
    pub write_timeout_ms: u64,
    /// Largest number of partitions that one request may create.
    pub partitions_per_request_max: u32,
    /// Changes kept for watchers that come back.
    pub watch_history_max: usize,
    /// Threads of the process; 1 is the cheapest.
    pub worker_threads: usize,
    pub topic_defaults: TopicDefaults,
    pub raft: RaftSettings,
    pub telemetry: TelemetryConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            controller_id: 1,
            data_dir: PathBuf::from("data/controller"),
            rpc_listen: SocketAddr::from(([127, 0, 0, 1], 7001)),
            rest_listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            controllers: Vec::new(),
            cluster_id: String::new(),
            session_timeout_ms: 3000,
            session_heartbeat_interval_ms: 1000,
            leader_balance_delay_ms: 3000,
            leader_wait_ms: 4000,
            write_timeout_ms: 5000,
            partitions_per_request_max: 100_000,
            watch_history_max: 10_000,
            worker_threads: 1,
            topic_defaults: TopicDefaults::default(),
            raft: RaftSettings::default(),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl Config {
    /// Says what is wrong with the values and how they relate, if anything.
    pub fn validate(&self) -> Result<(), String> {
        let all_ids = self.controllers.iter().map(|controller| controller.id);
        for id in all_ids.chain([self.controller_id]) {
            if id == 0 || id > CONTROLLER_ID_MAX {
                return Err(format!(
                    "controller id {id} is not from 1 to {CONTROLLER_ID_MAX}"
                ));
            }
        }
        self.validate_controllers()?;
        let raft = &self.raft;
        if raft.heartbeat_interval_ms < 10
            || raft.election_timeout_min_ms < raft.heartbeat_interval_ms.saturating_mul(2)
        {
            return Err("raft.election-timeout-min-ms must be at least twice \
                        raft.heartbeat-interval-ms, and that at least 10"
                .to_owned());
        }
        if raft.election_timeout_max_ms <= raft.election_timeout_min_ms {
            return Err("raft.election-timeout-max-ms must be above the minimum".to_owned());
        }
        if raft.snapshot_log_entries == 0 {
            return Err("raft.snapshot-log-entries must be 1 or more".to_owned());
        }
        if raft.snapshot_log_bytes < 64 * 1024 {
            return Err("raft.snapshot-log-bytes must be 65536 or more".to_owned());
        }
        let heartbeat_ms = self.session_heartbeat_interval_ms;
        if heartbeat_ms == 0 || self.session_timeout_ms < heartbeat_ms.saturating_mul(2) {
            return Err("session-timeout-ms must be at least twice \
                        session-heartbeat-interval-ms, and that above 0"
                .to_owned());
        }
        let defaults = &self.topic_defaults;
        if defaults.partition_count < 1
            || defaults.replication_factor < 1
            || defaults.consumer_offsets_partition_count < 1
        {
            return Err("topic-defaults must be 1 or more".to_owned());
        }
        if self.leader_wait_ms == 0 || self.write_timeout_ms == 0 || self.watch_history_max == 0 {
            return Err(
                "leader-wait-ms, write-timeout-ms and watch-history-max must be above 0".to_owned(),
            );
        }
        self.telemetry.validate()
    }

    /// The group, with this controller alone where none is configured.
    pub fn group(&self) -> Vec<ControllerAddress> {
        if self.controllers.is_empty() {
            return vec![ControllerAddress {
                id: self.controller_id,
                rpc_address: self.rpc_listen.to_string(),
                rest_address: self.rest_listen.to_string(),
            }];
        }
        self.controllers.clone()
    }

    pub fn leader_wait(&self) -> Duration {
        Duration::from_millis(self.leader_wait_ms)
    }

    pub fn write_timeout(&self) -> Duration {
        Duration::from_millis(self.write_timeout_ms)
    }

    pub fn leader_balance_delay(&self) -> Duration {
        Duration::from_millis(self.leader_balance_delay_ms)
    }

    pub fn session_timeout(&self) -> Duration {
        Duration::from_millis(u64::from(self.session_timeout_ms))
    }

    fn validate_controllers(&self) -> Result<(), String> {
        let ids: BTreeSet<u64> = self.controllers.iter().map(|c| c.id).collect();
        if ids.len() != self.controllers.len() {
            return Err("controllers: an id is there twice".to_owned());
        }
        if !matches!(self.controllers.len(), 0 | 1 | 3 | 5) {
            let count = self.controllers.len();
            return Err(format!(
                "controllers: there are {count}, there must be 1, 3 or 5"
            ));
        }
        if !ids.is_empty() && !ids.contains(&self.controller_id) {
            let id = self.controller_id;
            return Err(format!(
                "controllers: controller-id {id} is not one of them"
            ));
        }
        for controller in &self.controllers {
            for address in [&controller.rpc_address, &controller.rest_address] {
                let port = address
                    .rsplit_once(':')
                    .map(|(_, port)| port.parse::<u16>());
                if !matches!(port, Some(Ok(1..))) {
                    return Err(format!("controllers: '{address}' is not host:port"));
                }
            }
        }
        Ok(())
    }
}

/// Flags of `chronik-controller`.
#[derive(Debug, Clone, Parser)]
#[command(name = "chronik-controller", version, about, after_long_help = SETTINGS_HELP)]
pub struct Args {
    /// Config file (TOML); its settings are listed below.
    #[arg(long, global = true)]
    pub config: Option<PathBuf>,
    /// Number of this controller, 1 or more.
    #[arg(long, global = true)]
    pub controller_id: Option<u64>,
    /// Folder of the database.
    #[arg(long, global = true)]
    pub data_dir: Option<PathBuf>,
    /// Address of the gRPC services.
    #[arg(long)]
    pub rpc_listen: Option<SocketAddr>,
    /// Address of the REST admin API and /metrics.
    #[arg(long)]
    pub rest_listen: Option<SocketAddr>,
    /// Only check the configuration: exit code 0 if it is good, 64 if not.
    #[arg(long)]
    pub check_config: bool,
    #[command(subcommand)]
    pub task: Option<Task>,
}

/// What to do instead of running a controller.
#[derive(Debug, Clone, Subcommand)]
pub enum Task {
    /// Make the data folder of this controller from a backup of `chronik cluster backup`.
    ///
    /// To be done on every controller, with the same file and an empty data folder, while none runs.
    /// Then start all of them. Exit code 0: done; 1: nothing was done, and why.
    Restore {
        /// The backup.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
    },
}

impl Args {
    /// Reads the configuration with all its layers and checks it.
    pub fn load(self) -> Result<Config, String> {
        let mut config: Config =
            chronik_telemetry::config::load(self.config.as_deref(), ENV_PREFIX)
                .map_err(|error| error.to_string())?;
        if let Some(controller_id) = self.controller_id {
            config.controller_id = controller_id;
        }
        if let Some(data_dir) = self.data_dir {
            config.data_dir = data_dir;
        }
        if let Some(rpc_listen) = self.rpc_listen {
            config.rpc_listen = rpc_listen;
        }
        if let Some(rest_listen) = self.rest_listen {
            config.rest_listen = rest_listen;
        }
        config.validate()?;
        Ok(config)
    }
}

const SETTINGS_HELP: &str = "\
Settings (TOML; in the environment CHRONIK_CONTROLLER_DATA_DIR is data-dir, and
CHRONIK_CONTROLLER_RAFT__HEARTBEAT_INTERVAL_MS is heartbeat-interval-ms of [raft]):

  controller-id                  number of this controller, 1 or more [1]
  data-dir                       folder of the database [data/controller]
  rpc-listen                     address of the gRPC services [127.0.0.1:7001]
  rest-listen                    address of the REST admin API, /metrics, /healthz, /readyz
                                 [127.0.0.1:8080]
  controllers                    all controllers, 1, 3 or 5, the same list everywhere:
                                 [{ id = 1, rpc-address = \"host:port\", rest-address = \"host:port\" }, ..]
                                 [this one alone]
  cluster-id                     name of a new cluster [made up by the first leader]
  session-timeout-ms             a broker or gateway silent for this long is fenced [3000]
  session-heartbeat-interval-ms  how often brokers and gateways send a heartbeat [1000]
  leader-balance-delay-ms        a preferred leader gets its partitions back so long after its
                                 broker has registered, once all replicas there are in
                                 sync or 10 minutes have passed [3000]
  leader-wait-ms                 how long a request waits for a leader [4000]
  write-timeout-ms               how long a change waits for a majority [5000]
  partitions-per-request-max     most partitions that one request may create [100000]
  watch-history-max              changes kept for watchers that come back [10000]
  worker-threads                 threads of the process; 0: one per core [1]
  [topic-defaults]
  partition-count                Kafka's num.partitions [1]
  replication-factor             Kafka's default.replication.factor; with fewer brokers a topic is
                                 refused [3]
  consumer-offsets-partition-count  partitions of __consumer_offsets [50]
  [raft]
  heartbeat-interval-ms          between two heartbeats of the leader [500]
  election-timeout-min-ms        a follower that hears nothing for a time between this [1000]
  election-timeout-max-ms        and this asks for an election [1500]
  snapshot-log-entries           a snapshot is made after this many log entries [5000]
  snapshot-log-bytes             and when the log holds so many bytes: it is removed then [67108864]
  retained-log-entries           entries kept behind a snapshot [1000]
  [telemetry]
  log-filter                     a level, or directives such as info,chronik_controller=debug
                                 [info,openraft=warn]
  log-format                     text or json [text]
  otlp-endpoint                  where traces go, such as http://127.0.0.1:4317 [none]
  trace-sample-ratio             only the gateway decides; ignored here [0.01]

Exit code 64: the configuration cannot be used.";

#[cfg(test)]
mod tests {
    use super::*;

    fn address(id: u64) -> ControllerAddress {
        ControllerAddress {
            id,
            rpc_address: format!("host{id}:7001"),
            rest_address: format!("host{id}:8080"),
        }
    }

    #[test]
    fn defaults_are_valid_and_two_controllers_are_not() {
        let mut config = Config::default();
        assert_eq!(config.validate(), Ok(()));
        config.controllers = vec![address(1), address(2)];
        assert!(config.validate().unwrap_err().contains("1, 3 or 5"));
        config.controllers = vec![address(1), address(2), address(3)];
        assert_eq!(config.validate(), Ok(()));
        config.controller_id = 9;
        assert!(config.validate().unwrap_err().contains("not one of them"));
    }

    #[test]
    fn relations_between_settings_are_checked() {
        let mut config = Config {
            session_timeout_ms: 600,
            ..Default::default()
        };
        assert!(
            config
                .validate()
                .unwrap_err()
                .contains("session-timeout-ms")
        );
        config = Config::default();
        config.raft.election_timeout_min_ms = 100;
        assert!(
            config
                .validate()
                .unwrap_err()
                .contains("election-timeout-min-ms")
        );
        config = Config {
            controllers: vec![address(1)],
            ..Default::default()
        };
        config.controllers[0].rpc_address = "nowhere".to_owned();
        assert!(config.validate().unwrap_err().contains("host:port"));
    }

    #[test]
    fn help_names_every_setting_and_the_example_is_valid() {
        let wrong = chronik_telemetry::config::wrong_in_help::<Config>(SETTINGS_HELP);
        assert!(wrong.is_empty(), "{wrong:#?}");
        let example = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../deploy/config/controller.toml"
        );
        let config: Config = chronik_telemetry::config::load(
            Some(std::path::Path::new(example)),
            "CHRONIK_NO_SUCH_PREFIX_",
        )
        .unwrap();
        assert_eq!(config.validate(), Ok(()));
    }
}
