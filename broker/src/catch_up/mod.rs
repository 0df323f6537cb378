//! Replicas here that are so far behind, or so new, that their leader's log begins after their own
//! ends: they get the leader's segment files in bulk, and Raft goes on from there.
//!
//! Invariant: nothing of a replica changes before its copy is complete and every byte of it checked;
//! what is broken off leaves the replica as it was. What all copies of this broker take together is
//! held to the configured rate.

mod fetch;
mod source;
mod throttle;

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use chronik_storage::Storage;
use chronik_types::id::RaftGroupId;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::controller_client::ClusterView;
use crate::metrics::BrokerMetrics;
use crate::peers::Behind;
use crate::replicas::Replicas;

pub use fetch::FetchError;

/// Pauses after a copy that failed; the leader keeps asking meanwhile.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(500);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(30);

/// What the worker works with.
pub struct CatchUpOptions {
    pub storage: Storage,
    pub replicas: Replicas,
    pub view: watch::Receiver<ClusterView>,
    pub behind: mpsc::Receiver<Behind>,
    /// What all copies take together; None: no limit.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Copies at the same time.
    pub parallel_max: usize,
    pub metrics: BrokerMetrics,
    pub stop: CancellationToken,
}

/// A group whose copies failed.
struct Failure {
    delay: Duration,
    not_before: Instant,
}

struct Worker {
    shared: Arc<fetch::Shared>,
    parallel_max: usize,
    /// Copies under way, with the latest word of the groups' leaders.
    running: HashMap<RaftGroupId, watch::Sender<Behind>>,
    failures: HashMap<RaftGroupId, Failure>,
    tasks: JoinSet<(RaftGroupId, Result<(), FetchError>)>,
}

/// Runs until the token is cancelled.
pub async fn run_catch_up(options: CatchUpOptions) {
    let CatchUpOptions {
        storage,
        replicas,
        view,
        mut behind,
        bytes_per_second,
        parallel_max,
        metrics,
        stop,
    } = options;
    let mut worker = Worker {
        shared: Arc::new(fetch::Shared {
            storage,
            replicas,
            view,
            throttle: throttle::Throttle::new(bytes_per_second),
            metrics,
        }),
        parallel_max,
        running: HashMap::new(),
        failures: HashMap::new(),
        tasks: JoinSet::new(),
    };
    loop {
        tokio::select! {
            () = stop.cancelled() => return worker.tasks.shutdown().await,
            asked = behind.recv() => match asked {
                Some(asked) => worker.asked(asked),
                None => return worker.tasks.shutdown().await,
            },
            Some(ended) = worker.tasks.join_next() => match ended {
                Ok((group, result)) => worker.ended(group, result),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
        }
    }
}

impl Worker {
    fn asked(&mut self, behind: Behind) {
        let group = behind.group;
        if let Some(running) = self.running.get(&group) {
            running.send_replace(behind);
            return;
        }
        let waits = self
            .failures
            .get(&group)
            .is_some_and(|failure| Instant::now() < failure.not_before);
        // Leaders ask again within a second.
        if waits || self.running.len() >= self.parallel_max {
            return;
        }
        let (sender, receiver) = watch::channel(behind);
        self.running.insert(group, sender);
        let shared = self.shared.clone();
        self.tasks
            .spawn(async move { (group, fetch::run(shared, receiver).await) });
    }

    fn ended(&mut self, group: RaftGroupId, result: Result<(), FetchError>) {
        self.running.remove(&group);
        let Err(error) = result else {
            self.shared.metrics.copies_installed.inc();
            self.failures.remove(&group);
            return;
        };
        self.shared.metrics.copies_failed.inc();
        let delay = match self.failures.get(&group) {
            Some(failure) => failure.delay.saturating_mul(2).min(RETRY_DELAY_MAX),
            None => RETRY_DELAY_MIN,
        };
        let error = &error as &dyn std::error::Error;
        if delay < RETRY_DELAY_MAX {
            info!(raft_group_id = %group, error, "a copy of a log was broken off; tried again");
        } else {
            warn!(raft_group_id = %group, error, "a copy of a log keeps failing; tried again");
        }
        let not_before = Instant::now() + delay;
        self.failures.insert(group, Failure { delay, not_before });
        // Groups that are gone from here do not ask again.
        self.failures
            .retain(|_, failure| failure.not_before + RETRY_DELAY_MAX * 4 > Instant::now());
    }
}
