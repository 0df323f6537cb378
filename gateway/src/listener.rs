//! Accepts client connections on one endpoint, up to the connection limit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::connection;
use crate::log_limit::LogLimit;
use crate::services::{Origin, Services};
use chronik_types::cluster_image::Endpoint;

/// A bound listener and the endpoint it stands for.
pub struct Listener {
    pub socket: TcpListener,
    pub endpoint: Endpoint,
}

/// What the listeners of a gateway share.
pub struct Connections {
    pub services: Arc<Services>,
    /// One permit per connection.
    pub limit: Arc<Semaphore>,
    pub tracker: TaskTracker,
    /// Asks connections to answer what they have taken and to end.
    pub drain: CancellationToken,
    /// Ends connections at once.
    pub stop: CancellationToken,
    refused_log: LogLimit,
}

impl Connections {
    pub fn new(
        services: Arc<Services>,
        tracker: TaskTracker,
        drain: CancellationToken,
        stop: CancellationToken,
    ) -> Self {
        let limit = Arc::new(Semaphore::new(services.config.limits.max_connections));
        Self {
            services,
            limit,
            tracker,
            drain,
            stop,
            refused_log: LogLimit::default(),
        }
    }

    /// Accepts until `drain`.
    pub async fn accept(self: Arc<Self>, listener: Listener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.socket.accept() => accepted,
                () = self.drain.cancelled() => return,
            };
            match accepted {
                Ok((stream, peer)) => self.serve(stream, peer.ip().to_string(), &listener.endpoint),
                Err(error) => {
                    // Out of file descriptors, as a rule: it passes when connections close.
                    warn!(%error, "accepting a connection failed");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn serve(&self, stream: TcpStream, client_host: String, endpoint: &Endpoint) {
        let Ok(permit) = self.limit.clone().try_acquire_owned() else {
            self.services.metrics.connections_refused.inc();
            if let Some(left_out) = self.refused_log.admit(Instant::now()) {
                warn!(left_out, "too many connections; see limits.max-connections");
            }
            return;
        };
        let origin = Arc::new(Origin {
            endpoint: endpoint.clone(),
            client_host: client_host.into(),
        });
        let services = self.services.clone();
        let (drain, stop) = (self.drain.clone(), self.stop.clone());
        self.tracker.spawn(async move {
            services.metrics.connections.inc();
            tokio::select! {
                () = connection::serve(stream, services.clone(), origin, drain) => {}
                () = stop.cancelled() => {}
            }
            services.metrics.connections.dec();
            drop(permit);
        });
    }
}
