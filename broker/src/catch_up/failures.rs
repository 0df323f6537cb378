//! Pauses after what has failed, longer each time.
//!
//! Invariant: of what has not failed for several of the longest pauses nothing is remembered, so that
//! groups that are gone from here take no memory.

use std::collections::HashMap;
use std::time::Duration;

use chronik_types::id::RaftGroupId;
use tokio::time::Instant;

struct Failure {
    delay: Duration,
    not_before: Instant,
}

/// By group.
pub struct Failures {
    delay_min: Duration,
    delay_max: Duration,
    by_group: HashMap<RaftGroupId, Failure>,
}

impl Failures {
    pub fn new(delay_min: Duration, delay_max: Duration) -> Failures {
        Failures {
            delay_min,
            delay_max,
            by_group: HashMap::new(),
        }
    }

    /// When the next try may be made; None: now.
    pub fn not_before(&self, group: RaftGroupId, now: Instant) -> Option<Instant> {
        let at = self.by_group.get(&group)?.not_before;
        (now < at).then_some(at)
    }

    /// Gives the pause that begins now.
    pub fn failed(&mut self, group: RaftGroupId, now: Instant) -> Duration {
        let remembered = self.delay_max.saturating_mul(4);
        self.by_group
            .retain(|_, failure| failure.not_before + remembered > now);
        let delay = match self.by_group.get(&group) {
            Some(failure) => failure.delay.saturating_mul(2).min(self.delay_max),
            None => self.delay_min,
        };
        let not_before = now + delay;
        self.by_group.insert(group, Failure { delay, not_before });
        delay
    }

    pub fn forget(&mut self, group: RaftGroupId) {
        self.by_group.remove(&group);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_bound_and_are_forgotten() {
        let (group, other) = (RaftGroupId(1), RaftGroupId(2));
        let seconds = Duration::from_secs;
        let mut failures = Failures::new(seconds(1), seconds(5));
        let mut now = Instant::now();
        for pause in [1, 2, 4, 5, 5] {
            assert_eq!(failures.failed(group, now), seconds(pause));
            assert_eq!(failures.not_before(group, now), Some(now + seconds(pause)));
            assert_eq!(failures.not_before(other, now), None);
            now += seconds(pause);
            assert_eq!(failures.not_before(group, now), None);
        }
        failures.forget(group);
        assert_eq!(failures.failed(group, now), seconds(1));
        now += seconds(60);
        assert_eq!(failures.failed(group, now), seconds(1));
    }
}
