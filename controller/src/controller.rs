//! What the services share: the Raft node, the image, the sessions, and the way to the leader.
//!
//! Invariant: a write is decided by the leader only, and only after the leader has applied its own
//! first command, so that it decides on everything that was committed before.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chronik_types::cluster_image::ClusterImage;
use tokio::sync::watch;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::command::{Command, Outcome};
use crate::config::Config;
use crate::image_feed::ImageFeed;
use crate::liveness::Liveness;
use crate::metrics::Metrics;
use crate::moves::Moves;
use crate::peers::Peers;
use crate::raft::{ProposeError, RaftNode};
use crate::rpc::error;

/// Set on a request that a follower passed on: it goes no further.
const FORWARDED: &str = "chronik-forwarded";
/// The leader's revision after the write, on the answer.
const REVISION: &str = "chronik-revision";

/// Who decides writes, as this controller sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// No leader known, or this one has not taken over yet.
    Waiting,
    /// This controller.
    Leader,
    Follower {
        leader: u64,
    },
}

/// Shared by all services of the process.
#[derive(Clone)]
pub struct Controller {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    node: RaftNode,
    feed: ImageFeed,
    peers: Peers,
    liveness: Mutex<Liveness>,
    moves: Mutex<Moves>,
    role: watch::Sender<Role>,
    metrics: Metrics,
}

/// Where a request is decided.
pub enum Route {
    Local,
    Remote(Remote),
}

/// The leader, seen from a follower.
pub struct Remote {
    channel: Channel,
    timeout: Duration,
}

impl Controller {
    pub fn new(
        config: Config,
        node: RaftNode,
        feed: ImageFeed,
        peers: Peers,
        metrics: Metrics,
    ) -> Self {
        let liveness = Mutex::new(Liveness::new(config.session_timeout()));
        let role = watch::Sender::new(Role::Waiting);
        let inner = Inner {
            config,
            node,
            feed,
            peers,
            liveness,
            moves: Mutex::default(),
            role,
            metrics,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    pub fn node(&self) -> &RaftNode {
        &self.inner.node
    }

    pub fn feed(&self) -> &ImageFeed {
        &self.inner.feed
    }

    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    pub fn image(&self) -> Arc<ClusterImage> {
        self.inner.feed.image()
    }

    pub fn role(&self) -> &watch::Sender<Role> {
        &self.inner.role
    }

    pub fn liveness(&self) -> MutexGuard<'_, Liveness> {
        self.inner
            .liveness
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn moves(&self) -> MutexGuard<'_, Moves> {
        self.inner
            .moves
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a command applied; only for the leader.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        let result = self.inner.node.propose(&command).await;
        self.inner.metrics.proposed(&result);
        result
    }

    /// Where `request` is decided. `extra` is the time that the request itself may take.
    pub async fn route<T>(&self, request: &Request<T>, extra: Duration) -> Result<Route, Status> {
        let forwarded = request.metadata().contains_key(FORWARDED);
        let mut roles = self.inner.role.subscribe();
        let wait = self.inner.config.leader_wait();
        let known = tokio::time::timeout(wait, roles.wait_for(|role| *role != Role::Waiting)).await;
        let role = match known {
            Ok(Ok(role)) => *role,
            _ => return Err(Status::unavailable("the controllers have no leader")),
        };
        match role {
            Role::Leader => Ok(Route::Local),
            Role::Follower { .. } if forwarded => Err(Status::unavailable(
                "this controller does not lead any more",
            )),
            Role::Follower { leader } => match self.inner.peers.channel(leader) {
                Some(channel) => {
                    let timeout = wait + self.inner.config.write_timeout() + extra;
                    Ok(Route::Remote(Remote { channel, timeout }))
                }
                None => Err(Status::unavailable(format!(
                    "no address of controller {leader}"
                ))),
            },
            Role::Waiting => Err(Status::unavailable("the controllers have no leader")),
        }
    }

    /// An answer that names the revision it is based on.
    pub fn respond<T>(&self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        let revision = MetadataValue::from(self.image().revision);
        response.metadata_mut().insert(REVISION, revision);
        response
    }

    /// Waits until this controller has applied what `response` is based on, so that who wrote
    /// through it also reads it here. Gives up after a while: reads are then merely old.
    pub async fn await_revision_of<T>(&self, response: &Response<T>) {
        let revision = response
            .metadata()
            .get(REVISION)
            .and_then(|value| value.to_str().ok());
        let Some(revision) = revision.and_then(|text| text.parse::<u64>().ok()) else {
            return;
        };
        let mut images = self.inner.feed.subscribe();
        let reached = images.wait_for(|image| image.revision >= revision);
        let _ = tokio::time::timeout(self.inner.config.leader_wait(), reached).await;
    }
}

impl Remote {
    /// Passes a request on to the leader. A request that may have reached it and brings no answer
    /// ends as DEADLINE_EXCEEDED: its outcome is unknown.
    pub async fn call<Req, Resp, F, Fut>(
        self,
        mut request: Request<Req>,
        call: F,
    ) -> Result<Response<Resp>, Status>
    where
        F: FnOnce(Channel, Request<Req>) -> Fut,
        Fut: Future<Output = Result<Response<Resp>, Status>>,
    {
        request
            .metadata_mut()
            .insert(FORWARDED, MetadataValue::from_static("1"));
        match tokio::time::timeout(self.timeout, call(self.channel, request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(status)) => Err(error::forwarded(status)),
            Err(_) => Err(error::unknown_outcome()),
        }
    }
}

/// The clock of sessions.
pub fn now() -> Instant {
    Instant::now()
}
