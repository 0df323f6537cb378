//! The life of the logs of this broker's replicas: retention where it leads, and everywhere sealing,
//! purging and compaction, which every replica does by itself.
//!
//! Invariant: nothing is deleted but below a log start offset that the partition's replicas have
//! agreed on, or by compaction, of committed entries that Raft has forgotten. A group with nothing to
//! do is only looked at: its Raft is not woken.

mod compact;
mod rules;

use std::collections::{HashSet, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use chronik_types::id::RaftGroupId;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::blocking::Background;
use crate::metrics::BrokerMetrics;
use crate::replica::state_machine::now_ms;
use crate::replica::{LogStartError, Replica};
use crate::replicas::Replicas;

/// How long a new log start may wait for its majority.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Replicas that are looked after at the same time.
const PARALLEL_MAX: usize = 16;

/// What the worker works with.
pub struct LogLifeOptions {
    pub replicas: Replicas,
    /// Groups that want to be looked after now.
    pub wanted: mpsc::UnboundedReceiver<RaftGroupId>,
    /// How often all replicas are looked at.
    pub check_interval: Duration,
    pub compaction: CompactionLimits,
    /// What reads and writes for compaction.
    pub background: Background,
    pub metrics: BrokerMetrics,
    pub stop: CancellationToken,
}

/// What compaction may take of the machine.
#[derive(Debug, Clone, Copy)]
pub struct CompactionLimits {
    /// Read and written; None: no limit.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Memory for the keys of one run.
    pub map_max_bytes: usize,
}

struct Shared {
    replicas: Replicas,
    limits: CompactionLimits,
    background: Background,
    metrics: BrokerMetrics,
    stop: CancellationToken,
}

/// Runs until the token is cancelled.
pub async fn run_log_life(options: LogLifeOptions) {
    let LogLifeOptions {
        replicas,
        mut wanted,
        check_interval,
        compaction,
        background,
        metrics,
        stop,
    } = options;
    let shared = Arc::new(Shared {
        replicas,
        limits: compaction,
        background,
        metrics,
        stop: stop.clone(),
    });
    let mut ticks = interval(check_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick is at once, and nothing is open then.
    ticks.tick().await;
    let mut upkeep = Tasks::new(PARALLEL_MAX);
    // One at a time: it is the background's background.
    let mut compactions = Tasks::new(1);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ticks.tick() => {
                for (group, _) in shared.replicas.all() {
                    upkeep.add(group);
                }
            }
            group = wanted.recv() => match group {
                Some(group) => upkeep.add(group),
                None => break,
            },
            Some(ended) = upkeep.running.join_next() => {
                let (group, is_dirty) = upkeep.ended(ended);
                if is_dirty {
                    compactions.add(group);
                }
            }
            Some(ended) = compactions.running.join_next() => {
                compactions.ended(ended);
            }
        }
        upkeep.start(&shared, |shared, replica| async move {
            look_after(&shared, &replica).await
        });
        compactions.start(&shared, |shared, replica| async move {
            compact::run(&shared, &replica).await;
            false
        });
    }
    upkeep.running.shutdown().await;
    compactions.running.shutdown().await;
}

/// Groups that wait for their turn and those that have it.
struct Tasks {
    parallel_max: usize,
    waiting: VecDeque<RaftGroupId>,
    queued: HashSet<RaftGroupId>,
    busy: HashSet<RaftGroupId>,
    running: JoinSet<(RaftGroupId, bool)>,
}

impl Tasks {
    fn new(parallel_max: usize) -> Tasks {
        Tasks {
            parallel_max,
            waiting: VecDeque::new(),
            queued: HashSet::new(),
            busy: HashSet::new(),
            running: JoinSet::new(),
        }
    }

    fn add(&mut self, group: RaftGroupId) {
        if self.queued.insert(group) {
            self.waiting.push_back(group);
        }
    }

    fn ended(&mut self, ended: Result<(RaftGroupId, bool), JoinError>) -> (RaftGroupId, bool) {
        match ended {
            Ok((group, outcome)) => {
                self.busy.remove(&group);
                (group, outcome)
            }
            // Nobody aborts them: it panicked.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Starts `work` on those whose turn it is; a group that is being worked on waits for that.
    fn start<F: Future<Output = bool> + Send + 'static>(
        &mut self,
        shared: &Arc<Shared>,
        work: impl Fn(Arc<Shared>, Arc<Replica>) -> F,
    ) {
        let mut later = Vec::new();
        while self.running.len() < self.parallel_max
            && let Some(group) = self.waiting.pop_front()
        {
            if self.busy.contains(&group) {
                later.push(group);
                continue;
            }
            self.queued.remove(&group);
            if let Some(replica) = shared.replicas.get(group) {
                self.busy.insert(group);
                let work = work(shared.clone(), replica);
                self.running.spawn(async move { (group, work.await) });
            }
        }
        self.waiting.extend(later);
    }
}

/// Does for one replica what is due. True: its log is to be compacted.
async fn look_after(shared: &Shared, replica: &Arc<Replica>) -> bool {
    replica.upkeep_begins();
    let config = replica.log_config();
    let log = replica.log();
    log.set_segment_bytes(config.segment_bytes);
    if rules::is_roll_due(&log.segments(), &config, now_ms()) {
        let rolling = log.clone();
        match tokio::task::spawn_blocking(move || rolling.roll()).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(error)) => {
                let raft_group_id = replica.group_id();
                warn!(%raft_group_id, %error, "a segment cannot be sealed; tried again");
            }
        }
    }
    retain(shared, replica).await;
    let need = rules::purge_need(&log.segments(), &config, log.log_start_offset());
    let need = need.max(replica.purge_target());
    let purged = match need {
        Some(index) if config.compacts => replica.purge_awake(index).await,
        Some(index) => replica.purge(index).await,
        None => Ok(()),
    };
    if let Err(error) = purged {
        let raft_group_id = replica.group_id();
        debug!(%raft_group_id, %error, "the log is not purged; tried again");
    }
    config.compacts && compact::is_due(replica, &config)
}

/// Deletes by age and size, where this replica leads.
async fn retain(shared: &Shared, replica: &Arc<Replica>) {
    if !replica.leadership().borrow().ready {
        return;
    }
    let target = rules::retention_target(
        &replica.log().segments(),
        &replica.log_config(),
        now_ms(),
        replica.log_start_offset(),
        replica.high_watermark(),
    );
    let Some(target) = target else { return };
    let raft_group_id = replica.group_id();
    let deadline = Instant::now() + PROPOSE_TIMEOUT;
    match replica.raise_log_start(Some(target), deadline).await {
        Ok(log_start_offset) => {
            shared.metrics.retention_runs.inc();
            info!(%raft_group_id, %log_start_offset, "old records are deleted by retention");
        }
        // Another leader looks after it, or the next round here does.
        Err(error @ (LogStartError::NotProposed(_) | LogStartError::OutOfRange { .. })) => {
            debug!(%raft_group_id, %error, "retention is put off");
        }
    }
}
