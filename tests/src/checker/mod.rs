//! The consistency checker: clients that write and read unique values while a nemesis does harm, and
//! a judge of all that they were told and found in the end.
//!
//! `run` puts the parts together. The history (`history`) is what the parts meet in: the workload
//! (`workload`, a program of real Kafka clients) writes it, `judge` reads it, and knows nothing else.
//! `schedule` decides from a seed what harm is done when, `nemesis` does it to the `fleet`, through
//! signals, `network` and `stall`.
//!
//! Invariant: a seed gives the same faults at the same times. What the processes make of them depends on
//! the machine, so a seed finds an anomaly again with some luck, and the kept history always shows it.

pub mod run;

pub mod history;
pub mod judge;

pub mod nemesis;
pub mod schedule;
pub mod workload;

pub mod fleet;
pub mod network;
pub mod stall;
