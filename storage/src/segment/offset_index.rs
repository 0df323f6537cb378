//! The sparse offset index of a segment: for a batch every few KiB, where it starts.
//!
//! Invariant: entries rise in both fields and carry a checksum. The index is a hint: a damaged entry
//! is noticed, and the sidecar is searched instead.

use chronik_types::record_batch::crc32c;

use crate::codec::Reader;

pub const ENTRY_SIZE: usize = 12;
/// Bytes of log from one index entry to the next, at least.
pub const INTERVAL_BYTES: u64 = 4096;

/// `offset` counts from the segment's base offset.
pub fn encode(out: &mut Vec<u8>, offset: u32, position: u32) {
    let mut entry = [0; ENTRY_SIZE];
    entry[0..4].copy_from_slice(&offset.to_le_bytes());
    entry[4..8].copy_from_slice(&position.to_le_bytes());
    let crc = crc32c(&entry[..8]);
    entry[8..].copy_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&entry);
}

/// Relative offset and position; `None` if the entry is damaged.
pub fn decode(bytes: &[u8]) -> Option<(u32, u32)> {
    let mut reader = Reader::new(bytes);
    let entry = (reader.u32()?, reader.u32()?);
    (crc32c(bytes.get(..8)?) == reader.u32()?).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_round_trip_and_zeroes_are_no_entry() {
        let mut bytes = Vec::new();
        encode(&mut bytes, 5, 4096);
        assert_eq!(decode(&bytes), Some((5, 4096)));
        bytes[2] ^= 1;
        assert_eq!(decode(&bytes), None);
        assert_eq!(decode(&[0; ENTRY_SIZE]), None);
    }
}
