//! How the stream of frames to a peer is made: gRPC in operation, something else in a simulation.
//!
//! Invariant: a refused connection is told apart from all other failures, because only it proves
//! that the peer's process is dead.

use std::error::Error;
use std::io;

use chronik_proto::v1::peers_client::PeersClient;
use chronik_proto::{
    HTTP2_CONNECTION_WINDOW, HTTP2_FRAME_SIZE, HTTP2_STREAM_WINDOW, MESSAGE_SIZE_MAX, v1,
};
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use tonic::Status;
use tonic::transport::Endpoint;

use super::dial::LinkTiming;
use super::queue::FrameStream;

/// What comes from a peer, in the order in which it was sent; ends with the connection.
pub type Frames = BoxStream<'static, Result<v1::PeerFrame, Status>>;

/// Why there is no stream to a peer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("the address is not valid: {0}")]
    Address(String),
    #[error("connection refused")]
    Refused,
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("the stream failed: {}", .0.message())]
    Stream(Box<Status>),
}

/// Makes streams to peers.
pub trait Connector: Send + Sync + 'static {
    /// A stream to the peer at `address`: it gets what `outbound` yields, and what it answers comes
    /// back. Dropping either end breaks the connection. May wait for ever; the caller has a limit.
    fn connect(
        &self,
        address: &str,
        timing: LinkTiming,
        outbound: FrameStream,
    ) -> BoxFuture<'static, Result<Frames, ConnectError>>;
}

/// The real one.
pub struct GrpcConnector;

impl Connector for GrpcConnector {
    fn connect(
        &self,
        address: &str,
        timing: LinkTiming,
        outbound: FrameStream,
    ) -> BoxFuture<'static, Result<Frames, ConnectError>> {
        let uri = format!("http://{address}");
        Box::pin(async move {
            let channel = Endpoint::from_shared(uri)
                .map_err(|error| ConnectError::Address(error.to_string()))?
                .connect_timeout(timing.connect_timeout)
                .tcp_nodelay(true)
                .initial_stream_window_size(HTTP2_STREAM_WINDOW)
                .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
                .max_frame_size(HTTP2_FRAME_SIZE)
                .connect()
                .await
                .map_err(|error| connect_error(&error))?;
            let mut client = PeersClient::new(channel)
                .max_decoding_message_size(MESSAGE_SIZE_MAX)
                .max_encoding_message_size(MESSAGE_SIZE_MAX);
            let response = client.exchange(outbound).await;
            let inbound = response.map_err(|status| ConnectError::Stream(Box::new(status)))?;
            Ok(inbound.into_inner().boxed())
        })
    }
}

/// Finds the system's own error in what the transport reports.
fn connect_error(error: &tonic::transport::Error) -> ConnectError {
    let mut source: Option<&dyn Error> = error.source();
    let mut message = error.to_string();
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        if let Some(io) = cause.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::ConnectionRefused
        {
            return ConnectError::Refused;
        }
        source = cause.source();
    }
    ConnectError::Connect(message)
}
