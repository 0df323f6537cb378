//! Identifiers. Each is its own type, so that a broker id can never be passed where a
//! partition index is meant.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! number_id {
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

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

number_id!(
    /// A broker as Kafka clients know it (`node_id`). Chosen by the operator, 0 or more.
    BrokerId(i32)
);
number_id!(
    /// A controller: a voter of the metadata Raft group. Chosen by the operator, 1 or more.
    ControllerId(u64)
);
number_id!(
    /// Index of a partition within its topic, from 0.
    PartitionIndex(i32)
);
number_id!(
    /// The Raft group of one partition. Given out by the controller from a counter that never
    /// goes back, so a topic that is deleted and created again has new groups.
    RaftGroupId(u64)
);
number_id!(
    /// Identifies an idempotent producer (KIP-98). Given out by the controller in blocks.
    ProducerId(i64)
);

/// A topic's identity for its whole life (KIP-516); its name may be used again after deletion.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct TopicId(pub Uuid);

impl fmt::Display for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One replica of one partition during one stay on a broker: the Raft node id.
///
/// A broker that gets the same partition again, or that lost its disk, gets a new incarnation.
/// An empty replica under an old Raft id could vote twice in a term and split the brain.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct ReplicaId {
    pub broker_id: BrokerId,
    /// The controller's revision at which the replica was assigned.
    pub incarnation: u64,
}

/// openraft's storage suite numbers its nodes; in operation the controller names both parts.
impl From<u64> for ReplicaId {
    fn from(incarnation: u64) -> Self {
        ReplicaId {
            broker_id: BrokerId(0),
            incarnation,
        }
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.broker_id, self.incarnation)
    }
}
