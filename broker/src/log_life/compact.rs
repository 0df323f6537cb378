//! When a compacted topic's log is compacted, and at which pace.
//!
//! Invariant: one compaction at a time in this process, on a thread of low priority; the
//! pace counts what is read and written.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chronik_storage::{CompactionRequest, CompactionSettings, StorageError};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{CompactionLimits, Shared};
use crate::replica::state_machine::now_ms;
use crate::replica::{LogConfig, Replica};

fn settings(config: &LogConfig) -> CompactionSettings {
    CompactionSettings {
        delete_retention_ms: config.delete_retention_ms,
        min_compaction_lag_ms: config.min_compaction_lag_ms,
        max_compaction_lag_ms: config.max_compaction_lag_ms,
        min_cleanable_dirty_ratio: config.min_cleanable_dirty_thousandths as f64 / 1000.0,
    }
}

/// Whether there is enough to compact.
pub fn is_due(replica: &Replica, config: &LogConfig) -> bool {
    let due = replica.log().compaction_due(&settings(config), now_ms());
    due.is_some()
}

/// Compacts what there is to compact.
pub async fn run(shared: &Arc<Shared>, replica: &Arc<Replica>) {
    let config = replica.log_config();
    // It may have been changed, or done, while this waited for its turn.
    if !config.compacts || !is_due(replica, &config) {
        return;
    }
    let raft_group_id = replica.group_id();
    let request = CompactionRequest {
        settings: settings(&config),
        now_ms: now_ms(),
        limit: replica.high_watermark(),
        active_producers: replica.active_producers().collect::<HashMap<_, _>>(),
        map_max_bytes: shared.limits.map_max_bytes,
    };
    let log = replica.log().clone();
    let (limits, stop, runtime) = (shared.limits, shared.stop.clone(), Handle::current());
    let began = Instant::now();
    let compact = move || log.compact(&request, &mut pace(limits, &stop, &runtime, began));
    match shared.background.run(compact).await {
        Some(Ok(report)) => {
            shared.metrics.compactions.inc();
            let removed = report.records_removed;
            let (before, after) = (report.segments_before, report.segments_after);
            let seconds = began.elapsed().as_secs_f64();
            info!(%raft_group_id, removed, before, after, seconds, "a log is compacted");
        }
        Some(Err(StorageError::Deleted(_))) => {
            debug!(%raft_group_id, "a log was deleted while it was compacted");
        }
        Some(Err(error)) => {
            warn!(%raft_group_id, %error, "a compaction was broken off; tried again");
        }
        None => debug!(%raft_group_id, "a compaction was cancelled"),
    }
}

/// Waits so long that the bytes since `began` keep to the rate; ends when the process stops. On a
/// thread for blocking work.
fn pace(
    limits: CompactionLimits,
    stop: &CancellationToken,
    runtime: &Handle,
    began: Instant,
) -> impl FnMut(u64) -> ControlFlow<()> {
    let mut total = 0u64;
    move |bytes| {
        total = total.saturating_add(bytes);
        let due = match limits.bytes_per_second {
            Some(rate) => Duration::from_secs_f64(total as f64 / rate.get() as f64),
            None => Duration::ZERO,
        };
        if stop.is_cancelled() {
            return ControlFlow::Break(());
        }
        let left = due.saturating_sub(began.elapsed());
        if left.is_zero() {
            return ControlFlow::Continue(());
        }
        // The timer is that of the runtime which is waited on, not of this thread.
        match runtime.block_on(async { timeout(left, stop.cancelled()).await }) {
            Ok(()) => ControlFlow::Break(()),
            Err(_elapsed) => ControlFlow::Continue(()),
        }
    }
}
