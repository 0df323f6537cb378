//! One partition's replica: an openraft group over the partition's log.

/// A partition's replica on this broker.
#[derive(Debug)]
pub struct Replica;
