//! Bounds the bytes of the log; Raft itself bounds its entries, and one command may have megabytes.

use std::time::Duration;

use openraft::type_config::async_runtime::WatchReceiver;
use tokio::sync::watch;

use super::log_store::Growth;
use super::node::{ControllersRaft, Leadership};

/// Longest wait for a snapshot, which is made in memory.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two removals.
const INTERVAL: Duration = Duration::from_millis(500);

/// Removes the log when it holds more than `bytes_max`, once its entries are in a snapshot. Ends when
/// Raft's core ends.
pub async fn bound_log(
    raft: ControllersRaft,
    growth: Growth,
    bytes_max: u64,
    mut leadership: watch::Receiver<Leadership>,
) {
    let ended = async { while leadership.changed().await.is_ok() {} };
    let bound = async {
        loop {
            growth.exceeds(bytes_max).await;
            remove_log(&raft).await;
            tokio::time::sleep(INTERVAL).await;
        }
    };
    tokio::select! {
        () = ended => {}
        () = bound => {}
    }
}

async fn remove_log(raft: &ControllersRaft) {
    let Some(applied) = raft.metrics().borrow_watched().last_applied else {
        return;
    };
    // What fails here is tried again; that Raft has stopped is told by others.
    if raft.trigger().snapshot().await.is_err() {
        return;
    }
    let has_snapshot = raft
        .wait(Some(SNAPSHOT_TIMEOUT))
        .metrics(
            |metrics| metrics.snapshot >= Some(applied),
            "a snapshot of the log",
        )
        .await;
    if has_snapshot.is_ok() {
        // It comes to that in its own time: a peer that still needs the entries holds it up.
        let _ = raft.trigger().purge_log(applied.index).await;
    }
}
