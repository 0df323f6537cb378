//! The write-ahead log: one per broker, shared by all its partitions.
//!
//! ```text
//! wal/00000000000000000007.wal   [frame 41][frame 42][frame 43][what an earlier use left ...]
//! wal/spare-3                    written before, waits to become the next file
//! ```
//!
//! Invariant: at most one frame is not fsynced at any time, the last one. So the first invalid frame
//! is either the torn end of the log, or corruption if any later frame is valid.

pub mod files;
pub mod frame;
pub mod queue;
pub mod record;
pub mod recovery;
pub mod writer;

pub use files::{WalFile, WalFiles};
pub use queue::{Done, WalProgress, WalQueue, Written};
pub use record::{Action, Decoded, Record};
