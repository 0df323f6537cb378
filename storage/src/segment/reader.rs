//! Reads entries and batches of one segment.
//!
//! Invariant: no byte is handed out unchecked: a batch's own checksum covers its records, its offset
//! must continue the one before, and its leader epoch must be the one in the sidecar.

use std::ops::ControlFlow;

use bytes::Bytes;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{BatchHeader, HEADER_SIZE, LENGTH_PREFIX_SIZE};

use super::lookup::SegmentView;
use super::sidecar::{self, SLOT_SIZE, Slot, SlotKind};
use super::{FileKind, Segment};
use crate::entry::{LogEntry, Payload};
use crate::error::StorageError;

const CHUNK_MIN_BYTES: usize = 16 << 10;
const CHUNK_MAX_BYTES: usize = 1 << 20;
const SLOTS_PER_READ: u64 = 128;

/// Reads the segment's log in large pieces.
pub struct LogBuffer<'a> {
    view: SegmentView<'a>,
    chunk: usize,
    bytes: Bytes,
    position: u64,
}

impl LogBuffer<'_> {
    /// `length` bytes of the log, which must lie in the segment.
    fn get(&mut self, position: u64, length: usize) -> Result<Bytes, StorageError> {
        let end = position.saturating_add(length as u64);
        if end > self.view.segment.log_bytes {
            return Err(self
                .view
                .corrupt(FileKind::Log, position, "a batch reaches past the end"));
        }
        let buffered_end = self.position + self.bytes.len() as u64;
        if position < self.position || end > buffered_end {
            let left = self.view.segment.log_bytes - position;
            let size = (self.chunk.max(length) as u64).min(left) as usize;
            let mut bytes = vec![0; size];
            self.view.read_exact(FileKind::Log, &mut bytes, position)?;
            self.bytes = Bytes::from(bytes);
            self.position = position;
        }
        let at = (position - self.position) as usize;
        Ok(self.bytes.slice(at..at + length))
    }

    /// The batch at `position`, checked against all that is known of it.
    pub fn batch(
        &mut self,
        position: u64,
        base_offset: Offset,
        slot: &Slot,
    ) -> Result<(BatchHeader, Bytes), StorageError> {
        let corrupt =
            |view: &SegmentView<'_>, why: &str| Err(view.corrupt(FileKind::Log, position, why));
        let head = self.get(position, HEADER_SIZE)?;
        let length = i32::from_be_bytes([head[8], head[9], head[10], head[11]]);
        let end = slot.position + u64::from(slot.length);
        let size = usize::try_from(length).unwrap_or(0) + LENGTH_PREFIX_SIZE;
        if position + size as u64 > end || size < HEADER_SIZE {
            return corrupt(&self.view, "the batch's length is wrong");
        }
        let bytes = self.get(position, size)?;
        let header = match BatchHeader::parse(&bytes) {
            Ok(header) => header,
            Err(error) => return corrupt(&self.view, &error.to_string()),
        };
        if let Err(error) = header.verify_crc(&bytes) {
            return corrupt(&self.view, &error.to_string());
        }
        if header.base_offset != base_offset || header.next_offset() > slot.next_offset {
            return corrupt(&self.view, "the batch's offset is wrong");
        }
        if header.leader_epoch != slot.leader_epoch {
            return corrupt(&self.view, "the batch's leader epoch is wrong");
        }
        Ok((header, bytes))
    }
}

impl<'a> SegmentView<'a> {
    pub fn log(&self, wanted_bytes: usize) -> LogBuffer<'a> {
        let chunk = wanted_bytes.clamp(CHUNK_MIN_BYTES, CHUNK_MAX_BYTES);
        LogBuffer {
            view: *self,
            chunk,
            bytes: Bytes::new(),
            position: 0,
        }
    }

    /// Visits the batches in order from the one that holds `from`.
    pub fn visit_batches(
        &self,
        from: Offset,
        wanted_bytes: usize,
        visit: &mut dyn FnMut(&BatchHeader, Bytes) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, StorageError> {
        if from >= self.segment.next_offset {
            return Ok(ControlFlow::Continue(()));
        }
        if self.segment.is_compacted {
            return self.visit_compacted(from, wanted_bytes, visit);
        }
        let mut log = self.log(wanted_bytes);
        let (mut number, mut slot) = self.slot_of_offset(from)?;
        let mut base_offset = match number {
            0 => self.segment.base_offset,
            _ => self.slot(number - 1)?.next_offset,
        };
        let mut position = slot.position;
        // Within a large entry the index leads further on than the entry's start.
        if let Some((offset, at)) = self.offset_hint(from)
            && offset > base_offset
            && at > position
            && at - position < u64::from(slot.length)
        {
            (base_offset, position) = (offset, at);
        }
        let mut slots = Slots::new(*self, number + 1);
        loop {
            // Other slots have no place in the log.
            let end = match slot.kind {
                SlotKind::Batches => slot.position + u64::from(slot.length),
                _ => position,
            };
            while position < end {
                let (header, bytes) = log.batch(position, base_offset, &slot)?;
                position += bytes.len() as u64;
                base_offset = header.next_offset();
                if base_offset > from && visit(&header, bytes).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            if base_offset != slot.next_offset {
                let why = "the entry's batches end before its last offset";
                return Err(self.corrupt(FileKind::Log, position, why));
            }
            match slots.next()? {
                Some((next_number, next, _)) => (number, slot) = (next_number, next),
                None => return Ok(ControlFlow::Continue(())),
            }
            if slot.kind == SlotKind::Batches && slot.position != position {
                let why = "the entry's batches do not follow the ones before";
                return Err(self.corrupt(FileKind::Sidecar, number * SLOT_SIZE as u64, why));
            }
        }
    }

    fn visit_compacted(
        &self,
        from: Offset,
        wanted_bytes: usize,
        visit: &mut dyn FnMut(&BatchHeader, Bytes) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, StorageError> {
        if self.segment.slots == 0 {
            return Ok(ControlFlow::Continue(()));
        }
        let mut log = self.log(wanted_bytes);
        let (first, _) = self.slot_of_offset(from)?;
        let mut slots = Slots::new(*self, first);
        while let Some((number, slot, _)) = slots.next()? {
            if slot.kind != SlotKind::Compacted {
                let position = number * SLOT_SIZE as u64;
                let why = "the slot is of another kind of segment";
                return Err(self.corrupt(FileKind::Sidecar, position, why));
            }
            let (header, bytes) = log.batch(slot.position, slot.compacted_base(), &slot)?;
            // The last batch may lie before what is looked for.
            if header.next_offset() > from && visit(&header, bytes).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Reads entries `index..end` into `out`, until it holds `max_bytes` and at least one entry.
    pub fn read_entries(
        &self,
        index: u64,
        end: u64,
        max_bytes: usize,
        size: &mut usize,
        out: &mut Vec<LogEntry>,
    ) -> Result<(), StorageError> {
        let mut log = self.log(max_bytes.saturating_sub(*size));
        let (number, _) = self.slot_of_index(index)?;
        let mut base_offset = match number {
            0 => self.segment.base_offset,
            _ => self.slot(number - 1)?.next_offset,
        };
        let mut slots = Slots::new(*self, number);
        let mut expected = index;
        while expected < end {
            let Some((number, slot, _)) = slots.next()? else {
                break;
            };
            if slot.index != expected {
                let position = number * SLOT_SIZE as u64;
                return Err(self.corrupt(FileKind::Sidecar, position, "entries are out of order"));
            }
            let next_size = size.saturating_add(slot.length as usize);
            if !out.is_empty() && next_size > max_bytes {
                break;
            }
            let payload = match slot.kind {
                SlotKind::Blank => Payload::Blank,
                SlotKind::Membership => Payload::Membership(slots.continuation(&slot)?),
                SlotKind::Control => Payload::Control(slots.continuation(&slot)?),
                SlotKind::Batches => self.entry_batches(&mut log, &slot, base_offset)?,
                SlotKind::Continuation | SlotKind::Compacted => {
                    let position = number * SLOT_SIZE as u64;
                    let why = "the slot is not one of an entry";
                    return Err(self.corrupt(FileKind::Sidecar, position, why));
                }
            };
            base_offset = slot.next_offset;
            out.push(LogEntry {
                index: slot.index,
                term: slot.term,
                payload,
            });
            *size = next_size;
            expected += 1;
        }
        Ok(())
    }

    fn entry_batches(
        &self,
        log: &mut LogBuffer<'_>,
        slot: &Slot,
        base_offset: Offset,
    ) -> Result<Payload, StorageError> {
        let bytes = log.get(slot.position, slot.length as usize)?;
        let (mut at, mut offset) = (0, base_offset);
        while at < bytes.len() {
            let (header, batch) = log.batch(slot.position + at as u64, offset, slot)?;
            at += batch.len();
            offset = header.next_offset();
        }
        if offset != slot.next_offset {
            let why = "the entry's batches end before its last offset";
            return Err(self.corrupt(FileKind::Log, slot.position, why));
        }
        Ok(Payload::Batches {
            bytes,
            base_offset,
            next_offset: offset,
        })
    }

    /// The largest timestamp of the batches that end above `from`, and at or below `limit`.
    pub fn max_timestamp_in(&self, from: Offset, limit: Offset) -> Result<i64, StorageError> {
        let Segment {
            base_offset,
            next_offset,
            max_timestamp,
            ..
        } = self.segment;
        if from <= base_offset && next_offset <= limit {
            return Ok(max_timestamp);
        }
        let mut largest = i64::MIN;
        let from = from.max(base_offset);
        let _ = self.visit_batches(from, CHUNK_MAX_BYTES, &mut |header, _| {
            if header.next_offset() > limit {
                return ControlFlow::Break(());
            }
            largest = largest.max(header.max_timestamp);
            ControlFlow::Continue(())
        })?;
        Ok(largest)
    }
}

/// Walks the slots in order, a read for many.
pub struct Slots<'a> {
    view: SegmentView<'a>,
    next: u64,
    bytes: Vec<u8>,
    /// Number of the first slot in `bytes`.
    first: u64,
}

impl<'a> Slots<'a> {
    pub fn new(view: SegmentView<'a>, next: u64) -> Self {
        Slots {
            view,
            next,
            bytes: Vec::new(),
            first: next,
        }
    }

    /// The next slot with its number and bytes.
    pub fn next(&mut self) -> Result<Option<(u64, Slot, [u8; SLOT_SIZE])>, StorageError> {
        if self.next >= self.view.segment.slots {
            return Ok(None);
        }
        let mut at = (self.next - self.first) as usize * SLOT_SIZE;
        if at >= self.bytes.len() {
            // The first read is small: most callers want a few entries only.
            let count = if self.bytes.is_empty() {
                8
            } else {
                SLOTS_PER_READ
            };
            self.bytes = self.view.slot_bytes(self.next, count)?;
            self.first = self.next;
            at = 0;
        }
        let mut bytes = [0; SLOT_SIZE];
        bytes.copy_from_slice(&self.bytes[at..at + SLOT_SIZE]);
        let slot = self.view.decode_slot(self.next, &bytes)?;
        self.next += 1;
        Ok(Some((self.next - 1, slot, bytes)))
    }

    /// The payload of a membership entry, from the slots behind its own.
    pub fn continuation(&mut self, slot: &Slot) -> Result<Bytes, StorageError> {
        let mut payload = Vec::new();
        for _ in 0..sidecar::continuations_of(slot.length) {
            let position = self.next * SLOT_SIZE as u64;
            let part = match self.next()? {
                Some((_, part, bytes)) if part.index == slot.index => {
                    sidecar::continuation_bytes(&part, &bytes)
                }
                _ => None,
            };
            let why = "a membership entry is cut short";
            let missing = || self.view.corrupt(FileKind::Sidecar, position, why);
            payload.extend(part.ok_or_else(missing)?);
        }
        if payload.len() != slot.length as usize {
            let position = self.next * SLOT_SIZE as u64;
            let why = "a membership entry has the wrong length";
            return Err(self.view.corrupt(FileKind::Sidecar, position, why));
        }
        Ok(Bytes::from(payload))
    }
}
