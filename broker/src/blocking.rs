//! Work that waits for the disk, kept off the threads that run tasks.
//!
//! Invariant: on a runtime of one thread, as tests and the simulation have, the work is done in
//! place, so that its order among the tasks does not depend on how fast another thread is.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::JoinError;

/// Runs `work` where blocking is allowed. An error: it panicked, or the runtime stops.
pub async fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => Ok(work()),
        _ => tokio::task::spawn_blocking(work).await,
    }
}
