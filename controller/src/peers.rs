//! gRPC channels to the other controllers, made on first use and kept.
//!
//! Invariant: a channel reconnects by itself; a peer that is down costs one refused connection per
//! request and nothing while idle.

use std::collections::BTreeMap;
use std::time::Duration;

use chronik_proto::{HTTP2_CONNECTION_WINDOW, HTTP2_STREAM_WINDOW};
use tonic::transport::{Channel, Endpoint};

use crate::config::ControllerAddress;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Channels by controller id. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Peers {
    channels: BTreeMap<u64, Channel>,
}

/// An address that cannot be one.
#[derive(Debug, thiserror::Error)]
#[error("'{address}' is not an address: {source}")]
pub struct InvalidAddress {
    address: String,
    source: tonic::transport::Error,
}

impl Peers {
    /// Channels to all controllers but `own_id`. Connects to nobody yet.
    pub fn new(group: &[ControllerAddress], own_id: u64) -> Result<Self, InvalidAddress> {
        let channels = group
            .iter()
            .filter(|controller| controller.id != own_id)
            .map(|controller| {
                Ok((
                    controller.id,
                    endpoint(&controller.rpc_address)?.connect_lazy(),
                ))
            })
            .collect::<Result<_, InvalidAddress>>()?;
        Ok(Self { channels })
    }

    pub fn channel(&self, controller_id: u64) -> Option<Channel> {
        self.channels.get(&controller_id).cloned()
    }
}

/// How controllers reach each other.
pub fn endpoint(address: &str) -> Result<Endpoint, InvalidAddress> {
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|source| InvalidAddress {
            address: address.to_owned(),
            source,
        })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW))
}
