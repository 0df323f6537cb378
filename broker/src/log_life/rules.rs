//! Which records may go, and how far Raft may forget: pure rules, Apache Kafka's where it has one.
//!
//! Invariant: a log start offset that is decided here lies at the end of a segment, above the present
//! one and not above the high watermark.

use chronik_storage::{SegmentInfo, SegmentState};
use chronik_types::offset::Offset;

use crate::replica::LogConfig;

/// Where the log may start by retention.ms and retention.bytes; None: nothing may go.
pub fn retention_target(
    segments: &[SegmentInfo],
    config: &LogConfig,
    now_ms: i64,
    log_start_offset: Offset,
    high_watermark: Offset,
) -> Option<Offset> {
    if !config.deletes {
        return None;
    }
    // What lies below is gone already, and only waits for its deletion.
    let gone = segments.partition_point(|segment| segment.next_offset <= log_start_offset);
    let segments = &segments[gone..];
    let by_time = expired_by_time(segments, config.retention_ms, now_ms);
    let by_size = beyond_size(segments, config.retention_bytes);
    segments[..by_time.max(by_size)]
        .iter()
        .map(|segment| segment.next_offset)
        .take_while(|next| *next <= high_watermark)
        .last()
}

/// How many segments from the front hold nothing younger than `retention_ms`. A segment without
/// records has the age of its file.
fn expired_by_time(segments: &[SegmentInfo], retention_ms: i64, now_ms: i64) -> usize {
    if retention_ms < 0 {
        return 0;
    }
    let limit = now_ms.saturating_sub(retention_ms);
    let is_expired = |segment: &&SegmentInfo| {
        let newest = match segment.max_timestamp {
            i64::MIN => segment.appended_ms,
            timestamp => timestamp,
        };
        newest < limit
    };
    segments.iter().take_while(is_expired).count()
}

/// How many segments from the front may go while at least `retention_bytes` stay.
fn beyond_size(segments: &[SegmentInfo], retention_bytes: i64) -> usize {
    let Ok(keep) = u64::try_from(retention_bytes) else {
        return 0;
    };
    let total = segments
        .iter()
        .fold(0u64, |sum, segment| sum.saturating_add(segment.size_bytes));
    let mut surplus = total.saturating_sub(keep);
    let mut count = 0;
    for segment in segments {
        match surplus.checked_sub(segment.size_bytes) {
            Some(left) if total > keep => surplus = left,
            _ => break,
        }
        count += 1;
    }
    count
}

/// Whether the segment that grows is old enough to be sealed: segment.ms, and for compacted topics
/// also max.compaction.lag.ms, since only sealed segments are compacted.
pub fn is_roll_due(segments: &[SegmentInfo], config: &LogConfig, now_ms: i64) -> bool {
    let mut limit = config.segment_ms;
    if config.compacts {
        limit = limit.min(config.max_compaction_lag_ms);
    }
    let growing = segments
        .iter()
        .find(|segment| !matches!(segment.state, SegmentState::Sealed));
    growing.is_some_and(|segment| {
        segment.size_bytes > 0 && now_ms.saturating_sub(segment.created_ms) > limit
    })
}

/// How far Raft has to forget, so that segments below the log start can be deleted and sealed
/// segments of a compacted topic be compacted.
pub fn purge_need(
    segments: &[SegmentInfo],
    config: &LogConfig,
    log_start_offset: Offset,
) -> Option<u64> {
    let deleted = segments
        .iter()
        .take_while(|segment| segment.next_offset <= log_start_offset)
        .map(|segment| segment.last_index)
        .last();
    let compacted = segments
        .iter()
        .rev()
        .find(|segment| config.compacts && matches!(segment.state, SegmentState::Sealed))
        .map(|segment| segment.last_index);
    deleted.max(compacted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 60 * 60 * 1000;

    /// Segments of 100 records each: state, bytes, newest timestamp.
    fn segments(of: &[(SegmentState, u64, i64)]) -> Vec<SegmentInfo> {
        let mut base = 0;
        let mut out = Vec::new();
        for (state, size_bytes, max_timestamp) in of {
            out.push(SegmentInfo {
                state: *state,
                base_offset: Offset(base),
                next_offset: Offset(base + 100),
                first_index: 1 + base as u64,
                last_index: 100 + base as u64,
                first_term: 1,
                last_term: 1,
                size_bytes: *size_bytes,
                max_timestamp: *max_timestamp,
                first_timestamp: *max_timestamp,
                created_ms: *max_timestamp,
                appended_ms: *max_timestamp,
                is_compacted: false,
            });
            base += 100;
        }
        out
    }

    use SegmentState::{Active, Sealed, Unflushed};

    fn config(retention_ms: i64, retention_bytes: i64) -> LogConfig {
        LogConfig {
            deletes: true,
            retention_ms,
            retention_bytes,
            segment_ms: 7 * DAY,
            max_compaction_lag_ms: i64::MAX,
            ..LogConfig::default()
        }
    }

    #[test]
    fn segments_go_by_their_newest_record_and_from_the_front_only() {
        let now = 100 * DAY;
        let log = segments(&[
            (Sealed, 10, 90 * DAY),
            (Sealed, 10, 92 * DAY),
            (Sealed, 10, 99 * DAY),
            (Sealed, 10, 91 * DAY),
            (Active, 10, 100 * DAY),
        ]);
        let target = |config: LogConfig, start, hw| {
            retention_target(&log, &config, now, Offset(start), Offset(hw)).map(|o| o.0)
        };
        assert_eq!(target(config(7 * DAY, -1), 0, 500), Some(200));
        assert_eq!(target(config(7 * DAY, -1), 200, 500), None);
        assert_eq!(target(config(-1, -1), 0, 500), None);
        // Not above the high watermark.
        assert_eq!(target(config(0, -1), 0, 320), Some(300));
        let compacted = LogConfig {
            deletes: false,
            ..config(0, 0)
        };
        assert_eq!(target(compacted, 0, 500), None);
    }

    #[test]
    fn what_grows_may_expire_as_a_whole() {
        let log = segments(&[(Active, 10, DAY), (Unflushed, 10, DAY)]);
        let target = |hw| retention_target(&log, &config(DAY, -1), 9 * DAY, Offset(0), Offset(hw));
        assert_eq!(target(200), Some(Offset(200)));
        assert_eq!(target(150), Some(Offset(100)));
    }

    #[test]
    fn at_least_retention_bytes_stay() {
        let log = segments(&[(Sealed, 40, 1), (Sealed, 40, 2), (Active, 30, 3)]);
        let target = |bytes| {
            retention_target(&log, &config(-1, bytes), DAY, Offset(0), Offset(300)).map(|o| o.0)
        };
        assert_eq!(target(110), None);
        assert_eq!(target(71), None);
        assert_eq!(target(70), Some(100));
        assert_eq!(target(31), Some(100));
        assert_eq!(target(30), Some(200));
        assert_eq!(target(0), Some(300));
        assert_eq!(target(-1), None);
    }

    #[test]
    fn old_segments_are_sealed() {
        let log = segments(&[(Sealed, 10, 0), (Active, 10, DAY)]);
        let due = |config, now| is_roll_due(&log, &config, now);
        assert!(!due(config(-1, -1), 8 * DAY));
        assert!(due(config(-1, -1), 8 * DAY + 1));
        let compacted = LogConfig {
            compacts: true,
            max_compaction_lag_ms: DAY,
            ..config(-1, -1)
        };
        assert!(due(compacted, 2 * DAY + 1));
        let empty = segments(&[(Active, 0, 0)]);
        assert!(!is_roll_due(&empty, &config(-1, -1), 9 * DAY));
    }

    #[test]
    fn raft_forgets_what_is_deleted_and_what_is_to_be_compacted() {
        let log = segments(&[(Sealed, 10, 0), (Sealed, 10, 0), (Active, 10, 0)]);
        let compacted = LogConfig {
            compacts: true,
            ..config(-1, -1)
        };
        let need = |config, start| purge_need(&log, &config, Offset(start));
        assert_eq!(need(compacted, 0), Some(200));
        assert_eq!(need(compacted, 300), Some(300));
        assert_eq!(need(config(-1, -1), 99), None);
        assert_eq!(need(config(-1, -1), 100), Some(100));
        assert_eq!(need(config(-1, -1), 250), Some(200));
        assert_eq!(purge_need(&[], &compacted, Offset(0)), None);
    }
}
