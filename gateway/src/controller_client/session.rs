//! The gateway's session: registered as long as it runs, gone from the image when it leaves.
//!
//! Invariant: a session that ended is registered anew; without controllers the gateway goes on.

use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::sessions_client::SessionsClient;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{BACKOFF_MAX, BACKOFF_MIN, ControllerClient, SESSION_CALL_TIMEOUT};
use crate::error::CallError;
use crate::metadata_cache::MetadataCache;

/// Keeps the gateway registered until `stop`, then leaves.
pub async fn hold_session(
    client: Arc<ControllerClient>,
    cache: Arc<MetadataCache>,
    stop: CancellationToken,
) {
    let mut session = Session {
        client,
        cache,
        registered: false,
        warned: false,
        interval: BACKOFF_MAX,
    };
    let mut backoff = BACKOFF_MIN;
    loop {
        let pause = match session.step().await {
            Ok(interval) => {
                backoff = BACKOFF_MIN;
                interval
            }
            Err(why) => {
                session.lost(&why);
                backoff = backoff.saturating_mul(2).min(BACKOFF_MAX);
                backoff
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => break,
        }
    }
    session.leave().await;
}

struct Session {
    client: Arc<ControllerClient>,
    cache: Arc<MetadataCache>,
    registered: bool,
    warned: bool,
    interval: Duration,
}

impl Session {
    /// Registers or sends a heartbeat; answers how long to wait until the next one.
    async fn step(&mut self) -> Result<Duration, CallError> {
        if !self.registered {
            return self.register().await;
        }
        let answer = self.heartbeat(false).await?;
        if answer.expired {
            self.registered = false;
            return Ok(Duration::ZERO);
        }
        Ok(self.interval)
    }

    async fn register(&mut self) -> Result<Duration, CallError> {
        let own = self.cache.own();
        let request = v1::RegisterGatewayRequest {
            gateway_id: own.gateway_id.clone(),
            incarnation_id: chronik_proto::uuid_bytes(own.incarnation_id),
            rack: own.rack.clone(),
            endpoints: own.endpoints.iter().map(Into::into).collect(),
        };
        let answer = self
            .client
            .call(SESSION_CALL_TIMEOUT, |channel| {
                let request = request.clone();
                async move { SessionsClient::new(channel).register_gateway(request).await }
            })
            .await?;
        self.interval =
            Duration::from_millis(u64::from(answer.heartbeat_interval_ms).clamp(50, 60_000));
        self.registered = true;
        self.warned = false;
        info!(
            gateway_id = own.gateway_id,
            cluster_id = answer.cluster_id,
            "registered"
        );
        Ok(self.interval)
    }

    async fn heartbeat(&self, leaving: bool) -> Result<v1::GatewayHeartbeatResponse, CallError> {
        let own = self.cache.own();
        let request = v1::GatewayHeartbeatRequest {
            gateway_id: own.gateway_id.clone(),
            incarnation_id: chronik_proto::uuid_bytes(own.incarnation_id),
            leaving,
        };
        self.client
            .call(SESSION_CALL_TIMEOUT, |channel| {
                let request = request.clone();
                async move {
                    SessionsClient::new(channel)
                        .gateway_heartbeat(request)
                        .await
                }
            })
            .await
    }

    /// One line when the session is in doubt, not one per attempt.
    fn lost(&mut self, why: &CallError) {
        if !self.warned {
            warn!(error = %why, "no controller answers the gateway's session; going on");
            self.warned = true;
        }
    }

    async fn leave(self) {
        if self.registered {
            // The session would run out by itself; leaving only makes it quicker.
            let _ = timeout(Duration::from_secs(1), self.heartbeat(true)).await;
        }
    }
}
