//! Which segments may be compacted, and whether it is time to. Pure.
//!
//! Invariant: what is chosen is a prefix of the log, so that a key's records are always seen from the
//! oldest on.

use chronik_types::offset::Offset;

use crate::partition_log::PartitionLog;
use crate::partition_log::state::LogState;
use crate::segment::Segment;

/// A topic's settings; names and meaning are Apache Kafka's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CompactionSettings {
    /// `delete.retention.ms`: how long a tombstone stays after it was first compacted.
    pub delete_retention_ms: i64,
    /// `min.compaction.lag.ms`: younger records are left alone.
    pub min_compaction_lag_ms: i64,
    /// `max.compaction.lag.ms`: older records are compacted, however few there are.
    pub max_compaction_lag_ms: i64,
    /// `min.cleanable.dirty.ratio`: the share of not compacted bytes above which it pays.
    pub min_cleanable_dirty_ratio: f64,
}

/// Why a log should be compacted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompactionReason {
    DirtyRatio,
    MaxLag,
    /// Tombstones or markers have been seen for long enough.
    DeleteHorizon,
}

/// A log that should be compacted now. The one with the largest share of dirty bytes goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompactionDue {
    pub dirty_bytes: u64,
    pub total_bytes: u64,
    pub reason: CompactionReason,
}

impl PartitionLog {
    /// Whether the log should be compacted now (milliseconds since the Unix epoch).
    pub fn compaction_due(
        &self,
        settings: &CompactionSettings,
        now_ms: i64,
    ) -> Option<CompactionDue> {
        let state = self.log.lock();
        if state.is_deleted || state.is_compacting {
            return None;
        }
        let segments = state.cleanable(settings, now_ms, state.log_end_offset());
        due(&segments, state.cleaned_offset, settings, now_ms)
    }
}

impl LogState {
    /// The segments from the first on that may be compacted, up to offset `limit`.
    pub fn cleanable(
        &self,
        settings: &CompactionSettings,
        now_ms: i64,
        limit: Offset,
    ) -> Vec<Segment> {
        let purged_next = self.durable_purged.map_or(0, |purged| purged.index + 1);
        let young_from = now_ms.saturating_sub(settings.min_compaction_lag_ms);
        let may_be = |segment: &&Segment| {
            let is_old = settings.min_compaction_lag_ms <= 0 || segment.max_timestamp <= young_from;
            segment.is_sealed
                && segment.next_offset <= limit
                && segment.next_index <= purged_next
                && (is_old || segment.next_offset <= self.cleaned_offset)
        };
        self.segments.iter().take_while(may_be).copied().collect()
    }
}

fn due(
    segments: &[Segment],
    cleaned_offset: Offset,
    settings: &CompactionSettings,
    now_ms: i64,
) -> Option<CompactionDue> {
    let is_dirty = |segment: &&Segment| segment.next_offset > cleaned_offset;
    let dirty_bytes: u64 = segments.iter().filter(is_dirty).map(|s| s.log_bytes).sum();
    let total_bytes: u64 = segments.iter().map(|s| s.log_bytes).sum();
    let oldest = segments.iter().filter(is_dirty).map(|s| s.first_timestamp);
    let oldest = oldest.filter(|time| *time != i64::MIN).min();
    let is_late =
        oldest.is_some_and(|oldest| now_ms.saturating_sub(oldest) > settings.max_compaction_lag_ms);
    let is_over = segments.iter().any(|s| s.has_passed_horizon(now_ms));
    let share = dirty_bytes as f64 / total_bytes.max(1) as f64;
    let reason = if is_late {
        CompactionReason::MaxLag
    } else if dirty_bytes > 0 && share > settings.min_cleanable_dirty_ratio {
        CompactionReason::DirtyRatio
    } else if is_over {
        CompactionReason::DeleteHorizon
    } else {
        return None;
    };
    Some(CompactionDue {
        dirty_bytes,
        total_bytes,
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Purged;
    use crate::segment::SegmentId;

    fn segment(number: i64, time: i64) -> Segment {
        let id = SegmentId {
            base_offset: Offset(10 * number),
            generation: 0,
        };
        Segment {
            next_offset: Offset(10 * number + 10),
            next_index: 10 * number as u64 + 10,
            log_bytes: 1000,
            is_sealed: true,
            first_timestamp: time,
            max_timestamp: time + 9,
            ..Segment::new(id, 10 * number as u64, 0)
        }
    }

    const SETTINGS: CompactionSettings = CompactionSettings {
        delete_retention_ms: 100,
        min_compaction_lag_ms: 50,
        max_compaction_lag_ms: 1000,
        min_cleanable_dirty_ratio: 0.5,
    };

    #[test]
    fn only_sealed_old_purged_segments_below_the_limit_are_cleanable() {
        let purged = |index| {
            let (term, next_offset) = (1, Offset(0));
            Some(Purged {
                index,
                term,
                next_offset,
            })
        };
        let mut state = LogState {
            segments: (0..5).map(|i| segment(i, 100 * i)).collect(),
            durable_purged: purged(100),
            ..LogState::default()
        };
        let count =
            |state: &LogState, now, limit| state.cleanable(&SETTINGS, now, Offset(limit)).len();
        assert_eq!(count(&state, 10_000, 50), 5);
        assert_eq!(count(&state, 10_000, 49), 4);
        assert_eq!(count(&state, 209 + 50, 50), 3);
        assert_eq!(count(&state, 209 + 49, 50), 2);
        state.cleaned_offset = Offset(40);
        assert_eq!(count(&state, 0, 50), 4, "what is clean stays cleanable");
        state.durable_purged = purged(28);
        assert_eq!(count(&state, 10_000, 50), 2);
        state.segments[1].is_sealed = false;
        assert_eq!(count(&state, 10_000, 50), 1);
    }

    #[test]
    fn a_log_is_due_by_share_by_age_and_for_its_tombstones() {
        let mut segments: Vec<_> = (0..4).map(|i| segment(i, 100 * i)).collect();
        let reason = |segments: &[Segment], cleaned, now| {
            due(segments, Offset(cleaned), &SETTINGS, now).map(|due| due.reason)
        };
        assert_eq!(
            reason(&segments, 0, 500),
            Some(CompactionReason::DirtyRatio)
        );
        assert_eq!(
            reason(&segments, 10, 500),
            Some(CompactionReason::DirtyRatio)
        );
        assert_eq!(
            reason(&segments, 20, 500),
            None,
            "exactly half is not above half"
        );
        assert_eq!(reason(&segments, 20, 1201), Some(CompactionReason::MaxLag));
        assert_eq!(reason(&segments, 40, 1_000_000), None);
        segments[0].delete_horizon_ms = 600;
        assert_eq!(reason(&segments, 40, 599), None);
        assert_eq!(
            reason(&segments, 40, 600),
            Some(CompactionReason::DeleteHorizon)
        );
        assert_eq!(reason(&[], 0, 600), None);
    }
}
