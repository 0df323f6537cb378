//! Closes the Raft of replicas that nobody uses, leaders and followers: one at rest needs little more memory
//! than its place in the directory, and opens again in milliseconds when a message or a client comes.
//! Sees to it, too, that no leader rests while a follower that can be reached lacks something.
//!
//! Invariant: costs one look at each replica per pass, and nothing per replica between passes. What
//! may be closed is the replica's own decision.

mod behind;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chronik_types::id::RaftGroupId;
use futures::StreamExt;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::behind::Behind;
use crate::metrics::BrokerMetrics;
use crate::peers::Peers;
use crate::replica::Replica;
use crate::replica::engine::EngineStatus;
use crate::replicas::Replicas;

/// Instances closed at the same time.
const PARALLEL_MAX: usize = 16;
/// Bounds of the time between two passes.
const PASS_INTERVAL_MIN: Duration = Duration::from_millis(20);
const PASS_INTERVAL_MAX: Duration = Duration::from_secs(2);

/// When a replica's Raft is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestTiming {
    /// Nobody has used it for this long.
    pub idle: Duration,
    /// Where more are open than this, those longest unused need only this much.
    pub open_max: usize,
    pub crowded_idle: Duration,
}

impl RestTiming {
    /// Nobody's is.
    pub const NEVER: RestTiming = RestTiming {
        idle: Duration::MAX,
        open_max: usize::MAX,
        crowded_idle: Duration::MAX,
    };

    pub fn new(idle: Duration, open_max: usize) -> Self {
        Self {
            idle,
            open_max,
            crowded_idle: idle.min(Duration::from_secs(2)),
        }
    }
}

/// Runs until `stop`.
pub async fn run(
    replicas: Replicas,
    peers: Peers,
    timing: RestTiming,
    metrics: BrokerMetrics,
    stop: CancellationToken,
) {
    let period = (timing.idle / 4).clamp(PASS_INTERVAL_MIN, PASS_INTERVAL_MAX);
    let mut passes = interval_at(Instant::now() + period, period);
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let links = peers.links();
    let mut behind = Behind::new(peers, stop.clone());
    let mut away_before = BTreeSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = passes.tick() => {}
        }
        let all = replicas.all();
        let (open, failed) = count(&all);
        metrics.replicas_open.set(open);
        metrics.replicas_failed.set(failed);
        let table = links.borrow().clone();
        behind.look(&all, &table);
        // Only who is away for longer is not waited for.
        let away_now = table.away();
        let away = Arc::new(away_now.intersection(&away_before).copied().collect());
        away_before = away_now;
        let due = due(all, &timing);
        let closed = futures::stream::iter(due)
            .map(|(replica, idle)| {
                let away = &away;
                async move {
                    if let Err(error) = replica.purge_before_rest(idle).await {
                        let raft_group_id = replica.group_id();
                        debug!(%raft_group_id, %error, "the log is not purged before a rest");
                    }
                    replica.engine().close_if_idle(idle, away).await
                }
            })
            .buffer_unordered(PARALLEL_MAX)
            .filter(|closed| std::future::ready(*closed))
            .count();
        let closed = tokio::select! {
            () = stop.cancelled() => return,
            closed = closed => closed,
        };
        if closed > 0 {
            debug!(closed, "replicas went to rest");
        }
    }
}

fn count(all: &[(RaftGroupId, Arc<Replica>)]) -> (i64, i64) {
    let (mut open, mut failed) = (0i64, 0i64);
    for (_, replica) in all {
        match replica.engine().status() {
            EngineStatus::Open => open = open.saturating_add(1),
            EngineStatus::Failed => failed = failed.saturating_add(1),
            EngineStatus::AtRest | EngineStatus::Closed => {}
        }
    }
    (open, failed)
}

/// Replicas to close now, and how long each must have been idle when it comes to that.
fn due(
    all: Vec<(RaftGroupId, Arc<Replica>)>,
    timing: &RestTiming,
) -> Vec<(Arc<Replica>, Duration)> {
    let mut open: Vec<(Duration, Arc<Replica>)> = all
        .into_iter()
        .filter(|(_, replica)| replica.engine().status() == EngineStatus::Open)
        .map(|(_, replica)| (replica.engine().idle_for(), replica))
        .collect();
    let excess = open.len().saturating_sub(timing.open_max);
    if excess > 0 {
        open.sort_unstable_by_key(|(idle, _)| std::cmp::Reverse(*idle));
    }
    let mut due = Vec::new();
    for (place, (idle, replica)) in open.into_iter().enumerate() {
        let needed = match place < excess {
            true => timing.crowded_idle,
            false => timing.idle,
        };
        if idle >= needed {
            due.push((replica, needed));
        }
    }
    due
}
