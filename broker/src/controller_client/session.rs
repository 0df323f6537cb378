//! The broker's session: registration and heartbeats.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chronik_proto::v1;
use chronik_types::epoch::BrokerEpoch;
use rand::Rng;
use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};

use super::{Inner, RETRY_MAX, RETRY_MIN};

/// Used where a controller names none.
const HEARTBEAT_INTERVAL_DEFAULT: Duration = Duration::from_millis(500);

/// Registers and sends heartbeats until dropped.
pub async fn keep_session(inner: Arc<Inner>) {
    while !*inner.shutting_down.borrow() {
        let (epoch, interval) = register(&inner).await;
        inner.epoch.send_replace(Some(epoch));
        heartbeats(&inner, epoch, interval).await;
    }
}

/// Asks one controller after the other until one has registered this broker.
async fn register(inner: &Inner) -> (BrokerEpoch, Duration) {
    let us = &inner.registration;
    let mut wait = RETRY_MIN;
    let mut last_log: Option<Instant> = None;
    loop {
        let request = v1::RegisterBrokerRequest {
            broker_id: us.broker_id.0,
            incarnation_id: chronik_proto::uuid_bytes(us.incarnation_id),
            rpc_address: us.rpc_address.clone(),
            rack: us.rack.clone(),
            storage_id: chronik_proto::uuid_bytes(us.storage_id),
            cluster_id: inner.cluster_id.borrow().clone(),
            held_replicas: inner.held_replicas(),
            names_held_replicas: true,
        };
        let result = inner
            .call(|mut client| async move { client.register_broker(request).await })
            .await;
        match result {
            Ok(response) if inner.is_our_cluster(&response.cluster_id).await => {
                let interval = match response.heartbeat_interval_ms {
                    0 => HEARTBEAT_INTERVAL_DEFAULT,
                    ms => Duration::from_millis(u64::from(ms)),
                };
                info!(
                    broker_id = us.broker_id.0,
                    broker_epoch = response.broker_epoch,
                    "registered"
                );
                return (BrokerEpoch(response.broker_epoch), interval);
            }
            Ok(response) => {
                let cluster_id = inner.cluster_id.borrow().clone();
                error!(
                    ours = cluster_id,
                    theirs = response.cluster_id,
                    "the controllers are of another cluster than this broker's data; \
                     check controllers and data-dir"
                );
                wait = RETRY_MAX;
            }
            Err(status) => {
                // Once at first, then every few seconds: controllers may start after brokers.
                if last_log.is_none_or(|at| at.elapsed() > Duration::from_secs(5)) {
                    last_log = Some(Instant::now());
                    info!(code = ?status.code(), error = status.message(), "not registered yet");
                }
            }
        }
        let jitter = rand::rng().random_range(0.75..1.25);
        sleep(wait.mul_f64(jitter)).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}

/// Sends heartbeats until the session is lost.
async fn heartbeats(inner: &Inner, epoch: BrokerEpoch, interval: Duration) {
    let mut shutting_down = inner.shutting_down.subscribe();
    let mut failing = false;
    loop {
        let stops = *shutting_down.borrow_and_update();
        let request = v1::BrokerHeartbeatRequest {
            broker_id: inner.registration.broker_id.0,
            broker_epoch: epoch.0,
            revision: inner.acted_revision.load(Ordering::Relaxed),
            shutting_down: stops,
        };
        let result = inner
            .call(|mut client| async move { client.broker_heartbeat(request).await })
            .await;
        let wait = match result {
            Ok(response) => {
                if failing {
                    failing = false;
                    info!("a controller answers heartbeats again");
                }
                if stops {
                    inner.shutdown_told.notify_waiters();
                } else if response.fenced {
                    inner.session_lost(epoch);
                    return;
                }
                interval
            }
            Err(status) => {
                if !failing {
                    failing = true;
                    warn!(
                        error = status.message(),
                        "a controller does not take the heartbeat"
                    );
                }
                // Another controller may answer before the session runs out.
                (interval / 4).max(RETRY_MIN)
            }
        };
        tokio::select! {
            () = sleep(wait) => {}
            _ = shutting_down.changed() => {}
            () = inner.fenced.notified() => return,
        }
    }
}
