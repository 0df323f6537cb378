//! Which fault when: chosen from a seed before anything runs.
//!
//! Invariants: the same seed, length and shape give the same schedule on every machine. Faults may
//! overlap; all of them are over at the end of the schedule.

use std::time::Duration;

use crate::wire::Random;

/// Who is meant. Leaders are looked up when the fault begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A service by its name.
    Named(String),
    /// The broker that leads a partition of the workload.
    LeaderOf(usize),
    /// The controllers' leader.
    LeadingController,
}

/// From whom a service is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Everybody,
    /// Gateways, hence clients, still reach a broker that reaches no other.
    Brokers,
    Controllers,
    Gateways,
}

/// Which bytes do not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Both,
    /// Those that the service, or the first of two, sends.
    Out,
    /// Those that are sent to it.
    In,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// kill -9, and a start again at the end.
    Kill(Target),
    /// kill -9 of every broker, one after the other, each started again before the next.
    KillInTurn,
    /// kill -9 of every process of a role at once; of all if it is empty.
    KillAll(String),
    /// SIGTERM of every broker, one after the other, each started again before the next.
    Roll,
    /// SIGSTOP, and SIGCONT at the end.
    Pause(Target),
    /// The thread that writes and syncs the log stands still.
    StallDisk(Target),
    /// No bytes between a service and others.
    Cut {
        target: Target,
        from: Scope,
        direction: Direction,
    },
    /// Connections between a service and others are reset, and new ones as well.
    Reset { target: Target, from: Scope },
    /// No bytes between two brokers; both reach the third.
    CutPair {
        one: String,
        other: String,
        direction: Direction,
    },
    /// Everything to and from a service is late.
    Slow(Target, Duration),
    /// One replica of a partition moves to a broker that has none.
    Move { partition: usize, shift: usize },
    /// kill -9, and a start with an empty disk. Only where all replicas are in sync: two lost disks are a
    /// majority of the replicas.
    Wipe(Target),
}

/// The names of all of them.
pub const ALL_KINDS: [&str; 12] = [
    "Kill",
    "KillInTurn",
    "KillAll",
    "Roll",
    "Pause",
    "StallDisk",
    "Cut",
    "Reset",
    "CutPair",
    "Slow",
    "Move",
    "Wipe",
];

impl Fault {
    /// What it is called where faults are counted.
    pub fn kind(&self) -> String {
        let whole = format!("{self:?}");
        whole
            .split(['(', ' '])
            .next()
            .unwrap_or_default()
            .to_owned()
    }
}

/// A fault with its times since the beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub begin: Duration,
    pub end: Duration,
    pub fault: Fault,
}

/// Kinds of fault that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Kill,
    Pause,
    Network,
    Disk,
    Roll,
    Move,
    Wipe,
}

pub const ALL_FAMILIES: &[Family] = &[
    Family::Kill,
    Family::Pause,
    Family::Network,
    Family::Disk,
    Family::Roll,
    Family::Move,
    Family::Wipe,
];

impl Family {
    pub fn named(name: &str) -> Option<Self> {
        ALL_FAMILIES
            .iter()
            .copied()
            .find(|family| format!("{family:?}").eq_ignore_ascii_case(name))
    }
}

/// How large the cluster and the workload are.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    pub controllers: usize,
    pub brokers: usize,
    pub gateways: usize,
    pub partitions: usize,
}

/// The schedule of a seed.
pub fn plan(seed: u64, length: Duration, extent: Extent, families: &[Family]) -> Vec<Step> {
    assert!(!families.is_empty(), "there is something to choose from");
    let mut chooser = Chooser {
        random: Random(seed),
        extent,
    };
    let mut steps = Vec::new();
    let mut at = Duration::from_millis(1000 + chooser.below(1000));
    while at < length {
        let mut family = families[chooser.index(families.len())];
        if family == Family::Roll && chooser.below(3) > 0 {
            // It takes as long as several others.
            family = families[chooser.index(families.len())];
        }
        let (fault, lasts) = chooser.fault(family);
        let end = (at + lasts).min(length);
        steps.push(Step {
            begin: at,
            end,
            fault,
        });
        // Three of four wait for the one before to be over; the others overlap it.
        let calm = Duration::from_millis(200 + chooser.below(2000));
        at = if chooser.below(4) == 0 {
            at + calm.min(lasts)
        } else {
            end + calm
        };
    }
    steps
}

struct Chooser {
    random: Random,
    extent: Extent,
}

impl Chooser {
    fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.random.below(bound as u64)).expect("below a usize")
    }

    fn named(&mut self, role: &str, count: usize) -> String {
        format!("{role}-{}", 1 + self.index(count))
    }

    /// Mostly brokers, and mostly those that lead.
    fn broker(&mut self) -> Target {
        if self.below(3) > 0 {
            Target::LeaderOf(self.index(self.extent.partitions))
        } else {
            Target::Named(self.named("broker", self.extent.brokers))
        }
    }

    fn anybody(&mut self) -> Target {
        match self.below(6) {
            0 => Target::LeadingController,
            1 => Target::Named(self.named("controller", self.extent.controllers)),
            2 => Target::Named(self.named("gateway", self.extent.gateways)),
            _ => self.broker(),
        }
    }

    fn two_brokers(&mut self) -> (String, String) {
        let one = self.index(self.extent.brokers);
        let other = (one + 1 + self.index(self.extent.brokers.max(2) - 1)) % self.extent.brokers;
        let name = |index: usize| format!("broker-{}", index + 1);
        (name(one), name(other))
    }

    /// Both ways half of the time.
    fn direction(&mut self) -> Direction {
        match self.below(4) {
            0 => Direction::Out,
            1 => Direction::In,
            _ => Direction::Both,
        }
    }

    fn scope(&mut self) -> Scope {
        match self.below(3) {
            0 => Scope::Everybody,
            1 => Scope::Brokers,
            _ => Scope::Gateways,
        }
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    fn fault(&mut self, family: Family) -> (Fault, Duration) {
        match family {
            Family::Kill => self.kill(),
            // Shorter and longer than the session of 3 s and the silence of 1 s that peers notice.
            Family::Pause => {
                let lasts = match self.below(3) {
                    0 => self.millis(100, 900),
                    1 => self.millis(1000, 3000),
                    _ => self.millis(3500, 8000),
                };
                (Fault::Pause(self.anybody()), lasts)
            }
            Family::Network => self.network(),
            Family::Disk => (Fault::StallDisk(self.broker()), self.millis(200, 6000)),
            Family::Roll => (Fault::Roll, self.millis(500, 1000)),
            Family::Move => {
                let partition = self.index(self.extent.partitions);
                let shift = self.index(64);
                (Fault::Move { partition, shift }, self.millis(500, 2000))
            }
            Family::Wipe => (Fault::Wipe(self.broker()), self.millis(0, 4000)),
        }
    }

    fn kill(&mut self) -> (Fault, Duration) {
        match self.below(12) {
            0 => (Fault::KillAll(String::new()), self.millis(0, 1000)),
            1 => (
                Fault::KillAll("controller".to_owned()),
                self.millis(1000, 6000),
            ),
            2 => (Fault::KillAll("broker".to_owned()), self.millis(0, 1500)),
            3 => (Fault::KillInTurn, self.millis(500, 1500)),
            // Back before the others have missed it.
            4..=6 => (Fault::Kill(self.anybody()), self.millis(0, 50)),
            _ => (Fault::Kill(self.anybody()), self.millis(0, 5000)),
        }
    }

    fn network(&mut self) -> (Fault, Duration) {
        let lasts = self.millis(300, 7000);
        let fault = match self.below(10) {
            0 => Fault::Cut {
                target: self.anybody(),
                from: Scope::Everybody,
                direction: self.direction(),
            },
            1..=3 => Fault::Cut {
                target: self.broker(),
                from: Scope::Brokers,
                direction: self.direction(),
            },
            // Also one controller from the others, with brokers and gateways that still hear it.
            4 => Fault::Cut {
                target: self.anybody(),
                from: Scope::Controllers,
                direction: self.direction(),
            },
            5 => Fault::Cut {
                target: self.broker(),
                from: Scope::Gateways,
                direction: self.direction(),
            },
            6 => Fault::Reset {
                target: self.anybody(),
                from: self.scope(),
            },
            7 | 8 => {
                let (one, other) = self.two_brokers();
                Fault::CutPair {
                    one,
                    other,
                    direction: self.direction(),
                }
            }
            _ => {
                let delay = self.millis(20, 600);
                Fault::Slow(self.anybody(), delay)
            }
        };
        (fault, lasts)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const EXTENT: Extent = Extent {
        controllers: 3,
        brokers: 4,
        gateways: 2,
        partitions: 6,
    };

    #[test]
    fn a_seed_gives_the_same_schedule_every_time_and_another_seed_another() {
        let length = Duration::from_secs(600);
        let once = plan(7, length, EXTENT, ALL_FAMILIES);
        assert_eq!(once, plan(7, length, EXTENT, ALL_FAMILIES));
        assert_ne!(once, plan(8, length, EXTENT, ALL_FAMILIES));
        assert!(once.len() > 60, "{}", once.len());
        assert!(
            once.iter()
                .all(|step| step.begin < length && step.end <= length)
        );
        assert!(
            once.windows(2).any(|pair| pair[1].begin < pair[0].end),
            "none overlap"
        );
    }

    #[test]
    fn every_kind_has_its_name_and_its_turn() {
        let length = Duration::from_secs(180);
        let steps = (0..20).flat_map(|seed| plan(seed, length, EXTENT, ALL_FAMILIES));
        let chosen: BTreeSet<String> = steps.map(|step| step.fault.kind()).collect();
        assert_eq!(chosen, ALL_KINDS.map(str::to_owned).into());
    }

    #[test]
    fn even_a_short_schedule_does_some_harm() {
        for seed in 0..2000 {
            let steps = plan(seed, Duration::from_secs(25), EXTENT, ALL_FAMILIES);
            let harmful = steps
                .iter()
                .filter(|s| !matches!(s.fault, Fault::Move { .. }));
            assert!(harmful.count() >= 2, "seed {seed}: {steps:?}");
        }
    }

    #[test]
    fn every_family_is_chosen_and_only_those_that_are_allowed() {
        let steps = plan(1, Duration::from_secs(3600), EXTENT, ALL_FAMILIES);
        for wanted in [
            "Kill(",
            "KillInTurn",
            "KillAll",
            "Roll",
            "Pause",
            "StallDisk",
            "Cut {",
            "Reset",
            "CutPair",
            "Slow",
            "Move",
            "Wipe",
        ] {
            let found = steps
                .iter()
                .any(|step| format!("{:?}", step.fault).starts_with(wanted));
            assert!(found, "no {wanted} in an hour");
        }
        let steps = plan(1, Duration::from_secs(600), EXTENT, &[Family::Pause]);
        assert!(
            steps
                .iter()
                .all(|step| matches!(step.fault, Fault::Pause(_)))
        );
        assert_eq!(Family::named("network"), Some(Family::Network));
        assert_eq!(Family::named("weather"), None);
    }
}
