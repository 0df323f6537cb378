//! Work that waits for the disk or takes long, kept off the threads that run tasks.
//!
//! Invariant: a broker that runs on one thread answers its peers while it reads. Only where a driver
//! does the storage's work, as in the simulation, is the work done in place, so that its order among the
//! tasks does not depend on how fast another thread is.

use chronik_storage::PartitionLog;
use tokio::task::JoinError;

/// Runs `work`, which is about `log`, where blocking is allowed. An error: it panicked, or the
/// runtime stops.
pub async fn run<T: Send + 'static>(
    log: &PartitionLog,
    work: impl FnOnce(&PartitionLog) -> T + Send + 'static,
) -> Result<T, JoinError> {
    if log.is_driven() {
        return Ok(work(log));
    }
    let log = log.clone();
    tokio::task::spawn_blocking(move || work(&log)).await
}
