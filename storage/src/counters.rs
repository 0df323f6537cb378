//! What the storage has done since it was opened, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters that only rise.
#[derive(Debug, Default)]
pub struct Counters {
    pub flush_retries: AtomicU64,
    pub segments_deleted: AtomicU64,
    pub segment_bytes_deleted: AtomicU64,
    pub scrubbed_bytes: AtomicU64,
    pub scrub_passes: AtomicU64,
    pub compactions: AtomicU64,
    pub compaction_read_bytes: AtomicU64,
    pub compaction_written_bytes: AtomicU64,
}

impl Counters {
    pub fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }
}

/// How the storage is, and what it has done since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StorageStats {
    /// Of the disk; as of at most 100 ms ago.
    pub available_bytes: u64,
    pub total_bytes: u64,
    /// Records are refused when less than this is available.
    pub reserve_bytes: u64,
    pub is_full: bool,
    pub wal_files: u64,
    /// How often data stayed in memory because the disk had no room for it.
    pub flush_retries: u64,
    pub segments_deleted: u64,
    pub segment_bytes_deleted: u64,
    pub scrubbed_bytes: u64,
    /// How often all segments were looked through.
    pub scrub_passes: u64,
    pub damaged_logs: u64,
    pub compactions: u64,
    pub compaction_read_bytes: u64,
    pub compaction_written_bytes: u64,
}

impl StorageStats {
    pub fn of(counters: &Counters) -> StorageStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StorageStats {
            flush_retries: get(&counters.flush_retries),
            segments_deleted: get(&counters.segments_deleted),
            segment_bytes_deleted: get(&counters.segment_bytes_deleted),
            scrubbed_bytes: get(&counters.scrubbed_bytes),
            scrub_passes: get(&counters.scrub_passes),
            compactions: get(&counters.compactions),
            compaction_read_bytes: get(&counters.compaction_read_bytes),
            compaction_written_bytes: get(&counters.compaction_written_bytes),
            ..StorageStats::default()
        }
    }
}
