//! Records inside one batch: their timestamps for ListOffsets, their keys for compacted topics.
//!
//! Invariant: memory is bounded by `BLOCK_SIZE_MAX` and time by `DECOMPRESSED_SIZE_MAX`, whatever
//! the batch claims; any bytes give an answer or an error, never a panic.

use std::io::{self, Read};

use chronik_types::offset::Offset;
use chronik_types::record_batch::{BatchHeader, Compression, HEADER_SIZE};

/// Bytes of records looked at in one batch, decompressed.
const DECOMPRESSED_SIZE_MAX: u64 = 512 * 1024 * 1024;
/// Largest snappy block; zstd windows are bounded alike. Kafka's largest request, decompressed.
const BLOCK_SIZE_MAX: usize = 128 * 1024 * 1024;
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// How snappy-java marks its framing: magic, then two version numbers.
const XERIAL_MAGIC: [u8; 8] = [0x82, b'S', b'N', b'A', b'P', b'P', b'Y', 0];
const XERIAL_HEADER_SIZE: usize = 16;

/// A record's place in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordTime {
    pub offset: Offset,
    pub timestamp: i64,
}

/// The first record of `batch` for which `wanted` holds.
pub fn find_record(
    batch: &[u8],
    mut wanted: impl FnMut(RecordTime) -> bool,
) -> io::Result<Option<RecordTime>> {
    let header = BatchHeader::parse(batch).map_err(invalid)?;
    // With LogAppendTime all records have the batch's time; nothing needs to be decoded.
    if header.is_log_append_time() {
        let first = RecordTime {
            offset: header.base_offset,
            timestamp: header.max_timestamp,
        };
        return Ok(wanted(first).then_some(first));
    }
    let body = &batch[HEADER_SIZE..header.size_bytes()];
    let mut reader = RecordReader {
        source: decompress(header.compression(), body)?,
    };
    for _ in 0..header.record_count {
        let (timestamp_delta, offset_delta) = reader.next_record()?;
        let record = RecordTime {
            offset: header.base_offset.plus(offset_delta),
            timestamp: header.base_timestamp.saturating_add(timestamp_delta),
        };
        if wanted(record) {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn decompress<'a>(
    compression: Result<Compression, chronik_types::record_batch::InvalidBatch>,
    body: &'a [u8],
) -> io::Result<io::Take<Box<dyn Read + 'a>>> {
    let reader: Box<dyn Read + 'a> = match compression.map_err(invalid)? {
        Compression::None => Box::new(body),
        Compression::Gzip => Box::new(io::BufReader::new(flate2::read::MultiGzDecoder::new(body))),
        Compression::Snappy => Box::new(io::Cursor::new(decompress_snappy(body)?)),
        Compression::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(body)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(body)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(io::BufReader::new(decoder))
        }
    };
    Ok(reader.take(DECOMPRESSED_SIZE_MAX))
}

/// One raw snappy block, or snappy-java's framing of several.
fn decompress_snappy(body: &[u8]) -> io::Result<Vec<u8>> {
    let Some(mut blocks) = body.strip_prefix(&XERIAL_MAGIC[..]) else {
        return decompress_snappy_block(body, BLOCK_SIZE_MAX);
    };
    let versions_size = XERIAL_HEADER_SIZE - XERIAL_MAGIC.len();
    blocks = blocks
        .get(versions_size..)
        .ok_or_else(|| invalid("snappy framing ends early"))?;
    let mut out = Vec::new();
    while !blocks.is_empty() {
        let (size, rest) = blocks
            .split_first_chunk::<4>()
            .ok_or_else(|| invalid("snappy framing ends early"))?;
        let size = u32::from_be_bytes(*size) as usize;
        let block = rest
            .get(..size)
            .ok_or_else(|| invalid("snappy block ends early"))?;
        out.extend(decompress_snappy_block(block, BLOCK_SIZE_MAX - out.len())?);
        blocks = &rest[size..];
    }
    Ok(out)
}

fn decompress_snappy_block(block: &[u8], max: usize) -> io::Result<Vec<u8>> {
    let size = snap::raw::decompress_len(block).map_err(invalid)?;
    if size > max {
        return Err(invalid(format!("snappy block of {size} bytes")));
    }
    snap::raw::Decoder::new()
        .decompress_vec(block)
        .map_err(invalid)
}

struct RecordReader<'a> {
    source: io::Take<Box<dyn Read + 'a>>,
}

impl RecordReader<'_> {
    /// Timestamp and offset delta of the next record; the rest of it is skipped.
    fn next_record(&mut self) -> io::Result<(i64, i64)> {
        let length = self.varint()?;
        let length = u64::try_from(length).map_err(|_| invalid("record length is negative"))?;
        let before = self.source.limit();
        let mut attributes = [0];
        self.source.read_exact(&mut attributes)?;
        let timestamp_delta = self.varint()?;
        let offset_delta = self.varint()?;
        let read = before - self.source.limit();
        let rest = length
            .checked_sub(read)
            .ok_or_else(|| invalid("record is too short"))?;
        let skipped = io::copy(&mut Read::take(&mut self.source, rest), &mut io::sink())?;
        if skipped < rest {
            return Err(invalid("record ends early"));
        }
        Ok((timestamp_delta, offset_delta))
    }

    /// Zigzag, seven bits a byte, at most ten bytes.
    fn varint(&mut self) -> io::Result<i64> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let mut byte = [0];
            self.source.read_exact(&mut byte)?;
            let bits = u64::from(byte[0] & 0x7f);
            value |= bits.checked_shl(shift).unwrap_or(0);
            if byte[0] & 0x80 == 0 {
                return Ok((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        Err(invalid("number of more than ten bytes"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::replica::test_batches::{Spec, batch, put_varint, record_bytes, with_records};

    const RECORDS: [(i64, &[u8]); 4] = [
        (1_000, b"first"),
        (1_500, b"second"),
        (1_200, b"third"),
        (9_000, b"fourth"),
    ];

    fn at_or_after(batch: &[u8], timestamp: i64) -> Option<(i64, i64)> {
        find_record(batch, |r| r.timestamp >= timestamp)
            .unwrap()
            .map(|r| (r.offset.0, r.timestamp))
    }

    fn compressed(attributes: i16, body: &[u8]) -> Vec<u8> {
        let spec = Spec {
            attributes,
            record_count: RECORDS.len() as i32,
            base_timestamp: RECORDS[0].0,
            max_timestamp: 9_000,
            ..Spec::default()
        };
        batch(spec, body)
    }

    fn check(batch: &[u8]) {
        assert_eq!(at_or_after(batch, 0), Some((0, 1_000)));
        assert_eq!(at_or_after(batch, 1_001), Some((1, 1_500)));
        assert_eq!(at_or_after(batch, 1_501), Some((3, 9_000)));
        assert_eq!(at_or_after(batch, 9_001), None);
    }

    #[test]
    fn plain_records_are_found_by_time() {
        check(&with_records(&RECORDS));
    }

    #[test]
    fn every_compression_is_read() {
        let body = record_bytes(&RECORDS);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&body).unwrap();
        check(&compressed(1, &gzip.finish().unwrap()));

        let raw = snap::raw::Encoder::new().compress_vec(&body).unwrap();
        check(&compressed(2, &raw));

        let mut xerial = [&XERIAL_MAGIC[..], &[0, 0, 0, 1, 0, 0, 0, 1]].concat();
        for part in body.chunks(7) {
            let block = snap::raw::Encoder::new().compress_vec(part).unwrap();
            xerial.extend((block.len() as u32).to_be_bytes());
            xerial.extend(block);
        }
        check(&compressed(2, &xerial));

        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        lz4.write_all(&body).unwrap();
        check(&compressed(3, &lz4.finish().unwrap()));

        check(&compressed(
            4,
            &zstd::stream::encode_all(&body[..], 1).unwrap(),
        ));
    }

    #[test]
    fn log_append_time_is_the_whole_batch() {
        let mut bytes = with_records(&RECORDS);
        chronik_types::record_batch::stamp_log_append_time(&mut bytes, 77);
        assert_eq!(at_or_after(&bytes, 77), Some((0, 77)));
        assert_eq!(at_or_after(&bytes, 78), None);
    }

    #[test]
    fn a_snappy_block_that_claims_too_much_is_refused() {
        let mut claim = Vec::new();
        let mut rest = u64::from(u32::MAX);
        while rest >= 0x80 {
            claim.push((rest as u8 & 0x7f) | 0x80);
            rest >>= 7;
        }
        claim.push(rest as u8);
        assert!(find_record(&compressed(2, &claim), |_| true).is_err());
    }

    #[test]
    fn a_record_that_claims_too_much_is_refused() {
        let mut body = Vec::new();
        put_varint(&mut body, i64::MAX);
        body.extend([0, 0, 0]);
        assert!(find_record(&compressed(0, &body), |_| true).is_err());
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused(
            attributes in 0i16..8,
            body in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = find_record(&compressed(attributes, &body), |_| false);
        }
    }
}
