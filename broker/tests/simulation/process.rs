//! One simulated process: a runtime of its own, which runs only when it is told to, until every task
//! waits.
//!
//! Invariant: a process that is not run does nothing, however much time goes by, as after SIGSTOP.
//! Dropping it ends all its tasks where they are, as SIGKILL does.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use tokio::runtime::{Builder, Runtime};

/// Twice idle without a task in between: after the first time the timers that are due were fired.
const IDLE_COUNT: usize = 2;

#[derive(Default)]
struct Idle {
    count: usize,
    runner: Option<Waker>,
}

pub struct Process {
    runtime: Runtime,
    idle: Arc<Mutex<Idle>>,
}

impl Process {
    pub fn new() -> Process {
        let idle = Arc::new(Mutex::new(Idle::default()));
        let is_idle = idle.clone();
        let runtime = Builder::new_current_thread()
            .enable_time()
            .on_thread_park(move || {
                let mut idle = is_idle.lock().unwrap();
                idle.count += 1;
                if let Some(runner) = idle.runner.take() {
                    drop(idle);
                    runner.wake();
                }
            })
            .build()
            .unwrap();
        Process { runtime, idle }
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }

    /// Runs every task until it waits for time or for what comes from outside.
    pub fn run(&self) {
        self.idle.lock().unwrap().count = 0;
        self.runtime.block_on(poll_fn(|context| {
            let mut idle = self.idle.lock().unwrap();
            if idle.count >= IDLE_COUNT {
                return Poll::Ready(());
            }
            idle.runner = Some(context.waker().clone());
            Poll::Pending
        }));
    }

    /// Runs `work` as if a task of the process did.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _guard = self.runtime.enter();
        work()
    }
}
