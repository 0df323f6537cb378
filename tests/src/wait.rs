//! Waiting for a condition, never for time to pass.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// How long to leave between two looks at a condition.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Looks until `look` gives a value. Panics at the deadline with what it saw last.
pub fn wait_for<T, E: Display>(
    what: &str,
    deadline: Duration,
    mut look: impl FnMut() -> Result<T, E>,
) -> T {
    let started = Instant::now();
    loop {
        let seen = match look() {
            Ok(value) => return value,
            Err(seen) => seen,
        };
        assert!(
            started.elapsed() < deadline,
            "waited {:.1} s for {what}: {seen}",
            started.elapsed().as_secs_f64()
        );
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Looks until `look` says so. False: it did not within the time.
pub fn comes_true(within: Duration, mut look: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    loop {
        if look() {
            return true;
        }
        if started.elapsed() >= within {
            return false;
        }
        std::thread::sleep(LOOK_INTERVAL);
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
