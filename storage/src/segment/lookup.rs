//! Finds an entry or a batch in a segment by binary search on its files.
//!
//! Invariant: the answer comes from checked slots; a hint from an index is only taken if its entry is
//! undamaged and lies within the entry that the sidecar names.

use std::io::ErrorKind;
use std::path::PathBuf;

use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

use super::open_files::OpenFiles;
use super::sidecar::{self, SLOT_SIZE, Slot};
use super::{FileKind, Segment, offset_index, time_index};
use crate::disk::{read_exact_at, read_full_at};
use crate::error::StorageError;

/// A segment of a log, for reading. The metadata is a snapshot, what lies behind it is ignored.
#[derive(Clone, Copy)]
pub struct SegmentView<'a> {
    pub files: &'a OpenFiles,
    pub group: RaftGroupId,
    pub segment: Segment,
}

impl SegmentView<'_> {
    pub fn path(&self, kind: FileKind) -> PathBuf {
        self.files.path(self.group, self.segment.id(), kind)
    }

    pub fn corrupt(&self, kind: FileKind, position: u64, why: &str) -> StorageError {
        StorageError::corrupt(&self.path(kind), position, why)
    }

    /// Reads exactly; an early end of the file is corruption, since the bytes were there once.
    pub fn read_exact(
        &self,
        kind: FileKind,
        buffer: &mut [u8],
        position: u64,
    ) -> Result<(), StorageError> {
        let file = self
            .files
            .open(self.group, self.segment.id(), kind, false)
            .map_err(|e| match e.kind() {
                ErrorKind::NotFound => self.corrupt(kind, position, "the file is missing"),
                _ => StorageError::io("cannot open", &self.path(kind), e),
            })?;
        read_exact_at(&*file, buffer, position).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => {
                self.corrupt(kind, position, "the file is shorter than it was")
            }
            // The medium cannot give back what it was given.
            _ if e.raw_os_error() == Some(libc::EIO) => {
                self.corrupt(kind, position, "the disk cannot read it")
            }
            _ => StorageError::io("cannot read", &self.path(kind), e),
        })
    }

    /// Slots `from..from + count` as they lie on disk, fewer at the segment's end.
    pub fn slot_bytes(&self, from: u64, count: u64) -> Result<Vec<u8>, StorageError> {
        let count = count.min(self.segment.slots.saturating_sub(from)) as usize;
        let mut bytes = vec![0; count * SLOT_SIZE];
        if count > 0 {
            self.read_exact(FileKind::Sidecar, &mut bytes, from * SLOT_SIZE as u64)?;
        }
        Ok(bytes)
    }

    pub fn decode_slot(&self, number: u64, bytes: &[u8]) -> Result<Slot, StorageError> {
        sidecar::decode(bytes).ok_or_else(|| {
            let position = number * SLOT_SIZE as u64;
            self.corrupt(FileKind::Sidecar, position, "the slot's checksum is wrong")
        })
    }

    pub fn slot(&self, number: u64) -> Result<Slot, StorageError> {
        if number >= self.segment.slots {
            let position = number * SLOT_SIZE as u64;
            return Err(self.corrupt(FileKind::Sidecar, position, "a slot is missing"));
        }
        self.decode_slot(number, &self.slot_bytes(number, 1)?)
    }

    /// The slot of entry `index`, which lies in this segment.
    pub fn slot_of_index(&self, index: u64) -> Result<(u64, Slot), StorageError> {
        // Without membership entries before it the slot is at this very number; each continuation
        // slot moves it on by one.
        let entries = self.segment.next_index - self.segment.first_index;
        let low = index.saturating_sub(self.segment.first_index);
        let high = low + self.segment.slots.saturating_sub(entries);
        let number = self.first_slot(low, high, |slot| slot.index >= index)?;
        let slot = self.slot(number)?;
        if slot.index != index {
            let position = number * SLOT_SIZE as u64;
            return Err(self.corrupt(FileKind::Sidecar, position, "the entry's slot is missing"));
        }
        Ok((number, slot))
    }

    /// The slot of the entry that holds `offset`, which lies in this segment.
    pub fn slot_of_offset(&self, offset: Offset) -> Result<(u64, Slot), StorageError> {
        let last = self.segment.slots.saturating_sub(1);
        let number = self.first_slot(0, last, |slot| slot.next_offset > offset)?;
        Ok((number, self.slot(number)?))
    }

    /// The slot of the entry that holds `offset`; `None` if no batch has it any more.
    pub fn slot_holding(&self, offset: Offset) -> Result<Option<Slot>, StorageError> {
        if self.segment.slots == 0 {
            return Ok(None);
        }
        let (_, slot) = self.slot_of_offset(offset)?;
        let is_left_out = self.segment.is_compacted
            && (slot.next_offset <= offset || slot.compacted_base() > offset);
        Ok((!is_left_out).then_some(slot))
    }

    /// The first slot of `low..high` that fulfils the condition, else `high`.
    fn first_slot(
        &self,
        mut low: u64,
        mut high: u64,
        is_reached: impl Fn(&Slot) -> bool,
    ) -> Result<u64, StorageError> {
        while low < high {
            let middle = low + (high - low) / 2;
            if is_reached(&self.slot(middle)?) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Ok(low)
    }

    /// Offset and position of a batch that starts at or below `offset`, from the offset index.
    pub fn offset_hint(&self, offset: Offset) -> Option<(Offset, u64)> {
        let relative = u32::try_from(offset.0.checked_sub(self.segment.base_offset.0)?).ok()?;
        let entry = self.last_index_entry(
            FileKind::OffsetIndex,
            self.segment.offset_index_entries,
            offset_index::ENTRY_SIZE,
            offset_index::decode,
            |(offset, _)| offset <= relative,
        )?;
        Some((
            self.segment.base_offset.plus(i64::from(entry.0)),
            u64::from(entry.1),
        ))
    }

    /// An offset below which no batch has a timestamp of `timestamp_ms` or later.
    pub fn time_hint(&self, timestamp_ms: i64) -> Offset {
        let entry = self.last_index_entry(
            FileKind::TimeIndex,
            self.segment.time_index_entries,
            time_index::ENTRY_SIZE,
            time_index::decode,
            |(timestamp, _)| timestamp < timestamp_ms,
        );
        self.segment
            .base_offset
            .plus(entry.map_or(0, |(_, offset)| i64::from(offset)))
    }

    /// The last entry of an index that fulfils the condition. `None` if there is none, or if the
    /// index cannot be used: it is only a hint.
    fn last_index_entry<T: Copy>(
        &self,
        kind: FileKind,
        count: u64,
        entry_size: usize,
        decode: impl Fn(&[u8]) -> Option<T>,
        is_below: impl Fn(T) -> bool,
    ) -> Option<T> {
        if count == 0 {
            return None;
        }
        let file = self
            .files
            .open(self.group, self.segment.id(), kind, false)
            .ok()?;
        let mut buffer = vec![0; entry_size];
        let (mut low, mut high) = (0, count);
        let mut best = None;
        while low < high {
            let middle = low + (high - low) / 2;
            if read_full_at(&*file, &mut buffer, middle * entry_size as u64).ok()? < entry_size {
                return None;
            }
            let entry = decode(&buffer)?;
            if is_below(entry) {
                best = Some(entry);
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        best
    }
}
