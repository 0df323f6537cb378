//! What happens to many partitions, told in one line per interval.
//!
//! Invariant: every change is counted in exactly one line.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

const SUMMARY_INTERVAL: Duration = Duration::from_secs(1);

/// What is not told yet, and when it will be.
#[derive(Default)]
pub struct Summary {
    gained: u64,
    lost: u64,
    stepped_down: u64,
    pub at: Option<Instant>,
}

impl Summary {
    pub fn gained(&mut self) {
        self.gained = self.gained.saturating_add(1);
        self.plan();
    }

    pub fn lost(&mut self) {
        self.lost = self.lost.saturating_add(1);
        self.plan();
    }

    pub fn stepped_down(&mut self) {
        self.stepped_down = self.stepped_down.saturating_add(1);
        self.plan();
    }

    fn plan(&mut self) {
        self.at
            .get_or_insert_with(|| Instant::now() + SUMMARY_INTERVAL);
    }

    pub fn tell(&mut self, now: Instant) {
        if self.at.is_none_or(|at| at > now) {
            return;
        }
        let Summary {
            gained,
            lost,
            stepped_down,
            ..
        } = std::mem::take(self);
        if stepped_down > 0 {
            warn!(
                partitions = stepped_down,
                "reaches no majority of the replicas of some partitions: leads them no more"
            );
        }
        info!(gained, lost, "the partitions led here changed");
    }
}
