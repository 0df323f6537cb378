//! What the local cluster consists of and which ports it uses, kept in `cluster.toml` of the data
//! folder so that a restart finds the same cluster.
//!
//! Invariant: planning never takes away what holds data. Controllers stay the voters they were,
//! and the number of brokers never falls.

use std::io;

use serde::{Deserialize, Serialize};

use super::ports::Ports;

const DEFAULT_CONTROLLERS: u16 = 3;
const DEFAULT_BROKERS: u16 = 3;
const DEFAULT_GATEWAYS: u16 = 1;
const DEFAULT_KAFKA_PORT: u16 = 9092;
const DEFAULT_REST_PORT: u16 = 8080;

/// What the command line asks for; `None` where it is silent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    pub controllers: Option<u16>,
    pub brokers: Option<u16>,
    pub gateways: Option<u16>,
    /// 0: free ports.
    pub kafka_port: Option<u16>,
    /// 0: a free port.
    pub rest_port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Layout {
    /// As asked for: 0 means that the ports below were free ones.
    pub kafka_port: u16,
    pub rest_port: u16,
    pub controllers: Vec<ControllerPorts>,
    pub brokers: Vec<BrokerPorts>,
    pub gateways: Vec<GatewayPorts>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ControllerPorts {
    pub rpc: u16,
    pub rest: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BrokerPorts {
    pub rpc: u16,
    pub http: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct GatewayPorts {
    pub kafka: Vec<u16>,
    pub http: u16,
}

/// Why there is no layout for what was asked.
#[derive(Debug)]
pub enum PlanError {
    ControllersFixed {
        kept: usize,
    },
    BrokersKept {
        kept: usize,
    },
    TooManyPorts {
        kafka_port: u16,
    },
    PortTaken {
        port: u16,
        of: String,
        flag: Option<&'static str>,
        source: io::Error,
    },
    NoFreePort(io::Error),
}

impl std::fmt::Display for PlanError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ControllersFixed { kept } => write!(
                f,
                "this data folder has {kept} controllers and their number cannot be changed; \
                 leave --controllers away, or take another --data-dir"
            ),
            Self::BrokersKept { kept } => write!(
                f,
                "this data folder has {kept} brokers, which may hold records; give --brokers \
                 {kept} or more, or take another --data-dir"
            ),
            Self::TooManyPorts { kafka_port } => write!(
                f,
                "there are not enough ports from {kafka_port} up for every gateway's endpoints; \
                 take a lower --kafka-port"
            ),
            Self::PortTaken {
                port,
                of,
                flag: Some(flag),
                source,
            } => write!(
                f,
                "127.0.0.1:{port} ({of}) cannot be used: {source}; stop the program that uses it, \
                 or take another port by {flag} (0: free ports)"
            ),
            Self::PortTaken {
                port,
                of,
                flag: None,
                source,
            } => write!(
                f,
                "127.0.0.1:{port} ({of}, kept in cluster.toml) cannot be used: {source}; stop the \
                 program that uses it, or change the port in cluster.toml of the data folder"
            ),
            Self::NoFreePort(source) => write!(f, "cannot reserve a port: {source}"),
        }
    }
}

impl std::error::Error for PlanError {}

impl Layout {
    /// Brings the kept layout, if any, and what is wanted together, and reserves every port.
    pub fn plan(
        kept: Option<Layout>,
        wanted: Wanted,
        ports: &mut Ports,
    ) -> Result<Self, PlanError> {
        let fresh = kept.is_none();
        let mut layout = kept.unwrap_or(Layout {
            kafka_port: DEFAULT_KAFKA_PORT,
            rest_port: DEFAULT_REST_PORT,
            controllers: Vec::new(),
            brokers: Vec::new(),
            gateways: Vec::new(),
        });
        let count = |wanted: Option<u16>, kept: usize, default: u16| match wanted {
            Some(count) => usize::from(count),
            None if fresh => usize::from(default),
            None => kept,
        };
        let controllers = count(
            wanted.controllers,
            layout.controllers.len(),
            DEFAULT_CONTROLLERS,
        );
        let brokers = count(wanted.brokers, layout.brokers.len(), DEFAULT_BROKERS);
        let gateways = count(wanted.gateways, layout.gateways.len(), DEFAULT_GATEWAYS);
        if !fresh && controllers != layout.controllers.len() {
            return Err(PlanError::ControllersFixed {
                kept: layout.controllers.len(),
            });
        }
        if brokers < layout.brokers.len() {
            return Err(PlanError::BrokersKept {
                kept: layout.brokers.len(),
            });
        }
        let kafka_was_free = layout.kafka_port == 0;
        let rest_was_free = layout.rest_port == 0;
        layout.kafka_port = wanted.kafka_port.unwrap_or(layout.kafka_port);
        layout.rest_port = wanted.rest_port.unwrap_or(layout.rest_port);

        layout.hold_kept_ports(kafka_was_free, rest_was_free, gateways, ports)?;
        layout
            .brokers
            .resize(brokers, BrokerPorts { rpc: 0, http: 0 });
        layout
            .controllers
            .resize(controllers, ControllerPorts { rpc: 0, rest: 0 });
        layout.gateways.resize(
            gateways,
            GatewayPorts {
                kafka: Vec::new(),
                http: 0,
            },
        );
        for gateway in &mut layout.gateways {
            // As many endpoints as brokers, so that each broker id can have one of its own.
            gateway.kafka.resize(brokers, 0);
        }
        // Ports that a flag names come first: a free one must not be in their way.
        layout.hold_named_ports(ports)?;
        for port in layout.ports_mut().filter(|port| **port == 0) {
            *port = ports.pick().map_err(PlanError::NoFreePort)?;
        }
        Ok(layout)
    }

    /// Reserves what the kept layout already uses, and forgets what is to be placed anew: ports
    /// that follow from a flag, and free ports where the flag now names one.
    fn hold_kept_ports(
        &mut self,
        kafka_was_free: bool,
        rest_was_free: bool,
        gateways: usize,
        ports: &mut Ports,
    ) -> Result<(), PlanError> {
        self.gateways.truncate(gateways);
        for (number, gateway) in (1..).zip(&mut self.gateways) {
            hold(
                ports,
                gateway.http,
                format!("HTTP of gateway {number}"),
                None,
            )?;
            if !(kafka_was_free && self.kafka_port == 0) {
                gateway.kafka.clear();
            }
            for &port in &gateway.kafka {
                hold(
                    ports,
                    port,
                    format!("Kafka endpoint of gateway {number}"),
                    None,
                )?;
            }
        }
        for (number, broker) in (1..).zip(&self.brokers) {
            hold(ports, broker.rpc, format!("gRPC of broker {number}"), None)?;
            hold(ports, broker.http, format!("HTTP of broker {number}"), None)?;
        }
        for (number, controller) in (1..).zip(&mut self.controllers) {
            hold(
                ports,
                controller.rpc,
                format!("gRPC of controller {number}"),
                None,
            )?;
            if number == 1 && !(rest_was_free && self.rest_port == 0) {
                controller.rest = 0;
            } else {
                hold(
                    ports,
                    controller.rest,
                    format!("REST of controller {number}"),
                    None,
                )?;
            }
        }
        Ok(())
    }

    /// Reserves the ports that follow from `kafka_port` and `rest_port` where those name one.
    fn hold_named_ports(&mut self, ports: &mut Ports) -> Result<(), PlanError> {
        let kafka_port = self.kafka_port;
        if kafka_port != 0 {
            let mut following = kafka_port..=u16::MAX;
            for (number, gateway) in (1..).zip(&mut self.gateways) {
                for port in &mut gateway.kafka {
                    *port = following
                        .next()
                        .ok_or(PlanError::TooManyPorts { kafka_port })?;
                    let of = format!("Kafka endpoint of gateway {number}");
                    hold(ports, *port, of, Some("--kafka-port"))?;
                }
            }
        }
        if let Some(first) = self.controllers.first_mut().filter(|_| self.rest_port != 0) {
            first.rest = self.rest_port;
            hold(
                ports,
                first.rest,
                "REST of controller 1".to_owned(),
                Some("--rest-port"),
            )?;
        }
        Ok(())
    }

    fn ports_mut(&mut self) -> impl Iterator<Item = &mut u16> {
        let controllers = self
            .controllers
            .iter_mut()
            .flat_map(|c| [&mut c.rpc, &mut c.rest]);
        let brokers = self
            .brokers
            .iter_mut()
            .flat_map(|b| [&mut b.rpc, &mut b.http]);
        let gateways = self.gateways.iter_mut().flat_map(|gateway| {
            gateway
                .kafka
                .iter_mut()
                .chain(std::iter::once(&mut gateway.http))
        });
        controllers.chain(brokers).chain(gateways)
    }
}

fn hold(
    ports: &mut Ports,
    port: u16,
    of: String,
    flag: Option<&'static str>,
) -> Result<(), PlanError> {
    ports.hold(port).map_err(|source| PlanError::PortTaken {
        port,
        of,
        flag,
        source,
    })
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod tests;
