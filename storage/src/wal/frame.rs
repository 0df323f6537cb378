//! A frame: the records of one group commit, written by one `pwritev` and covered by one checksum.
//!
//! Invariant: a frame is valid only in the file it was written for (file sequence), in its place
//! in the log (frame number), and in this storage: the checksum starts with the storage id, which no
//! client knows, so no record that a client sends can pass for a frame.

use crc_fast::{CrcAlgorithm, Digest};
use uuid::Uuid;

use crate::codec::Reader;

pub const MAGIC: [u8; 4] = *b"CWA\x01";
pub const HEADER_SIZE: usize = 40;
/// Where the checksum's coverage starts.
const CHECKED_FROM: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    pub file_sequence: u64,
    /// Counts frames over the whole life of the WAL, without gaps.
    pub frame_number: u64,
    /// Number of the first record in it; records are counted like frames.
    pub first_record: u64,
    pub body_size: u32,
    pub record_count: u32,
}

impl FrameHeader {
    /// The header's bytes with the checksum over them and `body`.
    pub fn encode<'a>(
        &self,
        storage_id: Uuid,
        body: impl Iterator<Item = &'a [u8]>,
    ) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.file_sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.frame_number.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.first_record.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.body_size.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.record_count.to_le_bytes());
        let crc = checksum(storage_id, &bytes, body);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header of the given file and gives its checksum with it; the body is yet to be
    /// checked.
    pub fn parse(bytes: &[u8], file_sequence: u64) -> Result<(FrameHeader, u32), &'static str> {
        const SHORT: &str = "the file ends within a frame's header";
        let mut reader = Reader::new(bytes);
        if reader.take(4).ok_or(SHORT)? != MAGIC {
            return Err("no frame starts here");
        }
        let crc = reader.u32().ok_or(SHORT)?;
        let header = FrameHeader {
            file_sequence: reader.u64().ok_or(SHORT)?,
            frame_number: reader.u64().ok_or(SHORT)?,
            first_record: reader.u64().ok_or(SHORT)?,
            body_size: reader.u32().ok_or(SHORT)?,
            record_count: reader.u32().ok_or(SHORT)?,
        };
        if header.file_sequence != file_sequence {
            return Err("the frame belongs to an earlier use of the file");
        }
        Ok((header, crc))
    }
}

/// Checksum over storage id, header and body.
pub fn checksum<'a>(
    storage_id: Uuid,
    header: &[u8; HEADER_SIZE],
    body: impl Iterator<Item = &'a [u8]>,
) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(storage_id.as_bytes());
    digest.update(&header[CHECKED_FROM..]);
    body.for_each(|part| digest.update(part));
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_know_their_storage() {
        let header = FrameHeader {
            file_sequence: 3,
            frame_number: 4,
            first_record: 5,
            body_size: 6,
            record_count: 7,
        };
        let id = Uuid::new_v4();
        let bytes = header.encode(id, [&b"abc"[..], b"def"].into_iter());
        let (parsed, crc) = FrameHeader::parse(&bytes, 3).unwrap();
        assert_eq!(parsed, header);
        assert_eq!(crc, checksum(id, &bytes, [&b"abcdef"[..]].into_iter()));
        assert_ne!(
            crc,
            checksum(Uuid::new_v4(), &bytes, [&b"abcdef"[..]].into_iter())
        );
        assert!(FrameHeader::parse(&bytes, 2).is_err());
        assert!(FrameHeader::parse(&bytes[..39], 3).is_err());
    }
}
