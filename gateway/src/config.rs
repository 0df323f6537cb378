//! Configuration of a gateway: defaults, TOML file, environment, flags.
//!
//! Invariant: a `Config` that passed `validate` can be started; what is wrong is said before any
//! port is bound.

use std::net::SocketAddr;
use std::path::PathBuf;

use chronik_telemetry::config::TelemetryConfig;
use chronik_types::cluster_image::Endpoint;
use clap::Parser;
use serde::{Deserialize, Serialize};

pub const ENV_PREFIX: &str = "CHRONIK_GATEWAY_";

/// Everything that can be set. Keys are the field names in kebab-case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// Name of this gateway; unique in the cluster.
    pub gateway_id: String,
    /// Addresses to listen on for Kafka clients, one per endpoint. With as many endpoints in the
    /// cluster as brokers, each broker id has an endpoint of its own.
    pub listeners: Vec<String>,
    /// `host:port` under which clients reach each listener, in the same order. Empty: the
    /// listeners themselves.
    pub advertised_listeners: Vec<String>,
    /// Zone of this gateway; brokers of the same zone get its endpoints first.
    pub rack: Option<String>,
    /// `host:port` of the controllers' gRPC services.
    pub controllers: Vec<String>,
    /// Folder for the last cluster image, the only thing a gateway keeps. It lets the gateway
    /// start while no controller answers.
    pub data_dir: PathBuf,
    /// `host:port` of `/metrics`, `/healthz` and `/readyz`.
    pub http_listen: String,
    /// Threads that serve clients. 1 is cheapest per request; 0 is one per core.
    pub worker_threads: usize,
    /// Create a topic that a client asks for and that does not exist.
    pub auto_create_topics_enable: bool,
    /// Honour the `traceparent` header of a producer's first record even where
    /// `telemetry.trace-sample-ratio` is 0.
    pub honour_client_traceparent: bool,
    pub offsets_topic: OffsetsTopic,
    pub limits: Limits,
    pub telemetry: TelemetryConfig,
}

/// `__consumer_offsets`, created when the first client looks for a group coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct OffsetsTopic {
    /// Kafka's `offsets.topic.num.partitions`; -1: the controllers' default.
    pub partitions: i32,
    /// Kafka's `offsets.topic.replication.factor`; -1: the controllers' default.
    pub replication_factor: i32,
}

impl Default for OffsetsTopic {
    fn default() -> Self {
        Self {
            partitions: -1,
            replication_factor: -1,
        }
    }
}

/// Bounds on what clients can take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Limits {
    /// Kafka's `socket.request.max.bytes`.
    pub socket_request_max_bytes: usize,
    /// Connections served at once; more are closed at accept.
    pub max_connections: usize,
    /// Kafka's `connections.max.idle.ms`.
    pub connections_max_idle_ms: u64,
    /// Requests of one connection that wait for their answer.
    pub max_in_flight_requests: usize,
    /// Bytes of requests of one connection that wait for their answer. One larger request is
    /// still served, alone.
    pub max_in_flight_bytes: usize,
    /// Bytes of produce requests on their way to one broker, over all connections.
    pub broker_in_flight_bytes: usize,
    /// Kafka's `fetch.max.bytes` of a broker: the most that one fetch may ask for.
    pub fetch_max_bytes: usize,
    /// How long open connections may take to get their answers when the gateway stops.
    pub drain_timeout_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            socket_request_max_bytes: 100 * 1024 * 1024,
            max_connections: 10_000,
            connections_max_idle_ms: 600_000,
            max_in_flight_requests: 100,
            max_in_flight_bytes: 64 * 1024 * 1024,
            broker_in_flight_bytes: 256 * 1024 * 1024,
            fetch_max_bytes: 55 * 1024 * 1024,
            drain_timeout_ms: 5_000,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            gateway_id: "gateway-1".to_owned(),
            listeners: vec!["127.0.0.1:9092".to_owned()],
            advertised_listeners: Vec::new(),
            rack: None,
            controllers: Vec::new(),
            data_dir: PathBuf::from("data/gateway-1"),
            http_listen: "127.0.0.1:9644".to_owned(),
            worker_threads: 1,
            auto_create_topics_enable: true,
            honour_client_traceparent: false,
            offsets_topic: OffsetsTopic::default(),
            limits: Limits::default(),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl Config {
    /// Says what is wrong with the values, if anything.
    pub fn validate(&self) -> Result<(), String> {
        if self.gateway_id.is_empty() {
            return Err("gateway-id is empty; give the gateway a name".to_owned());
        }
        if self.listeners.is_empty() {
            return Err("listeners is empty; name at least one host:port".to_owned());
        }
        if self.controllers.is_empty() {
            return Err(
                "controllers is empty; name at least one controller's host:port".to_owned(),
            );
        }
        for controller in &self.controllers {
            parse_endpoint("controllers", controller)?;
        }
        self.validate_listeners()?;
        parse_endpoint("http-listen", &self.http_listen)?;
        self.limits.validate()?;
        self.telemetry.validate()
    }

    fn validate_listeners(&self) -> Result<(), String> {
        for listener in &self.listeners {
            let endpoint = parse_endpoint("listeners", listener)?;
            let address: Option<SocketAddr> = listener.parse().ok();
            let everywhere = address.is_some_and(|address| address.ip().is_unspecified());
            if everywhere && self.advertised_listeners.is_empty() {
                return Err(format!(
                    "listener {}:{} listens on every address; set advertised-listeners to the \
                     host:port that clients use",
                    endpoint.host, endpoint.port
                ));
            }
        }
        let advertised = self.advertised_listeners.len();
        if advertised != 0 && advertised != self.listeners.len() {
            return Err(format!(
                "advertised-listeners has {advertised} entries, listeners has {}; name one for each",
                self.listeners.len()
            ));
        }
        for listener in &self.advertised_listeners {
            parse_endpoint("advertised-listeners", listener)?;
        }
        Ok(())
    }
}

impl Limits {
    fn validate(&self) -> Result<(), String> {
        let positive = [
            ("max-connections", self.max_connections),
            ("max-in-flight-requests", self.max_in_flight_requests),
            ("max-in-flight-bytes", self.max_in_flight_bytes),
            ("fetch-max-bytes", self.fetch_max_bytes),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(format!("limits.{name} must be more than 0"));
            }
        }
        if self.broker_in_flight_bytes < self.socket_request_max_bytes {
            return Err("limits.broker-in-flight-bytes must be at least \
                        limits.socket-request-max-bytes, or the largest request never fits"
                .to_owned());
        }
        let largest = i32::MAX as usize / 2;
        if self.socket_request_max_bytes > chronik_proto::MESSAGE_SIZE_MAX
            || self.fetch_max_bytes > chronik_proto::MESSAGE_SIZE_MAX
            || self.broker_in_flight_bytes > largest
            || self.max_in_flight_bytes > largest
        {
            return Err(format!(
                "limits: a request or fetch may have at most {} bytes, and in flight at most \
                 {largest}",
                chronik_proto::MESSAGE_SIZE_MAX
            ));
        }
        Ok(())
    }
}

/// Splits `host:port`; the host may be an IPv6 address in brackets.
pub fn parse_endpoint(key: &str, value: &str) -> Result<Endpoint, String> {
    let invalid = || format!("{key}: '{value}' is not host:port");
    let (host, port) = value.rsplit_once(':').ok_or_else(invalid)?;
    let port = port.parse().map_err(|_| invalid())?;
    let host = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host);
    if host.is_empty() {
        return Err(invalid());
    }
    Ok(Endpoint {
        host: host.to_owned(),
        port,
    })
}

/// Kafka protocol server of a Chronik cluster. Settings come from defaults, then the file given by
/// --config, then environment variables (CHRONIK_GATEWAY_ and the key in upper case, with _ for -
/// and __ for a table: CHRONIK_GATEWAY_LIMITS__MAX_CONNECTIONS), then the flags below.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "chronik-gateway", version, after_long_help = SETTINGS_HELP)]
pub struct Args {
    /// TOML file with settings.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Name of this gateway; unique in the cluster [key: gateway-id].
    #[arg(long)]
    pub gateway_id: Option<String>,
    /// host:port to listen on for Kafka clients; may be given several times [key: listeners].
    #[arg(long = "listener")]
    pub listeners: Vec<String>,
    /// host:port that clients use for each listener [key: advertised-listeners].
    #[arg(long = "advertised-listener")]
    pub advertised_listeners: Vec<String>,
    /// host:port of a controller's gRPC services; may be given several times [key: controllers].
    #[arg(long = "controller")]
    pub controllers: Vec<String>,
    /// Folder for the last cluster image [key: data-dir].
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// host:port of /metrics, /healthz and /readyz [key: http-listen].
    #[arg(long)]
    pub http_listen: Option<String>,
    /// Checks the configuration and exits.
    #[arg(long)]
    pub check_config: bool,
}

/// Shown by `--help`: every key, what it is for, and its default.
const SETTINGS_HELP: &str = "\
Keys of the configuration file, with their defaults:
  gateway-id = \"gateway-1\"                 unique name of this gateway
  listeners = [\"127.0.0.1:9092\"]           addresses for Kafka clients, one per endpoint
  advertised-listeners = []                what clients are told instead, in the same order
  rack                                     zone; brokers of the same zone get its endpoints first
  controllers = []                         host:port of the controllers' gRPC services
  data-dir = \"data/gateway-1\"              keeps the last cluster image, nothing else
  http-listen = \"127.0.0.1:9644\"           /metrics, /healthz, /readyz
  worker-threads = 1                       threads that serve clients; 0: one per core
  auto-create-topics-enable = true         create topics that clients ask for
  honour-client-traceparent = false        follow producers' traceparent headers at ratio 0 too
  offsets-topic.partitions = -1            of __consumer_offsets; -1: the controllers' default
  offsets-topic.replication-factor = -1    -1: the controllers' default
  limits.socket-request-max-bytes = 104857600
  limits.max-connections = 10000
  limits.connections-max-idle-ms = 600000
  limits.max-in-flight-requests = 100      per connection
  limits.max-in-flight-bytes = 67108864    per connection
  limits.broker-in-flight-bytes = 268435456  produce bytes on their way to one broker
  limits.fetch-max-bytes = 57671680        the most that one fetch may ask for
  limits.drain-timeout-ms = 5000           for open connections when the gateway stops
  telemetry.log-filter = \"info,openraft=warn\"  a level, or directives such as info,chronik_gateway=debug
  telemetry.log-format = \"text\"            text or json
  telemetry.otlp-endpoint                  such as http://127.0.0.1:4317; without it, no traces
  telemetry.trace-sample-ratio = 0.01      fraction of requests that are traced";

impl Args {
    /// The configuration in force, validated; or what is wrong with it.
    pub fn load(self) -> Result<Config, String> {
        let mut config: Config =
            chronik_telemetry::config::load(self.config.as_deref(), ENV_PREFIX)
                .map_err(|error| error.to_string())?;
        if let Some(gateway_id) = self.gateway_id {
            config.gateway_id = gateway_id;
        }
        if !self.listeners.is_empty() {
            config.listeners = self.listeners;
        }
        if !self.advertised_listeners.is_empty() {
            config.advertised_listeners = self.advertised_listeners;
        }
        if !self.controllers.is_empty() {
            config.controllers = self.controllers;
        }
        if let Some(data_dir) = self.data_dir {
            config.data_dir = data_dir;
        }
        if let Some(http_listen) = self.http_listen {
            config.http_listen = http_listen;
        }
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> Config {
        Config {
            controllers: vec!["127.0.0.1:1".to_owned()],
            ..Config::default()
        }
    }

    fn refused(change: impl FnOnce(&mut Config), word: &str) {
        let mut config = valid();
        change(&mut config);
        let why = config.validate().unwrap_err();
        assert!(why.contains(word), "{why}");
    }

    #[test]
    fn bad_values_are_named() {
        assert_eq!(valid().validate(), Ok(()));
        refused(|c| c.controllers.clear(), "controllers");
        refused(|c| c.listeners = vec!["nonsense".to_owned()], "listeners");
        refused(
            |c| c.listeners = vec!["0.0.0.0:9092".to_owned()],
            "advertised-listeners",
        );
        refused(
            |c| c.advertised_listeners = vec!["a:1".into(), "b:2".into()],
            "advertised",
        );
        refused(
            |c| c.limits.broker_in_flight_bytes = 1,
            "broker-in-flight-bytes",
        );
        refused(|c| c.limits.max_connections = 0, "max-connections");
        refused(|c| c.telemetry.trace_sample_ratio = 2.0, "ratio");
    }

    #[test]
    fn every_setting_is_documented() {
        let wrong = chronik_telemetry::config::wrong_in_help::<Config>(SETTINGS_HELP);
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn the_sample_file_is_valid() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/config/gateway.toml");
        let args = Args {
            config: Some(file.into()),
            ..Args::default()
        };
        let config = args.load().unwrap();
        assert_eq!(config.listeners.len(), 3);
    }

    #[test]
    fn ipv6_endpoints_lose_their_brackets() {
        let endpoint = parse_endpoint("k", "[::1]:9092").unwrap();
        assert_eq!((endpoint.host.as_str(), endpoint.port), ("::1", 9092));
    }
}
