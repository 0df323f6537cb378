//! The Raft sidecar: one slot for every log entry, in order, and the bytes of membership and control
//! entries. In a compacted segment: one slot for every batch that is left.
//!
//! Invariant: slots have one size and rise in both index and next offset, so both can be searched by
//! `pread` without anything in memory. Every slot has its own checksum. A membership entry's bytes
//! follow in continuation slots, which repeat its index and next offset.
//!
//! ```text
//! compacted slot     index u64 | base_offset i64 | position u64 | next_offset i64 | as an entry's
//! entry slot         index u64 | term u64 | position u64   | next_offset i64 | max_timestamp i64 | kind, length u32 | leader epoch i32 | crc u32
//! continuation slot  index u64 | 16 bytes of payload       | next_offset i64 | 8 more bytes      | kind, length u32 | 0                | crc u32
//! ```

use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use chronik_types::record_batch::crc32c;

use crate::codec::Reader;
use crate::entry::{LogEntry, Payload};

pub const SLOT_SIZE: usize = 52;
const CRC_AT: usize = SLOT_SIZE - 4;
const CONTINUATION_BYTES: usize = 24;
/// Largest length a slot can say; also the largest entry the storage takes.
pub const LENGTH_MAX: u32 = (1 << KIND_SHIFT) - 1;
const KIND_SHIFT: u32 = 29;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    Blank,
    Membership,
    Batches,
    Continuation,
    /// One batch of a compacted segment; `term` is its base offset.
    Compacted,
    Control,
}

/// A slot's fields. Of a continuation only index, next offset, kind and length mean anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub index: u64,
    pub term: u64,
    /// Where the entry's batches start in the log; for other entries, where the next ones will.
    pub position: u64,
    /// Log end offset after the entry.
    pub next_offset: Offset,
    /// Of the entry's batches; `i64::MIN` for other entries.
    pub max_timestamp: i64,
    pub kind: SlotKind,
    /// Bytes of the entry's payload.
    pub length: u32,
    /// Of all the entry's batches; the batches' own checksums do not cover it. 0 in other entries.
    pub leader_epoch: LeaderEpoch,
}

impl Slot {
    /// Base offset of the batch in a compacted segment that this slot is about.
    pub fn compacted_base(&self) -> Offset {
        Offset(self.term.cast_signed())
    }
}

/// What the slot of an entry says beyond the entry itself.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub position: u64,
    pub next_offset: Offset,
    pub max_timestamp: i64,
    pub leader_epoch: LeaderEpoch,
}

/// Appends the slots of an entry and gives their number.
pub fn encode(out: &mut Vec<u8>, entry: &LogEntry, place: Place) -> u64 {
    let next_offset = place.next_offset;
    let kind = match &entry.payload {
        Payload::Blank => SlotKind::Blank,
        Payload::Membership(_) => SlotKind::Membership,
        Payload::Control(_) => SlotKind::Control,
        Payload::Batches { .. } => SlotKind::Batches,
    };
    let length = entry.payload.size_bytes() as u32;
    let mut slot = [0; SLOT_SIZE];
    slot[8..16].copy_from_slice(&entry.term.to_le_bytes());
    slot[16..24].copy_from_slice(&place.position.to_le_bytes());
    slot[32..40].copy_from_slice(&place.max_timestamp.to_le_bytes());
    slot[44..48].copy_from_slice(&place.leader_epoch.0.to_le_bytes());
    finish(out, slot, entry.index, next_offset, kind, length);
    let (Payload::Membership(bytes) | Payload::Control(bytes)) = &entry.payload else {
        return 1;
    };
    let mut count = 1;
    for part in bytes.chunks(CONTINUATION_BYTES) {
        let mut data = [0; CONTINUATION_BYTES];
        data[..part.len()].copy_from_slice(part);
        let mut slot = [0; SLOT_SIZE];
        slot[8..24].copy_from_slice(&data[..16]);
        slot[32..40].copy_from_slice(&data[16..]);
        finish(
            out,
            slot,
            entry.index,
            next_offset,
            SlotKind::Continuation,
            part.len() as u32,
        );
        count += 1;
    }
    count
}

/// Appends the slot of a batch in a compacted segment.
pub fn encode_compacted(out: &mut Vec<u8>, index: u64, base: Offset, place: Place, length: u32) {
    let mut slot = [0; SLOT_SIZE];
    slot[8..16].copy_from_slice(&base.0.to_le_bytes());
    slot[16..24].copy_from_slice(&place.position.to_le_bytes());
    slot[32..40].copy_from_slice(&place.max_timestamp.to_le_bytes());
    slot[44..48].copy_from_slice(&place.leader_epoch.0.to_le_bytes());
    let kind = SlotKind::Compacted;
    finish(out, slot, index, place.next_offset, kind, length);
}

fn finish(
    out: &mut Vec<u8>,
    mut slot: [u8; SLOT_SIZE],
    index: u64,
    next_offset: Offset,
    kind: SlotKind,
    length: u32,
) {
    slot[0..8].copy_from_slice(&index.to_le_bytes());
    slot[24..32].copy_from_slice(&next_offset.0.to_le_bytes());
    let word = (kind as u32) << KIND_SHIFT | length;
    slot[40..44].copy_from_slice(&word.to_le_bytes());
    let crc = crc32c(&slot[..CRC_AT]);
    slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&slot);
}

/// Reads one slot; `None` if its checksum or kind is wrong.
pub fn decode(bytes: &[u8]) -> Option<Slot> {
    let mut reader = Reader::new(bytes);
    let index = reader.u64()?;
    let term = reader.u64()?;
    let position = reader.u64()?;
    let next_offset = Offset(reader.i64()?);
    let max_timestamp = reader.i64()?;
    let word = reader.u32()?;
    let leader_epoch = LeaderEpoch(reader.u32()?.cast_signed());
    if crc32c(bytes.get(..CRC_AT)?) != reader.u32()? {
        return None;
    }
    let kind = match word >> KIND_SHIFT {
        0 => SlotKind::Blank,
        1 => SlotKind::Membership,
        2 => SlotKind::Batches,
        3 => SlotKind::Continuation,
        4 => SlotKind::Compacted,
        5 => SlotKind::Control,
        _ => return None,
    };
    let length = word & LENGTH_MAX;
    Some(Slot {
        index,
        term,
        position,
        next_offset,
        max_timestamp,
        kind,
        length,
        leader_epoch,
    })
}

/// The payload bytes in a continuation slot, which `decode` has accepted.
pub fn continuation_bytes(slot: &Slot, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut data = Vec::with_capacity(CONTINUATION_BYTES);
    data.extend_from_slice(bytes.get(8..24)?);
    data.extend_from_slice(bytes.get(32..40)?);
    data.truncate(slot.length as usize);
    (slot.kind == SlotKind::Continuation && data.len() == slot.length as usize).then_some(data)
}

/// How many continuation slots a membership entry of this length has.
pub fn continuations_of(length: u32) -> u64 {
    u64::from(length).div_ceil(CONTINUATION_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn slots_round_trip_and_flipped_bits_are_found() {
        let payload = Payload::Membership(Bytes::from(vec![7; 50]));
        let entry = LogEntry {
            index: 9,
            term: 3,
            payload,
        };
        let place = Place {
            position: 1000,
            next_offset: Offset(20),
            max_timestamp: 5,
            leader_epoch: LeaderEpoch(3),
        };
        let mut bytes = Vec::new();
        assert_eq!(encode(&mut bytes, &entry, place), 4);
        assert_eq!(bytes.len(), 4 * SLOT_SIZE);
        let slot = decode(&bytes[..SLOT_SIZE]).unwrap();
        assert_eq!(
            (slot.index, slot.term, slot.position, slot.length),
            (9, 3, 1000, 50)
        );
        assert_eq!(continuations_of(slot.length), 3);
        let mut data = Vec::new();
        for part in bytes[SLOT_SIZE..].chunks(SLOT_SIZE) {
            data.extend(continuation_bytes(&decode(part).unwrap(), part).unwrap());
        }
        assert_eq!(data, vec![7; 50]);
        for bit in 0..SLOT_SIZE * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bytes[..SLOT_SIZE]), None);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(decode(&[0; SLOT_SIZE]), None);
    }
}
