//! Reading a log across its segments and its tail in memory.
//!
//! Invariant: the disk is never read under the log's lock. Between looking and reading the flusher
//! may move entries to segments, and delete or replace segments, so each step looks again where the
//! next entry lies, and one that failed because its segment is gone is taken again.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use bytes::Bytes;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{BatchHeader, batches};

use super::Log;
use super::state::LogState;
use crate::entry::{LogEntry, Payload};
use crate::error::StorageError;
use crate::segment::Segment;
use crate::segment::lookup::SegmentView;

/// Collects batches up to a number of bytes, and at least one.
struct Collector {
    from: Offset,
    limit: Offset,
    max_bytes: usize,
    size: usize,
    batches: Vec<Bytes>,
}

impl Collector {
    fn new(from: Offset, limit: Offset, max_bytes: usize) -> Self {
        Collector {
            from,
            limit,
            max_bytes,
            size: 0,
            batches: Vec::new(),
        }
    }

    fn take(&mut self, header: &BatchHeader, bytes: Bytes) -> ControlFlow<()> {
        if header.next_offset() <= self.from {
            return ControlFlow::Continue(());
        }
        let size = self.size.saturating_add(bytes.len());
        let is_first = self.batches.is_empty();
        if header.next_offset() > self.limit || (!is_first && size > self.max_bytes) {
            return ControlFlow::Break(());
        }
        self.size = size;
        self.batches.push(bytes);
        ControlFlow::Continue(())
    }
}

impl LogState {
    /// Visits the batches in memory from the one that holds `from`.
    fn visit_tail(
        &self,
        from: Offset,
        visit: &mut dyn FnMut(&BatchHeader, Bytes) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        for entry in self.tail.range(self.tail_position_of(from)..) {
            let Payload::Batches { bytes, .. } = &entry.entry.payload else {
                continue;
            };
            // The batches were checked when they were appended.
            for (at, header) in batches(bytes).flatten() {
                if header.next_offset() > from {
                    visit(&header, bytes.slice(at..at + header.size_bytes()))?;
                }
            }
        }
        ControlFlow::Continue(())
    }

    fn segment_of_offset(&self, offset: Offset) -> Option<Segment> {
        let at = self
            .segments
            .partition_point(|segment| segment.next_offset <= offset);
        self.segments.get(at).copied()
    }

    fn segment_of_index(&self, index: u64) -> Option<Segment> {
        let at = self
            .segments
            .partition_point(|segment| segment.next_index <= index);
        self.segments.get(at).copied()
    }

    fn tail_entries(
        &self,
        range: Range<u64>,
        max_bytes: usize,
        size: &mut usize,
        out: &mut Vec<LogEntry>,
    ) {
        let from = (range.start.saturating_sub(self.tail_first) as usize).min(self.tail.len());
        let end = (range.end.saturating_sub(self.tail_first) as usize).clamp(from, self.tail.len());
        for entry in self.tail.range(from..end) {
            let next_size = size.saturating_add(entry.entry.payload.size_bytes());
            if !out.is_empty() && next_size > max_bytes {
                return;
            }
            *size = next_size;
            out.push(entry.entry.clone());
        }
    }
}

impl Log {
    pub fn view(&self, segment: Segment) -> SegmentView<'_> {
        SegmentView {
            files: &self.core.files,
            group: self.group,
            segment,
        }
    }

    /// What a failed read of a segment means: nothing (`None`) if the segment is gone meanwhile, else
    /// that the log is damaged, if the error says so.
    pub fn explain<T>(
        &self,
        segment: &Segment,
        result: Result<T, StorageError>,
    ) -> Result<Option<T>, StorageError> {
        let error = match result {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error,
        };
        let mut state = self.lock();
        self.check_usable(&state)?;
        if !state.segments.iter().any(|s| s.id() == segment.id()) {
            return Ok(None);
        }
        let is_new = state.note_damage(self.group, segment.id(), &error);
        drop(state);
        if is_new {
            self.core.damage.tell();
        }
        Err(error)
    }

    pub(super) fn read_entries(
        self: &Arc<Self>,
        range: Range<u64>,
        max_bytes: usize,
    ) -> Result<Vec<LogEntry>, StorageError> {
        let mut out = Vec::new();
        let mut size = 0;
        let mut cursor = range.start;
        loop {
            let (segment, end) = {
                let state = self.lock();
                self.check_usable(&state)?;
                let end = range.end.min(state.next_index());
                if cursor >= end {
                    return Ok(out);
                }
                if cursor < state.first_visible_index() {
                    if out.is_empty() {
                        return Err(self.index_out_of_range(&state, cursor));
                    }
                    return Ok(out);
                }
                if cursor >= state.tail_first {
                    state.tail_entries(cursor..end, max_bytes, &mut size, &mut out);
                    return Ok(out);
                }
                let segment = state.segment_of_index(cursor);
                (
                    segment.expect("entries below the tail are in segments"),
                    end,
                )
            };
            let end = end.min(segment.next_index);
            let view = self.view(segment);
            let read = view.read_entries(cursor, end, max_bytes, &mut size, &mut out);
            let is_gone = self.explain(&segment, read)?.is_none();
            cursor = out.last().map_or(cursor, |entry| entry.index + 1);
            if !is_gone && (cursor < end || size >= max_bytes) {
                return Ok(out);
            }
        }
    }

    pub(super) fn read_entries_cached(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> Option<Vec<LogEntry>> {
        let state = self.lock();
        let mut out = Vec::new();
        let first = state.tail_first.max(state.first_visible_index());
        if range.start < first && range.start < range.end.min(state.next_index()) {
            return None;
        }
        let mut size = 0;
        state.tail_entries(range, max_bytes, &mut size, &mut out);
        Some(out)
    }

    pub fn offset_at(&self, index: u64) -> Result<Option<Offset>, StorageError> {
        loop {
            let segment = {
                let state = self.lock();
                self.check_usable(&state)?;
                if let Some(purged) = state.purged.filter(|purged| index <= purged.index) {
                    return Ok((index == purged.index).then_some(purged.next_offset));
                }
                if let Some(entry) = state.get(index) {
                    return Ok(Some(entry.next_offset));
                }
                if index < state.first_index || index >= state.next_index() {
                    return Ok(None);
                }
                state
                    .segment_of_index(index)
                    .expect("entries below the tail are in segments")
            };
            let found = self.view(segment).slot_of_index(index);
            if let Some((_, slot)) = self.explain(&segment, found)? {
                return Ok(Some(slot.next_offset));
            }
        }
    }

    pub(super) fn index_of_offset(&self, offset: Offset) -> Result<Option<u64>, StorageError> {
        loop {
            let segment = {
                let state = self.lock();
                self.check_usable(&state)?;
                if offset < state.log_start || offset >= state.log_end_offset() {
                    return Ok(None);
                }
                if offset >= state.tail_base {
                    let at = state.tail_position_of(offset);
                    return Ok(state.tail.get(at).map(|entry| entry.entry.index));
                }
                state
                    .segment_of_offset(offset)
                    .expect("batches below the tail are in segments")
            };
            let found = self.view(segment).slot_holding(offset);
            if let Some(slot) = self.explain(&segment, found)? {
                return Ok(slot.map(|slot| slot.index));
            }
        }
    }

    pub(super) fn read(
        &self,
        from: Offset,
        limit: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, StorageError> {
        let mut collector = Collector::new(from, limit, max_bytes);
        let visited = self.visit(from, max_bytes, &mut |header, bytes| {
            collector.take(header, bytes)
        });
        match visited {
            // The log start passed what was read so far, and what was to come.
            Err(StorageError::OffsetOutOfRange { .. }) if !collector.batches.is_empty() => {}
            other => other?,
        }
        Ok(collector.batches)
    }

    pub(super) fn read_cached(
        &self,
        from: Offset,
        limit: Offset,
        max_bytes: usize,
    ) -> Option<Vec<Bytes>> {
        let state = self.lock();
        let is_in_range = from >= state.log_start && from <= state.log_end_offset();
        // What may be returned can lie wholly below the limit, and then nothing has to be read.
        if state.is_deleted || !is_in_range || (from < state.tail_base && from < limit) {
            return None;
        }
        let mut collector = Collector::new(from, limit, max_bytes);
        let _ = state.visit_tail(from, &mut |header, bytes| collector.take(header, bytes));
        Some(collector.batches)
    }

    /// Visits the batches of the log from the one that holds `from`, wherever they lie.
    fn visit(
        &self,
        from: Offset,
        wanted_bytes: usize,
        visit: &mut dyn FnMut(&BatchHeader, Bytes) -> ControlFlow<()>,
    ) -> Result<(), StorageError> {
        let mut cursor = from;
        loop {
            let segment = {
                let state = self.lock();
                self.check_usable(&state)?;
                let log_start_offset = state.log_start;
                let log_end_offset = state.log_end_offset();
                if cursor < log_start_offset || cursor > log_end_offset {
                    return Err(StorageError::OffsetOutOfRange {
                        offset: cursor,
                        log_start_offset,
                        log_end_offset,
                    });
                }
                if cursor >= state.tail_base {
                    let _ = state.visit_tail(cursor, visit);
                    return Ok(());
                }
                state
                    .segment_of_offset(cursor)
                    .expect("batches below the tail are in segments")
            };
            let from = cursor;
            let visited =
                self.view(segment)
                    .visit_batches(from, wanted_bytes, &mut |header, bytes| {
                        cursor = header.next_offset();
                        visit(header, bytes)
                    });
            match self.explain(&segment, visited)? {
                Some(ControlFlow::Break(())) => return Ok(()),
                Some(ControlFlow::Continue(())) => cursor = segment.next_offset,
                None => {}
            }
        }
    }

    pub(super) fn batch_for_timestamp(
        &self,
        from: Offset,
        timestamp_ms: i64,
        limit: Offset,
    ) -> Result<Option<Bytes>, StorageError> {
        loop {
            let (segment, first) = {
                let state = self.lock();
                self.check_usable(&state)?;
                let first = from.max(state.log_start);
                let mut segments = state.segments.iter();
                let is_candidate =
                    |s: &&Segment| s.next_offset > first && s.max_timestamp >= timestamp_ms;
                match segments.find(is_candidate) {
                    Some(segment) => (Some(*segment), first),
                    // Nothing in segments is young enough; copies of them in memory are not either.
                    None => (None, first.max(state.flushed_offset())),
                }
            };
            let hint = segment.map_or(first, |segment| self.view(segment).time_hint(timestamp_ms));
            let mut found = None;
            let visited = self.visit(hint.max(first), 0, &mut |header, bytes| {
                if header.next_offset() > limit {
                    return ControlFlow::Break(());
                }
                if header.max_timestamp >= timestamp_ms {
                    found = Some(bytes);
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            });
            match visited {
                // `from` is above the end, or the log start has just passed.
                Err(StorageError::OffsetOutOfRange {
                    log_start_offset, ..
                }) if log_start_offset <= first => return Ok(None),
                Err(StorageError::OffsetOutOfRange { .. }) => {}
                other => return other.map(|()| found),
            }
        }
    }

    pub(super) fn max_timestamp_batch(&self, limit: Offset) -> Result<Option<Bytes>, StorageError> {
        let (segments, log_start, mut largest) = {
            let state = self.lock();
            self.check_usable(&state)?;
            let mut largest = i64::MIN;
            let from = state.tail_base.max(state.log_start);
            let _ = state.visit_tail(from, &mut |header, _| {
                if header.next_offset() > limit {
                    return ControlFlow::Break(());
                }
                largest = largest.max(header.max_timestamp);
                ControlFlow::Continue(())
            });
            (state.segments.clone(), state.log_start, largest)
        };
        for segment in segments {
            if segment.base_offset < limit && segment.next_offset > log_start {
                let below = self.view(segment).max_timestamp_in(log_start, limit);
                // A segment that is gone meanwhile is below the log start, or was compacted.
                largest = largest.max(self.explain(&segment, below)?.unwrap_or(i64::MIN));
            }
        }
        if largest == i64::MIN {
            return Ok(None);
        }
        self.batch_for_timestamp(log_start, largest, limit)
    }
}
