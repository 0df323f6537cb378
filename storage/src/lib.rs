//! Write-ahead log and segmented partition logs of one broker. No Raft, no network, no Kafka API.
//!
//! Invariant: what an `OnDurable` callback confirmed survives any crash; what was not written is
//! never invented; damaged bytes are reported, never served.

mod storage;

mod compaction;
mod transfer;

mod entry;
mod partition_log;

mod core;
mod counters;
mod driver;
mod flusher;
mod recovery;
mod scrub;

mod checkpoint;
mod memory;
mod segment;
mod wal;

mod clock;
mod codec;
pub mod disk;
mod error;
mod pace;
mod poison;
mod space;
mod sync;
mod wakers;

pub use compaction::records;
pub use compaction::{
    CompactionDue, CompactionReason, CompactionReport, CompactionRequest, CompactionSettings,
};
pub use counters::StorageStats;
pub use disk::{Disk, RealDisk};
pub use driver::Driver;
pub use entry::{LogEntry, OnDurable, Payload, Purged, TermStart};
pub use error::{Damage, OpenError, StorageError};
pub use pace::{Priority, set_priority};
pub use partition_log::{DamageChanges, Held, PartitionLog, SegmentInfo, SegmentState};
pub use poison::Failed;
pub use storage::{Storage, StorageConfig};
pub use transfer::{Export, Installer, LogManifest, ManifestSegment, Rebuild, SegmentFile};
pub use wal::WalProgress;
