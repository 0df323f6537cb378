//! Reads a whole segment and checks all of it: every slot of the sidecar, every batch, and each
//! against the other.
//!
//! Invariant: what passes is exactly what the segment's metadata says, without a byte left over.

use std::ops::ControlFlow;

use bytes::Bytes;
use chronik_types::offset::Offset;
use chronik_types::record_batch::BatchHeader;

use super::FileKind;
use super::lookup::SegmentView;
use super::reader::{LogBuffer, Slots};
use super::sidecar::{SLOT_SIZE, Slot, SlotKind};
use crate::error::StorageError;

/// Bytes read at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// Called after some bytes were read or written, to slow down; `Break` ends the work early.
pub type Pace<'a> = dyn FnMut(u64) -> ControlFlow<()> + 'a;

/// Takes a batch that was checked: its slot, header, position and bytes.
pub type Visit<'a> = dyn FnMut(&Slot, &BatchHeader, u64, &Bytes) -> Result<(), StorageError> + 'a;

/// Where the next entry has to be.
struct Expected {
    index: u64,
    position: u64,
    offset: Offset,
}

impl SegmentView<'_> {
    /// Checks all, and shows every batch. Gives `Break` if `pace` did.
    pub fn verify(
        &self,
        visit: &mut Visit<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<ControlFlow<()>, StorageError> {
        let mut log = self.log(CHUNK_BYTES);
        let mut slots = Slots::new(*self, 0);
        let mut expected = Expected {
            index: self.segment.first_index,
            position: 0,
            offset: self.segment.base_offset,
        };
        let mut unpaced = 0;
        while let Some((number, slot, _)) = slots.next()? {
            self.check_slot(number, &slot, &expected)?;
            match slot.kind {
                SlotKind::Batches => self.verify_entry(&mut log, &slot, &expected, visit)?,
                SlotKind::Compacted => {
                    let base = slot.compacted_base();
                    let (header, bytes) = log.batch(slot.position, base, &slot)?;
                    if bytes.len() != slot.length as usize
                        || header.next_offset() != slot.next_offset
                    {
                        return Err(self.wrong_slot(number, "the slot is not the batch's"));
                    }
                    visit(&slot, &header, slot.position, &bytes)?;
                }
                SlotKind::Membership | SlotKind::Control => {
                    slots.continuation(&slot)?;
                }
                SlotKind::Blank => {}
                SlotKind::Continuation => {
                    return Err(self.wrong_slot(number, "the slot is not one of an entry"));
                }
            }
            expected.offset = slot.next_offset;
            if matches!(slot.kind, SlotKind::Batches | SlotKind::Compacted) {
                expected.position += u64::from(slot.length);
                unpaced += u64::from(slot.length);
            }
            // Several batches of a compacted segment may be of one entry.
            expected.index = slot.index + u64::from(!self.segment.is_compacted);
            unpaced += SLOT_SIZE as u64;
            if unpaced >= CHUNK_BYTES as u64 {
                if pace(unpaced).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                unpaced = 0;
            }
        }
        self.check_end(&expected)?;
        Ok(pace(unpaced))
    }

    fn wrong_slot(&self, number: u64, why: &str) -> StorageError {
        self.corrupt(FileKind::Sidecar, number * SLOT_SIZE as u64, why)
    }

    fn check_slot(
        &self,
        number: u64,
        slot: &Slot,
        expected: &Expected,
    ) -> Result<(), StorageError> {
        let is_compacted = slot.kind == SlotKind::Compacted;
        if is_compacted != self.segment.is_compacted {
            return Err(self.wrong_slot(number, "the slot is of another kind of segment"));
        }
        let is_in_order = match is_compacted {
            true => slot.index >= expected.index && slot.index < self.segment.next_index,
            false => slot.index == expected.index,
        };
        if !is_in_order {
            return Err(self.wrong_slot(number, "entries are out of order"));
        }
        if slot.position != expected.position {
            return Err(self.wrong_slot(number, "the entry does not follow the one before"));
        }
        let base = if is_compacted {
            slot.compacted_base()
        } else {
            expected.offset
        };
        let rises = match slot.kind {
            SlotKind::Batches | SlotKind::Compacted => slot.next_offset > base,
            _ => slot.next_offset == base,
        };
        if base < expected.offset || !rises || slot.next_offset > self.segment.next_offset {
            return Err(self.wrong_slot(number, "offsets are out of order"));
        }
        Ok(())
    }

    fn verify_entry(
        &self,
        log: &mut LogBuffer<'_>,
        slot: &Slot,
        expected: &Expected,
        visit: &mut Visit<'_>,
    ) -> Result<(), StorageError> {
        let (mut position, mut offset) = (slot.position, expected.offset);
        let end = slot.position + u64::from(slot.length);
        while position < end {
            let (header, bytes) = log.batch(position, offset, slot)?;
            visit(slot, &header, position, &bytes)?;
            position += bytes.len() as u64;
            offset = header.next_offset();
        }
        if offset != slot.next_offset {
            let why = "the entry's batches end before its last offset";
            return Err(self.corrupt(FileKind::Log, slot.position, why));
        }
        Ok(())
    }

    fn check_end(&self, end: &Expected) -> Result<(), StorageError> {
        let segment = &self.segment;
        if end.position != segment.log_bytes {
            let why = "the segment has more bytes than entries";
            return Err(self.corrupt(FileKind::Log, end.position, why));
        }
        let is_whole = segment.is_compacted
            || (end.index == segment.next_index && end.offset == segment.next_offset);
        if !is_whole {
            return Err(self.wrong_slot(segment.slots, "the segment's last entries are missing"));
        }
        Ok(())
    }
}
