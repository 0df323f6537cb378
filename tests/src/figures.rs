//! Figures that tests print, also when they pass, and what they are made of.

use std::io::Write as _;
use std::time::Duration;

/// Prints a line past the test runner's capture of output.
pub fn report(line: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody listening is no reason to fail a test.
    let _ = writeln!(out, "figure: {line}");
    let _ = out.flush();
}

/// How far figures may be from their goals. Goals are absolute, and the same machine differs by a factor of two from
/// one day to the next: `make test-all` fails beyond three times a goal and says which goals were missed, `make
/// figures` holds the goals themselves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Allowance(f64);

impl Allowance {
    /// For what does not depend on the machine.
    pub const NONE: Allowance = Allowance(1.0);
    const DAILY: Allowance = Allowance(3.0);

    /// What this run is for: `CHRONIK_HOLD_GOALS=true` wants the goals themselves.
    pub fn of_this_run() -> Allowance {
        match std::env::var("CHRONIK_HOLD_GOALS").as_deref() {
            Ok("true") => Allowance::NONE,
            Ok(other) => panic!("CHRONIK_HOLD_GOALS is {other:?}; it is true or not there"),
            Err(_) => Allowance::DAILY,
        }
    }

    /// Holds a figure, of which less is better, against its goal.
    pub fn hold(self, what: &str, is: f64, goal: f64) {
        if is > goal {
            report(&format!("goal missed: {what}: {is:.3}, the goal is {goal}"));
        }
        assert!(
            is <= goal * self.0,
            "{what}: {is:.3}, the goal is {goal}, and {} times that is allowed",
            self.0
        );
    }
}

/// Smallest, middle and largest of some durations.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    pub min: Duration,
    pub median: Duration,
    pub max: Duration,
}

impl Spread {
    pub fn of(mut durations: Vec<Duration>) -> Self {
        assert!(!durations.is_empty(), "nothing was measured");
        durations.sort_unstable();
        Self {
            min: durations[0],
            median: durations[durations.len() / 2],
            max: durations[durations.len() - 1],
        }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
        write!(
            f,
            "min {:.0} ms, median {:.0} ms, max {:.0} ms",
            ms(self.min),
            ms(self.median),
            ms(self.max)
        )
    }
}

/// CPU time that a process has used since it started, user and system.
pub fn cpu_time(pid: u32) -> Duration {
    let stat = read_proc(pid, "stat");
    // The name, in brackets, may hold spaces; fields are counted after it.
    let (_, fields) = stat
        .rsplit_once(") ")
        .expect("the kernel writes the name in brackets");
    let fields = fields.split(' ').skip(11).take(2);
    let ticks: u64 = fields
        .map(|field| field.parse::<u64>().expect("the kernel writes numbers"))
        .sum();
    // SAFETY: sysconf has no preconditions.
    let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_secs_f64(ticks as f64 / ticks_per_second as f64)
}

/// Memory that a process holds, in MiB: its resident set.
pub fn memory_mib(pid: u32) -> f64 {
    let status = read_proc(pid, "status");
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = kib.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kib.expect("the kernel tells the resident set of a living process") / 1024.0
}

fn read_proc(pid: u32, file: &str) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/{file}"))
        .unwrap_or_else(|error| panic!("process {pid} is gone: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_held_up_to_what_is_allowed() {
        Allowance::DAILY.hold("a figure", 3.0, 1.0);
        Allowance::NONE.hold("a figure", 1.0, 1.0);
    }

    #[test]
    #[should_panic(expected = "a figure: 1.100, the goal is 1")]
    fn a_goal_of_its_own_allows_nothing() {
        Allowance::NONE.hold("a figure", 1.1, 1.0);
    }

    #[test]
    #[should_panic(expected = "3 times that is allowed")]
    fn a_daily_run_fails_beyond_its_allowance() {
        Allowance::DAILY.hold("a figure", 3.1, 1.0);
    }
}
