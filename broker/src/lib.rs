//! The broker: replicas of partitions, one Raft group each, over one shared WAL; the transport
//! that carries all groups between two brokers; and the coordinator of consumer groups.
//!
//! Modules in reading order. Services never import each other: brokers, gateways and controllers
//! meet only in `chronik_proto`.

pub mod config;
pub mod metrics;

pub mod blocking;
pub mod disk_watch;
pub mod replica;
pub mod replicas;
pub mod resting;
pub mod throttle;

pub mod peers;

pub mod catch_up;
pub mod log_life;

pub mod leadership;

pub mod controller_client;
pub mod reconcile;

pub mod consumer_group;

pub mod rpc;

#[cfg(feature = "sabotage")]
pub mod sabotage;

#[cfg(test)]
mod cluster_test;
#[cfg(test)]
mod fake_controller;
mod process;
#[cfg(test)]
mod test_wait;

#[cfg(test)]
pub(crate) use process::{Host, start_with};
pub use process::{Running, start};
