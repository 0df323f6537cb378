//! The loop that follows Raft's leadership: takes over when elected, ends sessions while leading.
//!
//! Invariant: `Role::Leader` is announced only after this leader's first command is applied here.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chronik_types::cluster_image::Controller as ControllerEntry;
use chronik_types::id::ControllerId;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::command::{BecomeLeader, Command};
use crate::controller::{Controller, Role};
use crate::liveness::Expired;
use crate::raft::Leadership;
use crate::rebalancer;

/// Between two attempts to take over: right after an election the lease may not be there yet.
const TAKE_OVER_RETRY: Duration = Duration::from_millis(20);
/// Between two attempts to end sessions that a majority did not take.
const RETRY: Duration = Duration::from_millis(300);

/// Runs until `stop`.
pub async fn run(controller: Controller, stop: CancellationToken) {
    let mut leadership = controller.node().leadership();
    loop {
        let current = *leadership.borrow_and_update();
        let (role, term) = match current {
            Leadership::Unknown => (Role::Waiting, None),
            Leadership::Remote { controller_id } => (
                Role::Follower {
                    leader: controller_id,
                },
                None,
            ),
            Leadership::Local { term } => (Role::Waiting, Some(term)),
        };
        set_role(&controller, role);
        tokio::select! {
            changed = leadership.changed() => if changed.is_err() { return },
            () = lead(&controller, term) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Takes over and leads until dropped; waits for ever where there is nothing to lead.
async fn lead(controller: &Controller, term: Option<u64>) {
    let Some(term) = term else {
        return std::future::pending().await;
    };
    let config = controller.config();
    let cluster_id = match config.cluster_id.as_str() {
        "" => Uuid::new_v4().simple().to_string(),
        name => name.to_owned(),
    };
    let controllers = config
        .group()
        .into_iter()
        .map(|address| ControllerEntry {
            controller_id: ControllerId(address.id),
            rpc_address: address.rpc_address,
            rest_address: address.rest_address,
        })
        .collect::<Vec<_>>();
    let command = Command::BecomeLeader(BecomeLeader {
        controller_id: ControllerId(config.controller_id),
        cluster_id,
        controllers,
    });
    while let Err(error) = controller.propose(command.clone()).await {
        tracing::debug!(%error, term, "cannot take over yet");
        tokio::time::sleep(TAKE_OVER_RETRY).await;
    }
    if controller.feed().is_held_back() {
        begin_after_restore(controller).await;
    }
    let image = controller.image();
    controller.liveness().reset(&image, Instant::now());
    set_role(controller, Role::Leader);
    tracing::info!(term, cluster_id = image.cluster_id, "leads the controllers");
    tokio::join!(watch_sessions(controller), rebalancer::run(controller));
}

/// The state was restored from a backup: what is given out from now on must be above all that was given
/// out since the backup. The time in microseconds is: nothing counts a million times a second.
async fn begin_after_restore(controller: &Controller) {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    let micros = since_epoch.unwrap_or_default().as_micros();
    let command = Command::BeginAfterRestore {
        floor: u64::try_from(micros).unwrap_or(0),
    };
    while let Err(error) = controller.propose(command.clone()).await {
        tracing::debug!(%error, "cannot begin after the restore yet");
        tokio::time::sleep(TAKE_OVER_RETRY).await;
    }
    let image = controller.image();
    tracing::warn!(
        revision = image.revision,
        restores = ?image.restores,
        "the controllers begin anew with the state of a backup"
    );
}

/// Ends sessions whose time is over, for ever.
async fn watch_sessions(controller: &Controller) {
    loop {
        let check = controller.liveness().next_check(Instant::now());
        tokio::time::sleep_until(check.into()).await;
        let expired = controller.liveness().expire(Instant::now());
        if !expired.is_empty() {
            end_sessions(controller, expired).await;
        }
    }
}

async fn end_sessions(controller: &Controller, expired: Expired) {
    for session in &expired.brokers {
        let (broker_id, broker_epoch) = (session.broker_id.0, session.broker_epoch.0);
        tracing::warn!(
            broker_id,
            broker_epoch,
            "broker missed its heartbeats: fenced"
        );
    }
    for session in &expired.gateways {
        tracing::warn!(
            gateway_id = session.gateway_id,
            "gateway missed its heartbeats: removed"
        );
    }
    let mut result = Ok(());
    if !expired.brokers.is_empty() {
        let command = Command::FenceBrokers {
            brokers: expired.brokers.clone(),
        };
        result = controller.propose(command).await.map(|_| ());
    }
    if result.is_ok() && !expired.gateways.is_empty() {
        let command = Command::RemoveGateways {
            gateways: expired.gateways.clone(),
        };
        result = controller.propose(command).await.map(|_| ());
    }
    if let Err(error) = result {
        tracing::warn!(%error, "sessions could not be ended yet");
        controller
            .liveness()
            .restore(expired, Instant::now() + RETRY);
    }
}

fn set_role(controller: &Controller, role: Role) {
    controller
        .role()
        .send_if_modified(|known| std::mem::replace(known, role) != role);
}
