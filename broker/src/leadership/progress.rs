//! Whether a follower keeps up with its leader, by Kafka's rule: it is caught up if it had reached
//! the log end as that was at some time within the last `replica-lag-time-max-ms`.
//!
//! Invariant: pure; time and progress come in as values. A follower that flaps does not flap the
//! ISR: one that dropped out again within a minute stays out for a while even though it has caught
//! up, each time twice as long; and a link that is broken for a moment drops nobody.

use std::collections::BTreeMap;
use std::time::Duration;

use chronik_types::id::{BrokerId, ReplicaId};
use tokio::time::Instant;

use crate::replica::Progress;

/// What is reported of one replica, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FollowerState {
    CaughtUp,
    Lagging,
    Unreachable,
}

/// How long a follower must be unreachable to be reported so, where its process may well live.
const UNREACHABLE_GRACE: Duration = Duration::from_millis(500);
/// A follower that dropped out twice within this time is held out.
const FLAP_WINDOW: Duration = Duration::from_secs(60);
const HOLD_MIN: Duration = Duration::from_secs(2);
const HOLD_MAX: Duration = Duration::from_secs(30);

/// How a follower's broker can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Reachable,
    /// Not at the moment.
    Unreachable,
    /// Its process is known to be dead.
    Dead,
}

#[derive(Debug, Clone, Copy)]
struct Follower {
    /// When it was last known to have the whole log of that time. None: not since we lead.
    caught_up_at: Option<Instant>,
    unreachable_since: Option<Instant>,
    /// The state that was last reported.
    state: FollowerState,
    /// When it last stopped being caught up.
    dropped_at: Option<Instant>,
    /// It is not taken for caught up before.
    held_until: Option<Instant>,
    hold: Duration,
}

impl Follower {
    fn new(in_sync: bool, now: Instant) -> Self {
        Self {
            caught_up_at: in_sync.then_some(now),
            unreachable_since: None,
            state: if in_sync {
                FollowerState::CaughtUp
            } else {
                FollowerState::Lagging
            },
            dropped_at: None,
            held_until: None,
            hold: Duration::ZERO,
        }
    }

    /// What it is, from what it does, damped.
    fn settle(&mut self, raw: FollowerState, now: Instant) -> FollowerState {
        let was_in = self.state == FollowerState::CaughtUp;
        let is_in = raw == FollowerState::CaughtUp;
        if was_in && !is_in {
            let again = self
                .dropped_at
                .is_some_and(|at| now.saturating_duration_since(at) < FLAP_WINDOW);
            self.hold = match again {
                true => (self.hold * 2).clamp(HOLD_MIN, HOLD_MAX),
                false => Duration::ZERO,
            };
            self.dropped_at = Some(now);
        }
        if !is_in || self.state == FollowerState::Unreachable {
            // It has to be caught up for all of the time that it is held out for.
            self.held_until = Some(now + self.hold);
        }
        let is_held = !was_in && self.held_until.is_some_and(|until| now < until);
        self.state = match is_in && is_held {
            true => FollowerState::Lagging,
            false => raw,
        };
        self.state
    }
}

/// The followers of one partition that is led here.
#[derive(Debug)]
pub struct Followers {
    followers: BTreeMap<ReplicaId, Follower>,
    /// The log end at the last observation, and when that was.
    seen: Option<(Option<u64>, Instant)>,
    is_settled: bool,
    lag_max: Duration,
}

impl Followers {
    /// At the start of a leadership: in-sync replicas have their time to show that they still are.
    pub fn new(followers: &[ReplicaId], isr: &[BrokerId], lag_max: Duration, now: Instant) -> Self {
        let followers = followers.iter().map(|replica| {
            let in_sync = isr.contains(&replica.broker_id);
            (*replica, Follower::new(in_sync, now))
        });
        Self {
            followers: followers.collect(),
            seen: None,
            is_settled: false,
            lag_max,
        }
    }

    /// Every follower had the whole log when last looked at, or could not be reached: while the log does
    /// not grow, nothing can change but the links.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// Takes in the leader's view of now, and says how each follower is.
    pub fn observe(
        &mut self,
        progress: &Progress,
        reach: impl Fn(BrokerId) -> Reach,
        now: Instant,
    ) -> BTreeMap<BrokerId, FollowerState> {
        let seen = self.seen.replace((progress.last_index, now));
        // Nobody looks while nothing happens: what was so then was so until a moment ago.
        let seen = match self.is_settled {
            true => seen.map(|(end, _)| (end, now)),
            false => seen,
        };
        let mut states = BTreeMap::new();
        self.is_settled = true;
        for (replica, follower) in &mut self.followers {
            let known = progress
                .followers
                .iter()
                .find(|other| other.replica == *replica);
            let matched = known.and_then(|other| other.matched);
            let has_all = matched >= progress.last_index;
            if has_all {
                follower.caught_up_at = Some(now);
            } else if let Some((end, at)) = seen
                && matched >= end
                && follower.state != FollowerState::Unreachable
            {
                follower.caught_up_at = follower.caught_up_at.max(Some(at));
            }
            let in_time = follower
                .caught_up_at
                .is_some_and(|at| now.saturating_duration_since(at) <= self.lag_max);
            let is_reachable = match reach(replica.broker_id) {
                Reach::Reachable => {
                    follower.unreachable_since = None;
                    true
                }
                Reach::Dead => false,
                Reach::Unreachable => {
                    let since = *follower.unreachable_since.get_or_insert(now);
                    now.saturating_duration_since(since) < UNREACHABLE_GRACE
                }
            };
            if !is_reachable {
                // It is out of the ISR, and has to reach the log end to come back, however short it
                // was away.
                follower.caught_up_at = None;
            }
            let raw = match (is_reachable, in_time) {
                (false, _) => FollowerState::Unreachable,
                (true, true) => FollowerState::CaughtUp,
                (true, false) => FollowerState::Lagging,
            };
            let state = follower.settle(raw, now);
            self.is_settled &= match raw {
                FollowerState::Unreachable => true,
                // Time alone will change these.
                _ => has_all && state == raw && follower.unreachable_since.is_none(),
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
        let reach = match reachable {
            true => Reach::Reachable,
            false => Reach::Dead,
        };
        followers.observe(progress, |_| reach, now)[&BrokerId(2)]
    }

    #[test]
    fn a_link_that_breaks_for_a_moment_drops_nobody() {
        let start = Instant::now();
        let mut followers = Followers::new(
            &[replica(2)],
            &[BrokerId(2)],
            Duration::from_secs(10),
            start,
        );
        let there = progress(100, Some(100));
        let mut at = |milliseconds: u64, reach: Reach| {
            let now = start + Duration::from_millis(milliseconds);
            followers.observe(&there, |_| reach, now)[&BrokerId(2)]
        };
        assert_eq!(at(0, Reach::Unreachable), FollowerState::CaughtUp);
        assert_eq!(at(400, Reach::Unreachable), FollowerState::CaughtUp);
        assert_eq!(at(450, Reach::Reachable), FollowerState::CaughtUp);
        assert_eq!(at(500, Reach::Unreachable), FollowerState::CaughtUp);
        assert_eq!(at(1_000, Reach::Unreachable), FollowerState::Unreachable);
        assert_eq!(at(1_100, Reach::Reachable), FollowerState::CaughtUp);
        assert_eq!(at(1_200, Reach::Dead), FollowerState::Unreachable);
    }

    #[test]
    fn a_follower_that_flaps_is_held_out_longer_each_time() {
        let start = Instant::now();
        let mut followers = Followers::new(
            &[replica(2)],
            &[BrokerId(2)],
            Duration::from_secs(10),
            start,
        );
        let there = progress(100, Some(100));
        let mut now = start;
        // Down for a second and up again: how long until it counts as caught up?
        let mut flap = || {
            now += Duration::from_secs(1);
            assert_ne!(
                state(&mut followers, &there, false, now),
                FollowerState::CaughtUp
            );
            let up = now;
            while state(&mut followers, &there, true, now) != FollowerState::CaughtUp {
                assert!(!followers.is_settled(), "somebody has to look again");
                now += Duration::from_millis(500);
            }
            now - up
        };
        let seconds = Duration::from_secs;
        assert_eq!(flap(), Duration::ZERO, "the first time costs nothing");
        assert_eq!(
            [flap(), flap(), flap()],
            [seconds(2), seconds(4), seconds(8)]
        );
        assert_eq!(
            [flap(), flap(), flap()],
            [seconds(16), seconds(30), seconds(30)]
        );
        // A quiet minute, and it is as good as new.
        now += FLAP_WINDOW;
        assert_eq!(
            state(&mut followers, &there, false, now),
            FollowerState::Unreachable
        );
        assert_eq!(
            state(&mut followers, &there, true, now),
            FollowerState::CaughtUp
        );
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
        assert!(!followers.is_settled());
        assert_eq!(
            state(&mut followers, &progress(400, Some(400)), true, at(20)),
            CaughtUp
        );
        assert!(followers.is_settled());
        assert_eq!(
            state(&mut followers, &progress(400, Some(400)), false, at(21)),
            Unreachable
        );
    }

    /// Looks at an in-sync follower: last entry of the log and of the follower, whether its broker can be
    /// reached, and the time in milliseconds.
    fn looks(lag_max: Duration) -> impl FnMut(u64, u64, bool, u64) -> FollowerState {
        let start = Instant::now();
        let mut followers = Followers::new(&[replica(2)], &[BrokerId(2)], lag_max, start);
        move |last, matched, reachable, ms| {
            let now = start + Duration::from_millis(ms);
            state(
                &mut followers,
                &progress(last, Some(matched)),
                reachable,
                now,
            )
        }
    }

    #[test]
    fn a_follower_that_was_away_must_catch_up_first() {
        let mut look = looks(Duration::from_secs(30));
        assert_eq!(look(9, 9, true, 10), FollowerState::CaughtUp);
        assert_eq!(look(50, 9, false, 20), FollowerState::Unreachable);
        // Back within the time that one may lag, but far behind.
        assert_eq!(look(500, 9, true, 30), FollowerState::Lagging);
        assert_eq!(look(500, 499, true, 40), FollowerState::Lagging);
        assert_eq!(look(500, 500, true, 50), FollowerState::CaughtUp);
    }

    #[test]
    fn a_follower_that_missed_little_while_away_must_catch_up_too() {
        let mut look = looks(Duration::from_secs(30));
        assert_eq!(look(500, 500, true, 50), FollowerState::CaughtUp);
        // It had everything when it was last looked at.
        assert_eq!(look(500, 500, false, 60), FollowerState::Unreachable);
        assert_eq!(look(600, 500, true, 70), FollowerState::Lagging);
        assert_eq!(look(600, 600, true, 80), FollowerState::CaughtUp);
    }

    #[test]
    fn a_follower_of_a_log_that_rested_for_long_has_its_time() {
        let mut look = looks(Duration::from_secs(10));
        assert_eq!(look(9, 9, true, 0), FollowerState::CaughtUp);
        // An hour later there are records, which it does not have yet.
        assert_eq!(look(20, 9, true, 3_600_000), FollowerState::CaughtUp);
        assert_eq!(look(20, 9, true, 3_609_000), FollowerState::CaughtUp);
        assert_eq!(look(20, 9, true, 3_611_000), FollowerState::Lagging);
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
