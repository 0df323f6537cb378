//! Segments: the committed part of a partition's log, in files named by their first offset.
//!
//! ```text
//! partitions/<group>/00000000000000012345.log        Kafka record batches v2, nothing else
//!                    00000000000000012345.index      sparse: offset -> position
//!                    00000000000000012345.timeindex  sparse: timestamp -> offset
//!                    00000000000000012345.raft       sidecar: every entry's index, term, position
//!                    00000000000000000000.3.log      the same of a segment that replaced others
//!                    4.copy                          what the files of an unfinished copy shall become
//! ```
//!
//! Invariant: segments hold committed entries only, so they are written once and never cut. The log
//! and the sidecar are the truth; both indexes are hints that are checked and can be done without.
//! No two segments of a log have the same base offset and generation.

pub mod appender;
pub mod indexer;
pub mod lookup;
pub mod offset_index;
pub mod open_files;
pub mod reader;
pub mod sidecar;
pub mod time_index;
pub mod verify;

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

/// Names a segment of a log, and its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId {
    pub base_offset: Offset,
    /// Tells files of one place apart: no two files of a group that may be on the disk together have one
    /// name. A segment that replaces others, or came from another broker, has a number of its own, so that
    /// it can be written beside them; what a log appends later keeps the last such number. A log begins
    /// with 0, or above what a log of its group that was deleted since the start has used.
    pub generation: u32,
}

/// What is known of a segment without reading it. Offsets, indexes and sizes are half-open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub base_offset: Offset,
    pub generation: u32,
    /// Nothing is added to it any more.
    pub is_sealed: bool,
    /// Records were removed by key: its slots are about batches, not entries, and leave out offsets.
    pub is_compacted: bool,
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
    /// Largest timestamp of its first batch; `i64::MIN` while there is none.
    pub first_timestamp: i64,
    /// Wall clock when its first and its last entry were written here, ms since the Unix epoch.
    pub created_ms: i64,
    pub appended_ms: i64,
    /// The earliest time at which a tombstone in it may go; `i64::MAX`: none has one yet.
    pub delete_horizon_ms: i64,
}

impl Segment {
    pub fn new(id: SegmentId, first_index: u64, now_ms: i64) -> Self {
        let SegmentId {
            base_offset,
            generation,
        } = id;
        Segment {
            base_offset,
            generation,
            is_sealed: false,
            is_compacted: false,
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
            first_timestamp: i64::MIN,
            created_ms: now_ms,
            appended_ms: now_ms,
            delete_horizon_ms: i64::MAX,
        }
    }

    /// Something in it has stayed for long enough only to be seen.
    pub fn has_passed_horizon(&self, now_ms: i64) -> bool {
        self.delete_horizon_ms != i64::MAX && self.delete_horizon_ms <= now_ms
    }

    pub fn id(&self) -> SegmentId {
        SegmentId {
            base_offset: self.base_offset,
            generation: self.generation,
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

/// The digits up to the first dot are the base offset, as Kafka's tools expect of any name.
pub fn file_name(id: SegmentId, kind: FileKind) -> String {
    let (base_offset, extension) = (id.base_offset.0, kind.extension());
    match id.generation {
        0 => format!("{base_offset:020}.{extension}"),
        generation => format!("{base_offset:020}.{generation}.{extension}"),
    }
}

/// Segment and kind in the name of a segment's file.
pub fn parse_file_name(name: &str) -> Option<(SegmentId, FileKind)> {
    let (digits, rest) = name.split_once('.')?;
    let (generation, extension) = match rest.split_once('.') {
        Some((generation, extension)) => (generation.parse().ok()?, extension),
        None => (0, rest),
    };
    let kind = FileKind::ALL
        .into_iter()
        .find(|kind| kind.extension() == extension)?;
    let base_offset = Offset((digits.len() == 20).then(|| digits.parse().ok())??);
    let id = SegmentId {
        base_offset,
        generation,
    };
    // Only the one way to write a name is a name.
    (file_name(id, kind) == name).then_some((id, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_round_trip_and_other_names_are_none() {
        for generation in [0, 1, 77] {
            for kind in FileKind::ALL {
                let id = SegmentId {
                    base_offset: Offset(12345),
                    generation,
                };
                assert_eq!(parse_file_name(&file_name(id, kind)), Some((id, kind)));
            }
        }
        for other in [
            "1.log",
            "lock",
            "00000000000000000001.0.log",
            "00000000000000000001.x.log",
        ] {
            assert_eq!(parse_file_name(other), None);
        }
    }
}
