//! Segments: the committed part of a partition's log, in files named by their first offset.
//!
//! ```text
//! partitions/<group>/00000000000000012345.log        Kafka record batches v2, nothing else
//!                    00000000000000012345.index      sparse: offset -> position
//!                    00000000000000012345.timeindex  sparse: timestamp -> offset
//!                    00000000000000012345.raft       sidecar: every entry's index, term, position
//! ```
//!
//! Invariant: segments hold committed entries only, so they are written once and never cut. The log
//! and the sidecar are the truth; both indexes are hints that are checked and can be done without.

pub mod appender;
pub mod lookup;
pub mod offset_index;
pub mod open_files;
pub mod reader;
pub mod sidecar;
pub mod time_index;

use std::path::{Path, PathBuf};

use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

/// The files of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    Log,
    OffsetIndex,
    TimeIndex,
    Sidecar,
}

impl FileKind {
    pub const ALL: [FileKind; 4] = [
        FileKind::Log,
        FileKind::OffsetIndex,
        FileKind::TimeIndex,
        FileKind::Sidecar,
    ];

    fn extension(self) -> &'static str {
        match self {
            FileKind::Log => "log",
            FileKind::OffsetIndex => "index",
            FileKind::TimeIndex => "timeindex",
            FileKind::Sidecar => "raft",
        }
    }
}

/// What is known of a segment without reading it. Offsets, indexes and sizes are half-open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub base_offset: Offset,
    pub next_offset: Offset,
    pub first_index: u64,
    pub next_index: u64,
    pub log_bytes: u64,
    pub slots: u64,
    pub offset_index_entries: u64,
    pub time_index_entries: u64,
    /// Bytes of the log behind the last entry of the offset index.
    pub unindexed_bytes: u64,
    /// `i64::MIN` while there is no batch.
    pub max_timestamp: i64,
    /// Largest timestamp in the time index; `i64::MIN` while it is empty.
    pub indexed_timestamp: i64,
}

impl Segment {
    pub fn new(base_offset: Offset, first_index: u64) -> Self {
        Segment {
            base_offset,
            next_offset: base_offset,
            first_index,
            next_index: first_index,
            log_bytes: 0,
            slots: 0,
            offset_index_entries: 0,
            time_index_entries: 0,
            unindexed_bytes: 0,
            max_timestamp: i64::MIN,
            indexed_timestamp: i64::MIN,
        }
    }

    /// The size that a file of this segment has.
    pub fn file_bytes(&self, kind: FileKind) -> u64 {
        match kind {
            FileKind::Log => self.log_bytes,
            FileKind::OffsetIndex => self.offset_index_entries * offset_index::ENTRY_SIZE as u64,
            FileKind::TimeIndex => self.time_index_entries * time_index::ENTRY_SIZE as u64,
            FileKind::Sidecar => self.slots * sidecar::SLOT_SIZE as u64,
        }
    }
}

pub fn dir_of(partitions: &Path, group: RaftGroupId) -> PathBuf {
    partitions.join(group.0.to_string())
}

pub fn file_name(base_offset: Offset, kind: FileKind) -> String {
    format!("{:020}.{}", base_offset.0, kind.extension())
}

/// Base offset and kind in the name of a segment's file.
pub fn parse_file_name(name: &str) -> Option<(Offset, FileKind)> {
    let (digits, extension) = name.split_once('.')?;
    let kind = FileKind::ALL
        .into_iter()
        .find(|kind| kind.extension() == extension)?;
    (digits.len() == 20).then(|| Some((Offset(digits.parse().ok()?), kind)))?
}
