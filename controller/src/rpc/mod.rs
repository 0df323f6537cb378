//! gRPC services for brokers, gateways and the other controllers.

pub mod admin;
pub mod error;
pub mod sessions;
pub mod watch;

use chronik_proto::v1::admin_server::AdminServer;
use chronik_proto::v1::controller_raft_server::ControllerRaftServer;
use chronik_proto::v1::sessions_server::SessionsServer;
use chronik_proto::v1::watch_server::WatchServer;
use chronik_proto::{
    HTTP2_CONNECTION_WINDOW, HTTP2_FRAME_SIZE, HTTP2_STREAM_WINDOW, MESSAGE_SIZE_MAX,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::controller::Controller;
use crate::raft::RaftRpc;

const KEEP_ALIVE: std::time::Duration = std::time::Duration::from_secs(5);

/// Serves all services until `stop`.
pub async fn serve(
    listener: TcpListener,
    controller: Controller,
    raft: RaftRpc,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let watch = watch::WatchRpc::new(controller.clone(), stop.clone());
    let sessions = sessions::SessionsRpc::new(controller.clone());
    let admin = admin::AdminRpc::new(controller);
    Server::builder()
        .max_frame_size(HTTP2_FRAME_SIZE)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(
            ControllerRaftServer::new(raft)
                .max_decoding_message_size(MESSAGE_SIZE_MAX)
                .max_encoding_message_size(MESSAGE_SIZE_MAX),
        )
        .add_service(
            SessionsServer::new(sessions)
                .max_decoding_message_size(MESSAGE_SIZE_MAX)
                .max_encoding_message_size(MESSAGE_SIZE_MAX),
        )
        .add_service(WatchServer::new(watch).max_encoding_message_size(MESSAGE_SIZE_MAX))
        .add_service(
            AdminServer::new(admin)
                .max_decoding_message_size(MESSAGE_SIZE_MAX)
                .max_encoding_message_size(MESSAGE_SIZE_MAX),
        )
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            stop.cancelled_owned(),
        )
        .await
}
