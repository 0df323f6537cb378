//! Work that waits for the disk or takes long, kept off the threads that run tasks.
//!
//! Invariant: a broker that runs on one thread answers its peers while it reads. Only where a driver
//! does the storage's work, as in the simulation, is the work done in place, so that its order among the
//! tasks does not depend on how fast another thread is.

use std::io;

use chronik_storage::{PartitionLog, Priority, set_priority};
use tokio::runtime::{Builder, Runtime};
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

/// Threads for work in bulk that clients do not wait for, which goes behind all else that the cores have to do.
pub struct Background(Option<Runtime>);

impl Background {
    pub fn new(name: &str, threads: usize) -> io::Result<Background> {
        let mut builder = Builder::new_multi_thread();
        builder
            .worker_threads(1)
            .max_blocking_threads(threads)
            .thread_name(name)
            .on_thread_start(|| {
                set_priority(Priority::Last);
            });
        builder.build().map(|runtime| Background(Some(runtime)))
    }

    /// `None`: the work panicked, or never began, since the process ends.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let runtime = self.0.as_ref()?;
        runtime.spawn_blocking(work).await.ok()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Tasks drop it, and they must not wait.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
