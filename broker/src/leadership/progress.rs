//! Whether a follower keeps up with its leader, by Kafka's rule: it is caught up if it had reached
//! the log end as that was at some time within the last `replica-lag-time-max-ms`.
//!
//! Invariant: pure; time and progress come in as values.

use std::collections::BTreeMap;
use std::time::Duration;

use chronik_types::id::{BrokerId, ReplicaId};
use tokio::time::Instant;

use crate::replica::Progress;

/// What is reported of one replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FollowerState {
    CaughtUp,
    Lagging,
    Unreachable,
}

#[derive(Debug, Clone, Copy)]
struct Follower {
    /// When it was last known to have the whole log of that time. None: not since we lead.
    caught_up_at: Option<Instant>,
}

/// The followers of one partition that is led here.
#[derive(Debug)]
pub struct Followers {
    followers: BTreeMap<ReplicaId, Follower>,
    /// The log end at the last observation, and when that was.
    seen: Option<(Option<u64>, Instant)>,
    settled: bool,
    lag_max: Duration,
}

impl Followers {
    /// At the start of a leadership: in-sync replicas have their time to show that they still are.
    pub fn new(followers: &[ReplicaId], isr: &[BrokerId], lag_max: Duration, now: Instant) -> Self {
        let followers = followers.iter().map(|replica| {
            let in_sync = isr.contains(&replica.broker_id);
            (
                *replica,
                Follower {
                    caught_up_at: in_sync.then_some(now),
                },
            )
        });
        Self {
            followers: followers.collect(),
            seen: None,
            settled: false,
            lag_max,
        }
    }

    /// Every follower had the whole log when last looked at: while it does not grow, nothing can
    /// change but the links.
    pub fn is_settled(&self, log_end: Option<u64>) -> bool {
        self.settled && self.seen.is_some_and(|(end, _)| end == log_end)
    }

    /// Takes in the leader's view of now, and says how each follower is.
    pub fn observe(
        &mut self,
        progress: &Progress,
        is_reachable: impl Fn(BrokerId) -> bool,
        now: Instant,
    ) -> BTreeMap<BrokerId, FollowerState> {
        let seen = self.seen.replace((progress.last_index, now));
        let mut states = BTreeMap::new();
        self.settled = true;
        for (replica, follower) in &mut self.followers {
            let known = progress
                .followers
                .iter()
                .find(|other| other.replica == *replica);
            let matched = known.and_then(|other| other.matched);
            if matched >= progress.last_index {
                follower.caught_up_at = Some(now);
            } else {
                self.settled = false;
                if let Some((end, at)) = seen
                    && matched >= end
                {
                    follower.caught_up_at = follower.caught_up_at.max(Some(at));
                }
            }
            let in_time = follower
                .caught_up_at
                .is_some_and(|at| now.saturating_duration_since(at) <= self.lag_max);
            let state = if !is_reachable(replica.broker_id) {
                FollowerState::Unreachable
            } else if in_time {
                FollowerState::CaughtUp
            } else {
                FollowerState::Lagging
            };
            states.insert(replica.broker_id, state);
        }
        states
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::FollowerProgress;

    fn replica(broker: i32) -> ReplicaId {
        ReplicaId {
            broker_id: BrokerId(broker),
            incarnation: 1,
        }
    }

    fn progress(last: u64, matched: Option<u64>) -> Progress {
        let follower = FollowerProgress {
            replica: replica(2),
            matched,
        };
        Progress {
            last_index: Some(last),
            followers: vec![follower],
        }
    }

    fn state(
        followers: &mut Followers,
        progress: &Progress,
        reachable: bool,
        now: Instant,
    ) -> FollowerState {
        followers.observe(progress, |_| reachable, now)[&BrokerId(2)]
    }

    #[test]
    fn a_follower_that_reached_an_earlier_end_in_time_is_caught_up() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut followers = Followers::new(&[replica(2)], &[BrokerId(2)], 10 * second, start);
        let at = |seconds: u32| start + second * seconds;
        use FollowerState::{CaughtUp, Lagging, Unreachable};
        // It never has the newest entry, but always that of a moment ago.
        assert_eq!(
            state(&mut followers, &progress(100, Some(90)), true, at(0)),
            CaughtUp
        );
        assert_eq!(
            state(&mut followers, &progress(200, Some(150)), true, at(8)),
            CaughtUp
        );
        assert_eq!(
            state(&mut followers, &progress(300, Some(210)), true, at(16)),
            CaughtUp
        );
        // Then it stands still.
        assert_eq!(
            state(&mut followers, &progress(400, Some(210)), true, at(18)),
            CaughtUp
        );
        assert_eq!(
            state(&mut followers, &progress(400, Some(210)), true, at(19)),
            Lagging
        );
        assert!(!followers.is_settled(Some(400)));
        assert_eq!(
            state(&mut followers, &progress(400, Some(400)), true, at(20)),
            CaughtUp
        );
        assert!(followers.is_settled(Some(400)));
        assert!(!followers.is_settled(Some(401)));
        assert_eq!(
            state(&mut followers, &progress(400, Some(400)), false, at(21)),
            Unreachable
        );
    }

    #[test]
    fn a_follower_outside_the_isr_must_catch_up_first() {
        let now = Instant::now();
        let mut followers = Followers::new(&[replica(2)], &[], Duration::from_secs(10), now);
        let behind = progress(100, Some(3));
        assert_eq!(
            state(&mut followers, &behind, true, now),
            FollowerState::Lagging
        );
        let nothing = progress(100, None);
        assert_eq!(
            state(&mut followers, &nothing, true, now),
            FollowerState::Lagging
        );
        let there = progress(100, Some(100));
        assert_eq!(
            state(&mut followers, &there, true, now),
            FollowerState::CaughtUp
        );
    }
}
