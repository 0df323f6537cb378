//! The sparse time index of a segment: which timestamps are reached before which offset.
//!
//! Invariant: an entry (t, o) says that no batch below offset o has a timestamp above t. Entries rise
//! in both fields and carry a checksum; without the index a lookup only reads more.

use chronik_types::record_batch::crc32c;

use crate::codec::Reader;

pub const ENTRY_SIZE: usize = 16;

/// `next_offset` counts from the segment's base offset.
pub fn encode(out: &mut Vec<u8>, max_timestamp: i64, next_offset: u32) {
    let mut entry = [0; ENTRY_SIZE];
    entry[0..8].copy_from_slice(&max_timestamp.to_le_bytes());
    entry[8..12].copy_from_slice(&next_offset.to_le_bytes());
    let crc = crc32c(&entry[..12]);
    entry[12..].copy_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&entry);
}

/// Timestamp and relative offset; `None` if the entry is damaged.
pub fn decode(bytes: &[u8]) -> Option<(i64, u32)> {
    let mut reader = Reader::new(bytes);
    let entry = (reader.i64()?, reader.u32()?);
    (crc32c(bytes.get(..12)?) == reader.u32()?).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_round_trip_and_zeroes_are_no_entry() {
        let mut bytes = Vec::new();
        encode(&mut bytes, -1, 77);
        assert_eq!(decode(&bytes), Some((-1, 77)));
        bytes[9] ^= 4;
        assert_eq!(decode(&bytes), None);
        assert_eq!(decode(&[0; ENTRY_SIZE]), None);
    }
}
