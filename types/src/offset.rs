//! Offsets: positions in a partition as clients see them. Raft's log index is another number
//! space and has no type here on purpose: it never leaves the broker's replica and storage.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Position of a record in a partition, from 0. Ranges of offsets are half-open.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Offset(pub i64);

impl Offset {
    pub const ZERO: Offset = Offset(0);

    /// The offset `count` records further on; stays at the largest offset rather than overflow,
    /// since `count` may come from outside.
    pub fn plus(self, count: i64) -> Offset {
        Offset(self.0.saturating_add(count))
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
