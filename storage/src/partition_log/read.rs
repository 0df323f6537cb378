//! Reading a log across its segments and its tail in memory.
//!
//! Invariant: the disk is never read under the log's lock. Between looking and reading the flusher
//! may move entries to segments, so each step looks again where the next entry lies.

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
    fn view(&self, segment: Segment) -> SegmentView<'_> {
        SegmentView {
            files: &self.core.files,
            group: self.group,
            segment,
        }
    }

    /// A read that failed because the log was deleted meanwhile says so.
    fn explain<T>(&self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        match result {
            Err(_) if self.lock().is_deleted => Err(StorageError::Deleted(self.group)),
            other => other,
        }
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
                if cursor < state.first_index {
                    return Err(StorageError::IndexOutOfRange {
                        index: cursor,
                        first_index: state.first_index,
                        next_index: state.next_index(),
                    });
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
            self.explain(view.read_entries(cursor, end, max_bytes, &mut size, &mut out))?;
            cursor = out.last().map_or(cursor, |entry| entry.index + 1);
            if cursor < end || size >= max_bytes {
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
        if range.start < state.tail_first && range.start < range.end.min(state.next_index()) {
            return None;
        }
        let mut size = 0;
        state.tail_entries(range, max_bytes, &mut size, &mut out);
        Some(out)
    }

    pub(super) fn offset_at(&self, index: u64) -> Result<Option<Offset>, StorageError> {
        let segment = {
            let state = self.lock();
            self.check_usable(&state)?;
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
        let found = self.explain(self.view(segment).slot_of_index(index))?;
        Ok(Some(found.1.next_offset))
    }

    pub(super) fn read(
        &self,
        from: Offset,
        limit: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, StorageError> {
        let mut collector = Collector::new(from, limit, max_bytes);
        self.visit(from, max_bytes, &mut |header, bytes| {
            collector.take(header, bytes)
        })?;
        Ok(collector.batches)
    }

    pub(super) fn read_cached(
        &self,
        from: Offset,
        limit: Offset,
        max_bytes: usize,
    ) -> Option<Vec<Bytes>> {
        let state = self.lock();
        let is_in_range = from >= state.log_start_offset() && from <= state.log_end_offset();
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
                let log_start_offset = state.log_start_offset();
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
            let view = self.view(segment);
            if self
                .explain(view.visit_batches(cursor, wanted_bytes, visit))?
                .is_break()
            {
                return Ok(());
            }
            cursor = segment.next_offset;
        }
    }

    pub(super) fn batch_for_timestamp(
        &self,
        timestamp_ms: i64,
        limit: Offset,
    ) -> Result<Option<Bytes>, StorageError> {
        let segment = {
            let state = self.lock();
            self.check_usable(&state)?;
            let mut segments = state.segments.iter();
            segments
                .find(|segment| segment.max_timestamp >= timestamp_ms)
                .copied()
        };
        let from = match segment {
            Some(segment) => self.view(segment).time_hint(timestamp_ms),
            None => {
                let state = self.lock();
                // Nothing in segments is young enough; copies of them in memory are not either.
                state
                    .segments
                    .last()
                    .map_or(state.tail_base, |segment| segment.next_offset)
            }
        };
        let mut found = None;
        self.visit(from, 0, &mut |header, bytes| {
            if header.next_offset() > limit {
                return ControlFlow::Break(());
            }
            if header.max_timestamp >= timestamp_ms {
                found = Some(bytes);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        Ok(found)
    }

    pub(super) fn max_timestamp_batch(&self, limit: Offset) -> Result<Option<Bytes>, StorageError> {
        let (segments, mut largest) = {
            let state = self.lock();
            self.check_usable(&state)?;
            let mut largest = i64::MIN;
            let _ = state.visit_tail(state.tail_base, &mut |header, _| {
                if header.next_offset() > limit {
                    return ControlFlow::Break(());
                }
                largest = largest.max(header.max_timestamp);
                ControlFlow::Continue(())
            });
            (state.segments.clone(), largest)
        };
        for segment in segments {
            if segment.base_offset < limit {
                let below = self.explain(self.view(segment).max_timestamp_below(limit))?;
                largest = largest.max(below);
            }
        }
        if largest == i64::MIN {
            return Ok(None);
        }
        self.batch_for_timestamp(largest, limit)
    }
}
