//! Adapters between openraft and the rest of the controller; the only module that names its types.
//! No policy here: what a command means is decided in `apply`.

mod codec;
mod introduction;
mod log_bound;
mod log_store;
mod membership;
mod network;
mod node;
mod state_machine;
mod type_config;

#[cfg(test)]
mod tests;

pub use codec::restored_start;
pub use introduction::{describe, join};
pub use membership::Admission;
pub use network::RaftRpc;
pub use node::{Leadership, ProposeError, RaftNode, RaftStartError, RaftStatus, Unstarted};
