//! Write-ahead log and segmented partition logs of one broker. No Raft, no network, no Kafka API.
//!
//! Invariant: what an `OnDurable` callback confirmed survives any crash; what was not written is
//! never invented; damaged bytes are reported, never served.

pub mod disk;
pub mod entry;
pub mod error;
pub mod partition_log;
pub mod storage;

pub use disk::{Disk, RealDisk};
pub use entry::{LogEntry, OnDurable, Payload, TermStart};
pub use error::{OpenError, StorageError};
pub use partition_log::PartitionLog;
pub use storage::{Failed, Storage, StorageConfig};
