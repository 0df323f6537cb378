//! Makes the two sparse indexes of a segment while its batches go by.
//!
//! Invariant: the same batches always give the same indexes, whoever writes them.

use chronik_types::record_batch::BatchHeader;

use super::{Segment, offset_index, time_index};

/// Index entries that are not written yet.
#[derive(Debug, Default)]
pub struct Indexer {
    pub offset_index: Vec<u8>,
    pub time_index: Vec<u8>,
}

impl Indexer {
    /// Takes in the next batch, which lies at `position`, and counts it in `segment`.
    pub fn add(&mut self, segment: &mut Segment, header: &BatchHeader, position: u64) {
        if segment.unindexed_bytes >= offset_index::INTERVAL_BYTES {
            let offset = header.base_offset.0.saturating_sub(segment.base_offset.0);
            if let (Ok(offset), Ok(position)) = (u32::try_from(offset), u32::try_from(position)) {
                offset_index::encode(&mut self.offset_index, offset, position);
                segment.offset_index_entries += 1;
                segment.unindexed_bytes = 0;
                if segment.max_timestamp > segment.indexed_timestamp {
                    time_index::encode(&mut self.time_index, segment.max_timestamp, offset);
                    segment.time_index_entries += 1;
                    segment.indexed_timestamp = segment.max_timestamp;
                }
            }
        }
        segment.unindexed_bytes += header.size_bytes() as u64;
        if segment.first_timestamp == i64::MIN {
            segment.first_timestamp = header.max_timestamp;
        }
        segment.max_timestamp = segment.max_timestamp.max(header.max_timestamp);
        if let Some(horizon) = header.delete_horizon_ms() {
            segment.delete_horizon_ms = segment.delete_horizon_ms.min(horizon);
        }
    }

    pub fn clear(&mut self) {
        self.offset_index.clear();
        self.time_index.clear();
    }
}
