//! Who goes first, and who leaves a share of the time to others.
//!
//! Invariant: the only place in the storage where a thread waits for nothing but time, and never with
//! a lock that the path of records needs.

use std::time::Instant;

/// Of a thread, compared with the others of all processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    First,
    Last,
}

/// Of the calling thread. False: it has no permission to, and stays as it is.
pub fn set_priority(priority: Priority) -> bool {
    let nice = match priority {
        Priority::First => -10,
        Priority::Last => 10,
    };
    // SAFETY: changes the priority of the calling thread only, and touches no memory.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) == 0 }
}

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
