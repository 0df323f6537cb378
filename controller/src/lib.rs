//! Chronik's controller: cluster metadata in one Raft group, served to brokers and gateways over
//! gRPC and to operators over REST.
//!
//! Invariant: every change of the metadata is a command that a majority of controllers holds on
//! disk before anybody sees its effect.

pub mod config;

pub mod command;
pub mod state;

pub mod apply;
pub mod liveness;
pub mod moves;
pub mod placement;
pub mod rebalance;

pub mod backup;
pub mod db;
pub mod founding;
pub mod image_feed;
pub mod joining;
pub mod raft;

pub mod controller;
pub mod leader;
mod peers;
pub mod rebalancer;

pub mod admin;
pub mod metrics;
pub mod rest;
pub mod rpc;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, anyhow};
use chronik_telemetry::http::Health;
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::config::Config;
use crate::controller::{Controller, Role};
use crate::db::Db;
use crate::joining::Joining;
use crate::metrics::Metrics;
use crate::peers::Peers;

/// How long open requests may take when the process stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);

/// Bound sockets, so that a test can choose free ports for a group before it starts any of it.
#[derive(Debug)]
pub struct Listeners {
    pub rpc: TcpListener,
    pub rest: TcpListener,
}

impl Listeners {
    pub async fn bind(config: &Config) -> io::Result<Self> {
        Ok(Self {
            rpc: TcpListener::bind(config.rpc_listen).await?,
            rest: TcpListener::bind(config.rest_listen).await?,
        })
    }
}

/// A controller that runs in this process.
pub struct Running {
    pub rpc_address: SocketAddr,
    pub rest_address: SocketAddr,
    controller: Controller,
    stop: CancellationToken,
    tasks: Vec<(&'static str, JoinHandle<anyhow::Result<()>>)>,
    db_worker: JoinHandle<()>,
}

/// Binds the configured ports and starts everything.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    let listeners = Listeners::bind(&config).await.with_context(|| {
        format!(
            "cannot listen on {} and {}",
            config.rpc_listen, config.rest_listen
        )
    })?;
    start_on(config, listeners).await
}

/// Starts a controller on bound sockets. Boxed, so that all of it is compiled with this crate, not with
/// its callers.
pub fn start_on(
    config: Config,
    listeners: Listeners,
) -> BoxFuture<'static, anyhow::Result<Running>> {
    Box::pin(start_parts(config, listeners))
}

async fn start_parts(mut config: Config, listeners: Listeners) -> anyhow::Result<Running> {
    config.rpc_listen = listeners.rpc.local_addr()?;
    config.rest_listen = listeners.rest.local_addr()?;
    config.validate().map_err(|why| anyhow!(why))?;
    let stop = CancellationToken::new();

    // 1. What this node knows.
    let (db, contents, db_worker) = Db::open(&config.data_dir).await?;
    backup::remove_leftovers(&config.data_dir);
    if let Some(state) = &contents.state
        && !config.cluster_id.is_empty()
        && !state.cluster_id.is_empty()
        && state.cluster_id != config.cluster_id
    {
        let (own, configured) = (&state.cluster_id, &config.cluster_id);
        return Err(anyhow!(
            "the data belongs to cluster {own}, cluster-id is {configured}"
        ));
    }

    // 2. Raft, and the state it rebuilds. It takes part at once if it has done so before.
    let group = config.group();
    let raft_peers = Peers::new(&group, config.controller_id)?;
    let (joining, feed) = Joining::prepare(&config, raft_peers, db, contents).await?;
    let node = joining.node().clone();

    // 3. Services. Forwarded requests have connections of their own, beside Raft's.
    let (metrics, registry) = Metrics::new();
    let health = Health::new();
    let peers = Peers::new(&group, config.controller_id)?;
    let controller = Controller::new(config.clone(), node.clone(), feed, peers, metrics);
    let (rpc_address, rest_address) = (config.rpc_listen, config.rest_listen);
    let rest = rest::router(controller.clone(), registry, health.clone());

    let mut tasks = Tasks {
        stop: stop.clone(),
        tasks: Vec::new(),
    };
    let rpc = rpc::serve(listeners.rpc, controller.clone(), node.rpc(), stop.clone());
    tasks.spawn("rpc", async move { Ok(rpc.await?) });
    let rest_stop = stop.clone().cancelled_owned();
    let rest = axum::serve(listeners.rest, rest).with_graceful_shutdown(rest_stop);
    tasks.spawn("rest", async move { Ok(rest.await?) });
    let leader = leader::run(controller.clone(), stop.clone());
    tasks.spawn("leader", async move {
        leader.await;
        Ok(())
    });
    tasks.spawn(
        "readiness",
        watch_readiness(controller.clone(), joining.obstacle(), health, stop.clone()),
    );
    let raft_stop = stop.clone();
    tasks.spawn("raft", async move {
        tokio::select! {
            why = node.failed() => Err(anyhow!("raft failed: {why}")),
            () = raft_stop.cancelled() => Ok(()),
        }
    });

    // 4. The way into the group, which other controllers may have to be there for.
    let joining_stop = stop.clone();
    tasks.spawn("joining", async move {
        tokio::select! {
            joined = joining.run() => {
                joined?;
                joining_stop.cancelled().await;
                Ok(())
            }
            () = joining_stop.cancelled() => Ok(()),
        }
    });
    info!(%rpc_address, %rest_address, "controller started");
    Ok(Running {
        rpc_address,
        rest_address,
        controller,
        stop,
        tasks: tasks.tasks,
        db_worker,
    })
}

impl Running {
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Runs until `stop`, or until a part of it fails.
    pub async fn run_until(self, stop: CancellationToken) -> anyhow::Result<()> {
        let own_stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = own_stop.cancelled() => {}
        }
        self.stop().await
    }

    /// Hands leadership over, finishes open requests, closes the database. Returns what had
    /// failed, if anything.
    pub async fn stop(self) -> anyhow::Result<()> {
        let Self {
            controller,
            stop,
            tasks,
            db_worker,
            ..
        } = self;
        if !stop.is_cancelled() {
            controller.node().hand_over().await;
        }
        stop.cancel();
        let mut outcome = Ok(());
        for (name, mut task) in tasks {
            match tokio::time::timeout(DRAIN_TIMEOUT, &mut task).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => outcome = Err(error),
                Ok(Err(error)) => outcome = Err(anyhow!("{name}: {error}")),
                Err(_) => {
                    tracing::warn!(task = name, "did not end in time");
                    task.abort();
                }
            }
        }
        controller.node().shut_down().await;
        drop(controller);
        if tokio::time::timeout(DRAIN_TIMEOUT, db_worker)
            .await
            .is_err()
        {
            tracing::warn!("the database was still in use when the process stopped");
        }
        outcome
    }

    /// Stops as a killed process does: nothing is handed over or finished. For tests.
    pub async fn kill(self) {
        let Self {
            controller,
            stop,
            tasks,
            db_worker,
            ..
        } = self;
        stop.cancel();
        for (_, task) in tasks {
            task.abort();
            let _ = task.await;
        }
        controller.node().shut_down().await;
        drop(controller);
        // The folder's lock must be free for whoever starts next.
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, db_worker).await;
    }
}

struct Tasks {
    stop: CancellationToken,
    tasks: Vec<(&'static str, JoinHandle<anyhow::Result<()>>)>,
}

impl Tasks {
    /// A task that ends before the process is asked to stop takes the process with it.
    fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let stop = self.stop.clone();
        let task = tokio::spawn(async move {
            let result = task.await;
            if !stop.is_cancelled() {
                if let Err(error) = &result {
                    tracing::error!(task = name, error = format!("{error:#}"), "a task failed");
                }
                stop.cancel();
            }
            result
        });
        self.tasks.push((name, task));
    }
}

/// Ready: it is a full member of the group and a leader is known, so that reads are current, writes
/// find their way, and another controller may be stopped.
async fn watch_readiness(
    controller: Controller,
    mut obstacle: watch::Receiver<Option<String>>,
    health: Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut roles = controller.role().subscribe();
    loop {
        let role = *roles.borrow_and_update();
        match &*obstacle.borrow_and_update() {
            Some(why) => health.set_ready(false, why),
            None => health.set_ready(role != Role::Waiting, "the controllers have no leader"),
        }
        tokio::select! {
            changed = roles.changed() => if changed.is_err() { return Ok(()) },
            Ok(()) = obstacle.changed() => {}
            () = stop.cancelled() => return Ok(()),
        }
    }
}
