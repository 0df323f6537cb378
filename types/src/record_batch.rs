//! The header of a Kafka record batch, format v2 (magic 2), read and stamped in place.
//!
//! Invariant: nothing after the header is ever decoded or copied here. The CRC-32C covers the bytes
//! from `attributes` to the end, so base offset and partition leader epoch may be stamped freely.
//!
//! Layout, big endian (Kafka protocol guide, "Record Batch"):
//!
//! ```text
//!  0 base_offset i64        17 crc u32              43 producer_id i64
//!  8 batch_length i32       21 attributes i16       51 producer_epoch i16
//! 12 leader_epoch i32       23 last_offset_delta i32 53 base_sequence i32
//! 16 magic i8               27 base_timestamp i64   57 record_count i32
//!                           35 max_timestamp i64    61 records
//! ```

use crate::epoch::{LeaderEpoch, ProducerEpoch};
use crate::id::ProducerId;
use crate::offset::Offset;

/// Bytes of a batch before its first record.
pub const HEADER_SIZE: usize = 61;
/// Bytes that `batch_length` does not count: base offset and itself.
pub const LENGTH_PREFIX_SIZE: usize = 12;
/// Where the CRC's coverage starts.
const CRC_START: usize = 21;
const MAGIC: i8 = 2;

/// Bits of `attributes`.
const COMPRESSION_MASK: i16 = 0x07;
const LOG_APPEND_TIME: i16 = 0x08;
const TRANSACTIONAL: i16 = 0x10;
const CONTROL: i16 = 0x20;
const HAS_DELETE_HORIZON: i16 = 0x40;

/// Why bytes are not a record batch that may be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBatch {
    #[error("record batch needs {needed} bytes, {available} are there")]
    Truncated { needed: usize, available: usize },
    #[error("record batch has magic {0}, only 2 is supported")]
    UnsupportedMagic(i8),
    #[error("record batch length {0} is out of range")]
    InvalidLength(i32),
    #[error("record batch checksum is {actual:#010x}, its header says {expected:#010x}")]
    ChecksumMismatch { expected: u32, actual: u32 },
    #[error("record batch has {record_count} records and last offset delta {last_offset_delta}")]
    InvalidRecordCount {
        record_count: i32,
        last_offset_delta: i32,
    },
    #[error("record batch has compression type {0}, which is not known")]
    UnknownCompression(i16),
}

/// How the records of a batch are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Snappy,
    Lz4,
    Zstd,
}

/// All header fields of one batch, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    pub base_offset: Offset,
    /// Bytes after the length field.
    pub batch_length: i32,
    pub leader_epoch: LeaderEpoch,
    pub crc: u32,
    pub attributes: i16,
    pub last_offset_delta: i32,
    /// Milliseconds since the Unix epoch; -1: none.
    pub base_timestamp: i64,
    /// Milliseconds since the Unix epoch; -1: none.
    pub max_timestamp: i64,
    /// -1 where the producer is not idempotent.
    pub producer_id: ProducerId,
    pub producer_epoch: ProducerEpoch,
    /// -1 where the producer is not idempotent.
    pub base_sequence: i32,
    pub record_count: i32,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

impl BatchHeader {
    /// Decodes the header at the front of `bytes` and checks that magic and length are sane and
    /// that the whole batch is there. Does not check the CRC.
    pub fn parse(bytes: &[u8]) -> Result<BatchHeader, InvalidBatch> {
        if bytes.len() < HEADER_SIZE {
            return Err(InvalidBatch::Truncated {
                needed: HEADER_SIZE,
                available: bytes.len(),
            });
        }
        let header = BatchHeader {
            base_offset: Offset(i64::from_be_bytes(array(bytes, 0))),
            batch_length: i32::from_be_bytes(array(bytes, 8)),
            leader_epoch: LeaderEpoch(i32::from_be_bytes(array(bytes, 12))),
            crc: u32::from_be_bytes(array(bytes, 17)),
            attributes: i16::from_be_bytes(array(bytes, 21)),
            last_offset_delta: i32::from_be_bytes(array(bytes, 23)),
            base_timestamp: i64::from_be_bytes(array(bytes, 27)),
            max_timestamp: i64::from_be_bytes(array(bytes, 35)),
            producer_id: ProducerId(i64::from_be_bytes(array(bytes, 43))),
            producer_epoch: ProducerEpoch(i16::from_be_bytes(array(bytes, 51))),
            base_sequence: i32::from_be_bytes(array(bytes, 53)),
            record_count: i32::from_be_bytes(array(bytes, 57)),
        };
        let magic = i8::from_be_bytes(array(bytes, 16));
        if magic != MAGIC {
            return Err(InvalidBatch::UnsupportedMagic(magic));
        }
        if header.batch_length < (HEADER_SIZE - LENGTH_PREFIX_SIZE) as i32 {
            return Err(InvalidBatch::InvalidLength(header.batch_length));
        }
        let needed = header.size_bytes();
        if bytes.len() < needed {
            return Err(InvalidBatch::Truncated {
                needed,
                available: bytes.len(),
            });
        }
        Ok(header)
    }

    /// Bytes of the whole batch, header included.
    pub fn size_bytes(&self) -> usize {
        self.batch_length as usize + LENGTH_PREFIX_SIZE
    }

    /// Checks the CRC-32C of the batch at the front of `bytes`, which this header came from.
    pub fn verify_crc(&self, bytes: &[u8]) -> Result<(), InvalidBatch> {
        let actual = crc32c(&bytes[CRC_START..self.size_bytes()]);
        if actual == self.crc {
            Ok(())
        } else {
            Err(InvalidBatch::ChecksumMismatch {
                expected: self.crc,
                actual,
            })
        }
    }

    /// Checks what a producer may send: at least one record, offsets without gaps, and a known
    /// compression type.
    pub fn verify_from_producer(&self) -> Result<(), InvalidBatch> {
        if self.record_count <= 0 || self.last_offset_delta != self.record_count - 1 {
            return Err(InvalidBatch::InvalidRecordCount {
                record_count: self.record_count,
                last_offset_delta: self.last_offset_delta,
            });
        }
        self.compression().map(|_| ())
    }

    pub fn compression(&self) -> Result<Compression, InvalidBatch> {
        match self.attributes & COMPRESSION_MASK {
            0 => Ok(Compression::None),
            1 => Ok(Compression::Gzip),
            2 => Ok(Compression::Snappy),
            3 => Ok(Compression::Lz4),
            4 => Ok(Compression::Zstd),
            other => Err(InvalidBatch::UnknownCompression(other)),
        }
    }

    pub fn is_log_append_time(&self) -> bool {
        self.attributes & LOG_APPEND_TIME != 0
    }

    pub fn is_transactional(&self) -> bool {
        self.attributes & TRANSACTIONAL != 0
    }

    /// A batch of transaction markers, which consumers never see.
    pub fn is_control(&self) -> bool {
        self.attributes & CONTROL != 0
    }

    /// When the tombstones or markers in this batch may go: compaction writes it in the place of the
    /// base timestamp (KIP-534).
    pub fn delete_horizon_ms(&self) -> Option<i64> {
        (self.attributes & HAS_DELETE_HORIZON != 0).then_some(self.base_timestamp)
    }

    pub fn is_idempotent(&self) -> bool {
        self.producer_id.0 >= 0
    }

    /// Offset of the last record.
    pub fn last_offset(&self) -> Offset {
        self.base_offset.plus(i64::from(self.last_offset_delta))
    }

    /// Offset after the last record.
    pub fn next_offset(&self) -> Offset {
        self.last_offset().plus(1)
    }

    /// Sequence number of the last record; wraps at `i32::MAX` to 0 (KIP-98).
    pub fn last_sequence(&self) -> i32 {
        sequence_plus(self.base_sequence, self.last_offset_delta)
    }
}

/// Sequence numbers run from 0 to `i32::MAX` and start again (KIP-98).
pub fn sequence_plus(sequence: i32, delta: i32) -> i32 {
    (i64::from(sequence) + i64::from(delta)).rem_euclid(i64::from(i32::MAX) + 1) as i32
}

/// Writes offset and leader epoch into the batch at the front of `bytes`; the CRC stays valid.
/// The caller has parsed the batch.
pub fn stamp(bytes: &mut [u8], base_offset: Offset, leader_epoch: LeaderEpoch) {
    bytes[0..8].copy_from_slice(&base_offset.0.to_be_bytes());
    bytes[12..16].copy_from_slice(&leader_epoch.0.to_be_bytes());
}

/// Sets the batch to `LogAppendTime` with one timestamp for all its records, and renews the CRC.
/// The caller has parsed the batch; `bytes` is exactly one batch.
pub fn stamp_log_append_time(bytes: &mut [u8], timestamp_ms: i64) {
    let attributes = i16::from_be_bytes(array(bytes, 21)) | LOG_APPEND_TIME;
    bytes[21..23].copy_from_slice(&attributes.to_be_bytes());
    bytes[35..43].copy_from_slice(&timestamp_ms.to_be_bytes());
    let crc = crc32c(&bytes[CRC_START..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
}

/// CRC-32C (Castagnoli), as Kafka and the WAL use it.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Headers of the batches that lie back to back in `bytes`, with each batch's position.
/// Stops after the first error.
pub fn batches(bytes: &[u8]) -> impl Iterator<Item = Result<(usize, BatchHeader), InvalidBatch>> {
    let mut position = 0;
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed || position >= bytes.len() {
            return None;
        }
        match BatchHeader::parse(&bytes[position..]) {
            Ok(header) => {
                let at = position;
                position += header.size_bytes();
                Some(Ok((at, header)))
            }
            Err(error) => {
                failed = true;
                Some(Err(error))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch(record_count: i32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE];
        bytes.extend_from_slice(body);
        let length = (bytes.len() - LENGTH_PREFIX_SIZE) as i32;
        bytes[8..12].copy_from_slice(&length.to_be_bytes());
        bytes[16] = 2;
        bytes[23..27].copy_from_slice(&(record_count - 1).to_be_bytes());
        bytes[43..51].copy_from_slice(&(-1i64).to_be_bytes());
        bytes[57..61].copy_from_slice(&record_count.to_be_bytes());
        let crc = crc32c(&bytes[CRC_START..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
        bytes
    }

    #[test]
    fn crc_is_castagnoli() {
        // RFC 3720, B.4: 32 bytes of zeroes.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn stamping_keeps_the_crc_valid() {
        let mut bytes = batch(3, b"records");
        stamp(&mut bytes, Offset(42), LeaderEpoch(7));
        let header = BatchHeader::parse(&bytes).unwrap();
        assert_eq!(header.verify_crc(&bytes), Ok(()));
        assert_eq!(
            (header.base_offset, header.leader_epoch),
            (Offset(42), LeaderEpoch(7))
        );
        assert_eq!(header.next_offset(), Offset(45));
    }

    #[test]
    fn log_append_time_renews_the_crc() {
        let mut bytes = batch(1, b"records");
        stamp_log_append_time(&mut bytes, 1234);
        let header = BatchHeader::parse(&bytes).unwrap();
        assert_eq!(header.verify_crc(&bytes), Ok(()));
        assert!(header.is_log_append_time());
        assert_eq!(header.max_timestamp, 1234);
    }

    #[test]
    fn batches_lie_back_to_back() {
        let bytes = [batch(1, b"a"), batch(2, b"bb")].concat();
        let positions: Vec<_> = batches(&bytes).map(|b| b.unwrap().0).collect();
        assert_eq!(positions, vec![0, HEADER_SIZE + 1]);
    }

    #[test]
    fn sequences_wrap_to_zero() {
        assert_eq!(sequence_plus(i32::MAX, 1), 0);
        assert_eq!(sequence_plus(5, 2), 7);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            for (at, header) in batches(&bytes).flatten() {
                let _ = header.verify_crc(&bytes[at..]);
                let _ = header.verify_from_producer();
                let _ = (header.next_offset(), header.last_sequence());
            }
        }

        #[test]
        fn a_flipped_bit_under_the_crc_is_found(bit in 0usize..8 * 40) {
            let mut bytes = batch(1, &[7; 40]);
            let at = CRC_START + bit / 8;
            bytes[at] ^= 1 << (bit % 8);
            if let Ok(header) = BatchHeader::parse(&bytes) {
                prop_assert!(header.verify_crc(&bytes).is_err());
            }
        }
    }
}
