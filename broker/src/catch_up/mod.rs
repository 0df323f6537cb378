//! Files of logs that come from other brokers. Replicas here that are so far behind, or so new, that
//! their leader's log begins after their own ends get the leader's segment files in bulk, and Raft goes
//! on from there. Replicas whose files are damaged get those anew.
//!
//! Invariant: nothing of a replica changes before its copy is complete and every byte of it checked;
//! what is broken off leaves the replica as it was. Where a source failed, the leader changed or this
//! broker was started anew, the next attempt goes on with what has come. What all copies of this broker
//! take together is held to the configured rate.

mod failures;
mod fetch;
mod progress;
mod rebuild;
mod source;
mod unfinished;

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use chronik_storage::Storage;
use chronik_types::id::RaftGroupId;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::failures::Failures;
use crate::blocking::Background;
use crate::controller_client::ClusterView;
use crate::metrics::BrokerMetrics;
use crate::peers::Behind;
use crate::replicas::Replicas;
use crate::throttle::Throttle;

pub use fetch::FetchError;
pub use progress::Copies;

/// Pauses after a copy that failed; the leader keeps asking meanwhile.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(500);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(30);
/// Pauses after a rebuild that failed.
const REBUILD_DELAY_MAX: Duration = Duration::from_secs(60);

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
    /// What writes and checks that which comes.
    pub background: Background,
    /// Where the copies under way are listed.
    pub copies: Copies,
    pub metrics: BrokerMetrics,
    pub stop: CancellationToken,
}

/// What has come to its end.
enum Ended {
    Copy(RaftGroupId, Result<(), FetchError>),
    /// Whether there was anything to rebuild.
    Rebuild(RaftGroupId, Result<bool, FetchError>),
}

struct Worker {
    shared: Arc<fetch::Shared>,
    parallel_max: usize,
    /// Copies under way, with the latest word of the groups' leaders.
    running: HashMap<RaftGroupId, watch::Sender<Behind>>,
    failures: Failures,
    /// Rebuilds under way.
    rebuilding: HashSet<RaftGroupId>,
    rebuild_failures: Failures,
    /// When a rebuild that failed is to be tried again.
    rebuild_at: Option<Instant>,
    tasks: JoinSet<Ended>,
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
        background,
        copies,
        metrics,
        stop,
    } = options;
    let mut damage = storage.damage_changes();
    let unfinished = unfinished::Unfinished::new(&storage, Instant::now());
    let mut worker = Worker {
        shared: Arc::new(fetch::Shared {
            storage,
            replicas,
            throttle: Throttle::new(bytes_per_second, view.clone()),
            view,
            background,
            unfinished,
            copies,
            metrics,
        }),
        parallel_max,
        running: HashMap::new(),
        failures: Failures::new(RETRY_DELAY_MIN, RETRY_DELAY_MAX),
        rebuilding: HashSet::new(),
        rebuild_failures: Failures::new(RETRY_DELAY_MIN, REBUILD_DELAY_MAX),
        rebuild_at: None,
        tasks: JoinSet::new(),
    };
    loop {
        let wake_at = worker.wake_at();
        tokio::select! {
            () = stop.cancelled() => return worker.tasks.shutdown().await,
            asked = behind.recv() => match asked {
                Some(asked) => worker.asked(asked),
                None => return worker.tasks.shutdown().await,
            },
            () = damage.changed() => worker.start_rebuilds(),
            () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {
                worker.let_unfinished_go();
                worker.start_rebuilds();
            }
            Some(ended) = worker.tasks.join_next() => match ended {
                Ok(ended) => worker.ended(ended),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
        }
    }
}

impl Worker {
    fn is_busy(&self) -> bool {
        self.running.len() + self.rebuilding.len() >= self.parallel_max
    }

    fn wake_at(&self) -> Option<Instant> {
        let unfinished = self.shared.unfinished.expires_at();
        self.rebuild_at.into_iter().chain(unfinished).min()
    }

    fn let_unfinished_go(&self) {
        let expired = self.shared.unfinished.take_expired(Instant::now());
        if !expired.is_empty() {
            let storage = self.shared.storage.clone();
            let remove = move || expired.into_iter().for_each(|copy| copy.remove(&storage));
            tokio::task::spawn_blocking(remove);
        }
    }

    fn asked(&mut self, behind: Behind) {
        let group = behind.group;
        let now = Instant::now();
        self.shared.unfinished.renew(group, now);
        if let Some(running) = self.running.get(&group) {
            running.send_replace(behind);
            return;
        }
        let fails = self.failures.not_before(group, now).is_some();
        let waits = fails || self.rebuilding.contains(&group);
        // Leaders ask again within a second.
        if waits || self.is_busy() {
            return;
        }
        let (sender, receiver) = watch::channel(behind);
        self.running.insert(group, sender);
        let shared = self.shared.clone();
        self.tasks
            .spawn(async move { Ended::Copy(group, fetch::run(shared, receiver).await) });
    }

    /// Looks at all logs that are damaged now. What finds no room is looked at when one is done.
    fn start_rebuilds(&mut self) {
        let damaged = self.shared.storage.damaged();
        let count = i64::try_from(damaged.len()).unwrap_or(i64::MAX);
        self.shared.metrics.logs_damaged.set(count);
        self.rebuild_at = None;
        let now = Instant::now();
        for group in damaged.into_iter().map(|damage| damage.group) {
            if self.running.contains_key(&group) || self.rebuilding.contains(&group) {
                continue;
            }
            if let Some(at) = self.rebuild_failures.not_before(group, now) {
                self.rebuild_at = Some(self.rebuild_at.map_or(at, |other| other.min(at)));
                continue;
            }
            if self.is_busy() {
                continue;
            }
            self.rebuilding.insert(group);
            let shared = self.shared.clone();
            self.tasks
                .spawn(async move { Ended::Rebuild(group, rebuild::run(shared, group).await) });
        }
    }

    fn ended(&mut self, ended: Ended) {
        match ended {
            Ended::Copy(group, result) => self.copy_ended(group, result),
            Ended::Rebuild(group, result) => self.rebuild_ended(group, result),
        }
        self.start_rebuilds();
    }

    fn copy_ended(&mut self, group: RaftGroupId, result: Result<(), FetchError>) {
        self.running.remove(&group);
        let Err(error) = result else {
            self.shared.metrics.copies_installed.inc();
            self.failures.forget(group);
            return;
        };
        self.shared.metrics.copies_failed.inc();
        let delay = self.failures.failed(group, Instant::now());
        let error = &error as &dyn std::error::Error;
        if delay < RETRY_DELAY_MAX {
            info!(raft_group_id = %group, error, "a copy of a log was broken off; tried again");
        } else {
            warn!(raft_group_id = %group, error, "a copy of a log keeps failing; tried again");
        }
    }

    fn rebuild_ended(&mut self, group: RaftGroupId, result: Result<bool, FetchError>) {
        self.rebuilding.remove(&group);
        let error = match result {
            Ok(is_rebuilt) => {
                self.shared.metrics.rebuilds.inc_by(u64::from(is_rebuilt));
                self.rebuild_failures.forget(group);
                return;
            }
            Err(error) => error,
        };
        self.shared.metrics.rebuilds_failed.inc();
        let retry_in = self.rebuild_failures.failed(group, Instant::now());
        let retry_in_s = retry_in.as_secs_f64();
        let error = &error as &dyn std::error::Error;
        warn!(
            raft_group_id = %group,
            error,
            retry_in_s,
            "a damaged log stays damaged for now: it cannot be rebuilt from another replica"
        );
    }
}
