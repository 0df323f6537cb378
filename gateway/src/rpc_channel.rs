//! gRPC channels to brokers and controllers, all with the same settings.
//!
//! Invariant: a peer that vanished without closing its connection is noticed within seconds.

use std::time::Duration;

use chronik_proto::{HTTP2_CONNECTION_WINDOW, HTTP2_FRAME_SIZE, HTTP2_STREAM_WINDOW};
use chronik_telemetry::rpc::Carry;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Error};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// A channel whose calls carry the trace on that they are made within.
pub type TracedChannel = InterceptedService<Channel, Carry>;

/// A connection to `host:port`, not opened yet.
pub fn endpoint(address: &str) -> Result<Endpoint, Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME_SIZE)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true))
}
