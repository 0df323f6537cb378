//! The gRPC server: what gateways and other brokers call, on one port.
//!
//! Invariant: it ends as soon as it is told to. Streams, which never end by themselves, are cut off.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use chronik_proto::v1::data_server::DataServer;
use chronik_proto::v1::groups_server::GroupsServer;
use chronik_proto::v1::segments_server::SegmentsServer;
use chronik_proto::{
    HTTP2_CONNECTION_WINDOW, HTTP2_FRAME_SIZE, HTTP2_STREAM_WINDOW, MESSAGE_SIZE_MAX,
};
use chronik_storage::Storage;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::consumer_group::replica_log::ConsumerGroups;
use crate::metrics::BrokerMetrics;
use crate::peers::Peers;
use crate::replicas::Replicas;
use crate::rpc::data::DataService;
use crate::rpc::groups::GroupsService;
use crate::rpc::segments::SegmentsService;

/// An idle connection whose other end is gone is noticed by this.
const HTTP2_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

pub(super) struct Services<'a> {
    pub(super) replicas: &'a Replicas,
    pub(super) groups: &'a ConsumerGroups,
    pub(super) peers: &'a Peers,
    pub(super) storage: &'a Storage,
    pub(super) metrics: &'a BrokerMetrics,
    pub(super) folder: PathBuf,
}

pub(super) fn serve_rpc(
    listener: TcpListener,
    services: Services<'_>,
    stop: CancellationToken,
) -> impl Future<Output = anyhow::Result<&'static str>> + use<> {
    let data = DataService::new(
        services.replicas.clone(),
        services.storage.clone(),
        services.folder,
    );
    let data = DataServer::new(data)
        .max_decoding_message_size(MESSAGE_SIZE_MAX)
        .max_encoding_message_size(MESSAGE_SIZE_MAX);
    let groups = GroupsServer::new(GroupsService::new(services.groups.coordinators().clone()))
        .max_decoding_message_size(MESSAGE_SIZE_MAX)
        .max_encoding_message_size(MESSAGE_SIZE_MAX);
    let segments = SegmentsService::new(services.replicas.clone(), services.metrics.clone());
    let segments = SegmentsServer::new(segments)
        .max_decoding_message_size(MESSAGE_SIZE_MAX)
        .max_encoding_message_size(MESSAGE_SIZE_MAX);
    let router = Server::builder()
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME_SIZE)
        .http2_keepalive_interval(Some(HTTP2_KEEP_ALIVE_INTERVAL))
        .add_service(data)
        .add_service(groups)
        .add_service(segments)
        .add_service(services.peers.service());
    async move {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        // Streams of gateways and peers never end by themselves: nothing is waited for.
        tokio::select! {
            () = stop.cancelled() => Ok("gRPC server"),
            served = router.serve_with_incoming(incoming) => {
                served.context("gRPC server").map(|()| "gRPC server")
            }
        }
    }
}
