//! Waiting for a condition, never for time to pass.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// How long to leave between two looks at a condition.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Looks until `look` gives a value. Panics at the deadline with what it saw last.
pub fn wait_for<T, E: Display>(
    what: &str,
    deadline: Duration,
    look: impl FnMut() -> Result<T, E>,
) -> T {
    let started = Instant::now();
    within(deadline, look).unwrap_or_else(|seen| {
        let waited = started.elapsed().as_secs_f64();
        panic!("waited {waited:.1} s for {what}: {seen}")
    })
}

/// Looks until `look` gives a value, or what it saw last at the deadline.
pub fn within<T, E>(deadline: Duration, mut look: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let started = Instant::now();
    loop {
        match look() {
            Err(_) if started.elapsed() < deadline => std::thread::sleep(LOOK_INTERVAL),
            seen => return seen,
        }
    }
}

/// Turns a condition into what `wait_for` takes.
pub fn holds(condition: bool, otherwise: impl Display) -> Result<(), String> {
    if condition {
        Ok(())
    } else {
        Err(otherwise.to_string())
    }
}

/// Lets time pass for a measurement over time; never to give something else the time to happen.
pub fn measure_over(duration: Duration) {
    std::thread::sleep(duration);
}
