//! The TOML files of the services, one per process, and the folders and files they name.
//!
//! Invariant: keys and their meaning are the services' own (`controller/src/config.rs`,
//! `broker/src/config.rs`, `gateway/src/config.rs`); they refuse a key they do not know, so a
//! mismatch shows at once.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::layout::Layout;
use super::process::Role;

/// How traces leave the services. What they log is their own default.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Telemetry {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_sample_ratio: Option<f64>,
}

/// One process: its files and addresses.
#[derive(Debug, Clone)]
pub struct Service {
    pub name: String,
    pub role: Role,
    pub id: String,
    pub config: PathBuf,
    pub log: PathBuf,
    /// gRPC; gateways have none.
    pub rpc_address: Option<String>,
    /// REST of a controller; `/healthz`, `/readyz` and `/metrics` of every service.
    pub http_address: String,
    /// Kafka endpoints of a gateway.
    pub kafka_addresses: Vec<String>,
    /// Contents of `config`.
    pub toml: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ControllerAddress {
    id: u64,
    rpc_address: String,
    rest_address: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ControllerConfig<'a> {
    controller_id: u64,
    data_dir: PathBuf,
    rpc_listen: String,
    rest_listen: String,
    controllers: &'a [ControllerAddress],
    topic_defaults: TopicDefaults,
    telemetry: &'a Telemetry,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct TopicDefaults {
    replication_factor: usize,
}

/// Of topics that do not say otherwise, where there are enough brokers.
const REPLICATION_FACTOR: usize = 3;

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct BrokerConfig<'a> {
    broker_id: i32,
    data_dir: PathBuf,
    rpc_listen: String,
    rpc_advertised: String,
    http_listen: String,
    controllers: Vec<String>,
    consumer_groups: ConsumerGroups,
    telemetry: &'a Telemetry,
}

/// A consumer that is tried out gets its partitions at once: no waiting for others to join.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ConsumerGroups {
    initial_rebalance_delay_ms: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct GatewayConfig<'a> {
    gateway_id: String,
    data_dir: PathBuf,
    listeners: Vec<String>,
    http_listen: String,
    controllers: Vec<String>,
    telemetry: &'a Telemetry,
}

/// Everything that is to run, controllers first. `data_dir` is absolute.
pub fn services(
    layout: &Layout,
    data_dir: &Path,
    telemetry: &Telemetry,
) -> anyhow::Result<Vec<Service>> {
    let controllers: Vec<ControllerAddress> = (1..)
        .zip(&layout.controllers)
        .map(|(id, ports)| ControllerAddress {
            id,
            rpc_address: address(ports.rpc),
            rest_address: address(ports.rest),
        })
        .collect();
    let controller_rpc: Vec<String> = controllers
        .iter()
        .map(|controller| controller.rpc_address.clone())
        .collect();
    let mut services = Vec::new();
    for (id, ports) in (1..).zip(&layout.controllers) {
        let mut service = service(data_dir, Role::Controller, id, address(ports.rest));
        service.rpc_address = Some(address(ports.rpc));
        service.toml = toml::to_string(&ControllerConfig {
            controller_id: id,
            data_dir: data_dir.join(&service.name),
            rpc_listen: address(ports.rpc),
            rest_listen: address(ports.rest),
            controllers: &controllers,
            topic_defaults: TopicDefaults {
                replication_factor: layout.brokers.len().clamp(1, REPLICATION_FACTOR),
            },
            telemetry,
        })?;
        services.push(service);
    }
    for (id, ports) in (1..).zip(&layout.brokers) {
        let mut service = service(data_dir, Role::Broker, id, address(ports.http));
        service.rpc_address = Some(address(ports.rpc));
        service.toml = toml::to_string(&BrokerConfig {
            broker_id: i32::try_from(id)?,
            data_dir: data_dir.join(&service.name),
            rpc_listen: address(ports.rpc),
            rpc_advertised: address(ports.rpc),
            http_listen: address(ports.http),
            controllers: controller_rpc.clone(),
            consumer_groups: ConsumerGroups {
                initial_rebalance_delay_ms: 0,
            },
            telemetry,
        })?;
        services.push(service);
    }
    for (id, ports) in (1..).zip(&layout.gateways) {
        let mut service = service(data_dir, Role::Gateway, id, address(ports.http));
        service.kafka_addresses = ports.kafka.iter().copied().map(address).collect();
        service.toml = toml::to_string(&GatewayConfig {
            gateway_id: service.name.clone(),
            data_dir: data_dir.join(&service.name),
            listeners: service.kafka_addresses.clone(),
            http_listen: address(ports.http),
            controllers: controller_rpc.clone(),
            telemetry,
        })?;
        service.id = service.name.clone();
        services.push(service);
    }
    Ok(services)
}

fn service(data_dir: &Path, role: Role, id: u64, http_address: String) -> Service {
    let name = format!("{}-{id}", role.name());
    Service {
        config: data_dir.join("config").join(format!("{name}.toml")),
        log: data_dir.join("logs").join(format!("{name}.log")),
        id: id.to_string(),
        name,
        role,
        rpc_address: None,
        http_address,
        kafka_addresses: Vec::new(),
        toml: String::new(),
    }
}

fn address(port: u16) -> String {
    format!("127.0.0.1:{port}")
}
