//! What a log consists of, for those who decide what may be deleted or compacted.

use chronik_types::offset::Offset;
use chronik_types::record_batch::batches;

use super::PartitionLog;
use super::state::LogState;
use crate::entry::Payload;
use crate::error::StorageError;
use crate::segment::Segment;

/// Whether a part of a log can still grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentState {
    Sealed,
    /// The segment that is written.
    Active,
    /// In the WAL and in memory only; a part of it may not be committed yet.
    Unflushed,
}

/// A part of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentInfo {
    pub state: SegmentState,
    pub base_offset: Offset,
    /// Offset after its last record.
    pub next_offset: Offset,
    pub first_index: u64,
    pub last_index: u64,
    pub first_term: u64,
    pub last_term: u64,
    /// Bytes of record batches.
    pub size_bytes: u64,
    /// Milliseconds since the Unix epoch, as the records say; `i64::MIN` if there are none.
    pub max_timestamp: i64,
    /// Largest timestamp of the first batch, which Kafka counts `segment.ms` from; `i64::MIN` if
    /// there is none.
    pub first_timestamp: i64,
    /// Wall clock here when the first and the last entry came (to the segment, if there is one).
    pub created_ms: i64,
    pub appended_ms: i64,
    pub is_compacted: bool,
}

impl PartitionLog {
    /// The parts of the log, oldest first, without gaps; the first one holds the log start, unless
    /// the log is empty.
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let state = self.log.lock();
        let infos = state.segments.iter().map(|segment| state.info(segment));
        let mut infos: Vec<_> = infos.collect();
        infos.extend(state.unflushed_info());
        infos
    }

    /// Moves all committed entries to segments and seals the last one. Waits for the disk.
    pub fn roll(&self) -> Result<(), StorageError> {
        self.log.core.poison.check()?;
        self.log.check_usable(&self.log.lock())?;
        self.log.core.signals.roll(self.log.clone())
    }
}

impl LogState {
    fn info(&self, segment: &Segment) -> SegmentInfo {
        let last_index = segment.next_index.saturating_sub(1);
        SegmentInfo {
            state: match segment.is_sealed {
                true => SegmentState::Sealed,
                false => SegmentState::Active,
            },
            base_offset: segment.base_offset,
            next_offset: segment.next_offset,
            first_index: segment.first_index,
            last_index,
            first_term: self.stored_term_at(segment.first_index),
            last_term: self.stored_term_at(last_index),
            size_bytes: segment.log_bytes,
            max_timestamp: segment.max_timestamp,
            first_timestamp: segment.first_timestamp,
            created_ms: segment.created_ms,
            appended_ms: segment.appended_ms,
            is_compacted: segment.is_compacted,
        }
    }

    fn unflushed_info(&self) -> Option<SegmentInfo> {
        let from = (self.flushed_next - self.tail_first) as usize;
        let (first, last) = (self.tail.get(from)?, self.tail.back()?);
        let mut info = SegmentInfo {
            state: SegmentState::Unflushed,
            base_offset: self.flushed_offset(),
            next_offset: last.next_offset,
            first_index: first.entry.index,
            last_index: last.entry.index,
            first_term: first.entry.term,
            last_term: last.entry.term,
            size_bytes: 0,
            max_timestamp: i64::MIN,
            first_timestamp: i64::MIN,
            created_ms: self.unflushed_since_ms,
            appended_ms: self.appended_ms,
            is_compacted: false,
        };
        for entry in self.tail.range(from..) {
            if let Payload::Batches { bytes, .. } = &entry.entry.payload {
                info.size_bytes += bytes.len() as u64;
                // The batches were checked when they were appended.
                for (_, header) in batches(bytes).flatten() {
                    if info.first_timestamp == i64::MIN {
                        info.first_timestamp = header.max_timestamp;
                    }
                    info.max_timestamp = info.max_timestamp.max(header.max_timestamp);
                }
            }
        }
        Some(info)
    }
}
