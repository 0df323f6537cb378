//! Leaves a share of the time to others.
//!
//! Invariant: the only place in the storage where a thread waits for nothing but time, and never with
//! a lock that the path of records needs.

use std::time::Instant;

/// Work that takes half of the time at most, on whatever machine it runs.
pub struct HalfOfTheTime {
    began: Instant,
}

impl HalfOfTheTime {
    pub fn begin() -> HalfOfTheTime {
        HalfOfTheTime {
            began: Instant::now(),
        }
    }

    /// Rests for as long as was worked since the last rest.
    pub fn rest(&mut self) {
        std::thread::sleep(self.began.elapsed());
        self.began = Instant::now();
    }
}
