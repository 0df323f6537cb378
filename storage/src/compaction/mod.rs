//! Compaction: of all records with one key only the last stays.
//!
//! ```text
//! log start        cleaned offset         end of what may be cleaned       log end
//!     |  one record per key  |  read to learn the newest offset   |  not touched  |
//!     |                      |  of each key                       |               |
//!     |<------------ all of this is written anew, group by group --->|
//! ```
//!
//! Invariant: the last value of a key stays readable at its own offset, whatever happens meanwhile: a
//! record goes only if a later committed record of the same key is in the log, or if it is a tombstone
//! that everybody had the time to see. Only sealed segments below the purged part are touched, so
//! Raft never needs what is removed, and appends never wait.

mod keys;
mod plan;
pub mod records;
mod rewrite;
mod run;

pub use plan::{CompactionDue, CompactionReason, CompactionSettings};
pub use run::{CompactionReport, CompactionRequest};
