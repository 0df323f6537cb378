//! Three real brokers, each on a runtime of its own so that it can be killed at once, over loopback,
//! with a fake controller.

mod client;
mod harness;
mod ways;

mod bad_disk_test;
mod cut_off_test;
mod life_test;
mod rebuild_test;
mod resting_test;
