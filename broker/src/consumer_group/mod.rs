//! Classic consumer groups and their offsets. The coordinator of a group is the leader of the
//! group's partition of `__consumer_offsets`; what it must remember is records in that partition,
//! in Apache Kafka's own formats.
//!
//! Invariant: a group's state and its committed offsets in memory are what a replay of the
//! committed log gives, plus what has not been answered yet. Reading order: `state` (pure rules of
//! one group), `offsets`, `records` (formats), `log` (the seam to the replica), `partition` (all
//! groups of one partition, still without I/O), `coordinator` (what gateways call) and `driver` (the
//! task that loads and writes).

pub mod config;

mod member;
pub mod state;

pub mod offsets;

pub mod batch;
mod fields;
pub mod records;

pub mod log;

mod loaded;
mod partition;

pub mod coordinator;
pub mod coordinators;
mod driver;
pub mod replica_log;

#[cfg(test)]
mod coordinator_test;
#[cfg(test)]
pub(crate) mod memory_log;
#[cfg(test)]
mod replica_log_test;
#[cfg(test)]
mod state_test;

pub use config::GroupConfig;
pub use coordinator::Coordinator;
pub use coordinators::Coordinators;
pub use state::GroupError;
