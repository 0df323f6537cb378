//! A compaction from start to end, on the caller's thread: passes over the log until it is clean.
//!
//! Invariant: each group of segments is replaced by one step; ending early, by choice or by a crash,
//! leaves a log that says the same as before and after.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use bytes::Bytes;
use chronik_types::id::ProducerId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::BatchHeader;

use super::keys::Learned;
use super::plan::CompactionSettings;
use super::records::Filtered;
use super::rewrite::{Retention, Writer};
use crate::counters::Counters;
use crate::error::StorageError;
use crate::partition_log::{Log, Origin, PartitionLog, Replacement};
use crate::segment::Segment;
use crate::segment::sidecar::Slot;
use crate::segment::verify::Pace;

/// Offsets and positions in a segment's indexes have 32 bits.
const SEGMENT_BYTES_MAX: u64 = 1 << 31;

/// What to compact, and how.
#[derive(Debug, Clone)]
pub struct CompactionRequest {
    pub settings: CompactionSettings,
    /// Milliseconds since the Unix epoch.
    pub now_ms: i64,
    /// Nothing at or above it is touched: the last stable offset, or the high watermark where there
    /// are no transactions.
    pub limit: Offset,
    /// Last offset of each producer that is remembered: its last batch stays, without records if need
    /// be.
    pub active_producers: HashMap<ProducerId, Offset>,
    /// Memory for the newest offset of each key.
    pub map_max_bytes: usize,
}

/// What a compaction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CompactionReport {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub segments_before: usize,
    pub segments_after: usize,
    pub records_removed: u64,
    /// All was done that could be done now.
    pub is_complete: bool,
}

/// While it lives no other compaction of the log runs.
struct Turn<'a>(&'a Log);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().is_compacting = false;
    }
}

impl PartitionLog {
    /// Compacts the log. Takes long and waits for the disk. `pace` is called with the bytes that were
    /// read or written since the last call; it may sleep, or break to end early. While another
    /// compaction of the log runs the report is empty.
    pub fn compact(
        &self,
        request: &CompactionRequest,
        pace: &mut Pace<'_>,
    ) -> Result<CompactionReport, StorageError> {
        let log = &self.log;
        log.core.poison.check()?;
        log.core.space.check(0)?;
        {
            let mut state = log.lock();
            log.check_usable(&state)?;
            if std::mem::replace(&mut state.is_compacting, true) {
                return Ok(CompactionReport::default());
            }
        }
        let _turn = Turn(log);
        log.core.announce_files()?;
        let mut run = Run {
            log,
            request,
            report: CompactionReport {
                segments_before: log.lock().segments.len(),
                ..CompactionReport::default()
            },
        };
        let result = run.passes(pace);
        let mut report = run.report;
        report.segments_after = log.lock().segments.len();
        let counters = &log.core.counters;
        Counters::add(&counters.compactions, 1);
        Counters::add(&counters.compaction_read_bytes, report.read_bytes);
        Counters::add(&counters.compaction_written_bytes, report.written_bytes);
        match result {
            // The log start has passed what was just being written.
            Ok(()) | Err(StorageError::Superseded) => Ok(report),
            Err(error) => {
                // A deleted log has no files to work on.
                log.check_usable(&log.lock())?;
                if error.is_out_of_room() {
                    log.core.space.found_no_room();
                }
                Err(error)
            }
        }
    }
}

struct Run<'a> {
    log: &'a std::sync::Arc<Log>,
    request: &'a CompactionRequest,
    report: CompactionReport,
}

impl Run<'_> {
    fn passes(&mut self, pace: &mut Pace<'_>) -> Result<(), StorageError> {
        let mut is_first = true;
        loop {
            let (segments, cleaned) = {
                let state = self.log.lock();
                self.log.check_usable(&state)?;
                let (settings, now) = (&self.request.settings, self.request.now_ms);
                let segments = state.cleanable(settings, now, self.request.limit);
                (segments, state.cleaned_offset)
            };
            let end = segments
                .last()
                .map_or(cleaned, |segment| segment.next_offset);
            let is_over = |s: &Segment| s.has_passed_horizon(self.request.now_ms);
            let has_work = end > cleaned || (is_first && segments.iter().any(is_over));
            if !has_work {
                self.report.is_complete = true;
                return Ok(());
            }
            let mut learned = Learned::new(cleaned, self.request.map_max_bytes);
            let read_bytes = &mut self.report.read_bytes;
            if learned
                .learn(self.log, &segments, read_bytes, pace)?
                .is_break()
            {
                return Ok(());
            }
            // A transaction that is open at the very start keeps all after it from being cleaned.
            if end > cleaned && learned.end <= cleaned {
                return Ok(());
            }
            if self.rewrite(&segments, &learned, pace)?.is_break() {
                return Ok(());
            }
            is_first = false;
        }
    }

    fn rewrite(
        &mut self,
        segments: &[Segment],
        learned: &Learned,
        pace: &mut Pace<'_>,
    ) -> Result<ControlFlow<()>, StorageError> {
        let wanted = segments.iter().filter(|s| s.base_offset < learned.end);
        let wanted: Vec<Segment> = wanted.copied().collect();
        let mut retention = Retention {
            learned,
            now_ms: self.request.now_ms,
            delete_retention_ms: self.request.settings.delete_retention_ms,
            active_producers: &self.request.active_producers,
            has_records: HashSet::new(),
            records_removed: 0,
        };
        let segment_bytes = self.log.lock().segment_bytes.min(SEGMENT_BYTES_MAX);
        let mut writer: Option<Writer<'_>> = None;
        for (at, segment) in wanted.iter().enumerate() {
            let mut group = match writer.take() {
                Some(writer) => writer,
                None => Writer::new(self.log, segment)?,
            };
            if self
                .segment(segment, &mut group, &mut retention, pace)?
                .is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
            let fits = wanted.get(at + 1).is_some_and(|next| {
                let bytes = group.segment.log_bytes.saturating_add(next.log_bytes);
                let width = next
                    .next_offset
                    .0
                    .saturating_sub(group.segment.base_offset.0);
                bytes <= segment_bytes && width <= i64::from(i32::MAX)
            });
            match fits {
                true => writer = Some(group),
                false => self.commit(group)?,
            }
        }
        self.report.records_removed += retention.records_removed;
        self.log.core.signals.replace(
            self.log.clone(),
            Replacement {
                old: Vec::new(),
                new: Vec::new(),
                cleaned_offset: learned.end,
                origin: Origin::Compaction,
            },
        )?;
        Ok(ControlFlow::Continue(()))
    }

    /// Adds what stays of one old segment to the group's new one.
    fn segment(
        &mut self,
        segment: &Segment,
        group: &mut Writer<'_>,
        retention: &mut Retention<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<ControlFlow<()>, StorageError> {
        let written = Cell::new(0);
        let log = self.log;
        let mut visit = |slot: &Slot, header: &BatchHeader, _: u64, batch: &Bytes| {
            let bytes = match retention.of(log, header, batch)? {
                Filtered::Whole => group.batch(slot, batch)?,
                Filtered::Part(batch) => {
                    group.is_changed = true;
                    group.batch(slot, &batch)?
                }
                Filtered::Nothing => {
                    group.is_changed = true;
                    0
                }
            };
            written.set(written.get() + bytes);
            Ok(())
        };
        let report = &mut self.report;
        let mut paced = |bytes: u64| {
            let written = written.take();
            report.read_bytes += bytes;
            report.written_bytes += written;
            pace(bytes.saturating_add(written))
        };
        let verified = log.view(*segment).verify(&mut visit, &mut paced);
        let flow = log
            .explain(segment, verified)?
            .ok_or(StorageError::Superseded)?;
        if flow.is_continue() {
            group.end_of(segment);
        }
        Ok(flow)
    }

    fn commit(&mut self, mut group: Writer<'_>) -> Result<(), StorageError> {
        // One segment that is as it was may as well stay.
        if !group.is_changed {
            return Ok(());
        }
        self.report.written_bytes += group.finish()?;
        let replacement = Replacement {
            old: group.old.clone(),
            new: vec![group.segment],
            cleaned_offset: Offset::ZERO,
            origin: Origin::Compaction,
        };
        let replaced = self.log.core.signals.replace(self.log.clone(), replacement);
        let is_refused = replaced
            .as_ref()
            .is_err_and(StorageError::is_refused_change);
        if !is_refused {
            // It is part of the log, or nobody knows before the next start.
            group.taken();
        }
        replaced
    }
}
