//! Epochs: numbers that only rise and so tell an old statement from a new one.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! epoch {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

epoch!(
    /// Strictly higher for each new leader of a partition: its Raft term. 0 or more; -1 where the
    /// Kafka protocol says "unknown".
    LeaderEpoch(i32)
);
epoch!(
    /// Rises on every change that the controller makes to a partition.
    PartitionEpoch(i32)
);
epoch!(
    /// Given at a broker's registration; a request under a lower one is from a fenced incarnation.
    BrokerEpoch(u64)
);
epoch!(
    /// Epoch of an idempotent producer (KIP-98); a lower one is fenced.
    ProducerEpoch(i16)
);

/// A Raft term that no longer fits the Kafka protocol's 32-bit leader epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("raft term {0} does not fit a leader epoch")]
pub struct TermOutOfRange(pub u64);

impl TryFrom<u64> for LeaderEpoch {
    type Error = TermOutOfRange;

    fn try_from(term: u64) -> Result<Self, TermOutOfRange> {
        i32::try_from(term)
            .map(LeaderEpoch)
            .map_err(|_| TermOutOfRange(term))
    }
}
