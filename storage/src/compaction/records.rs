//! The records inside a batch: read, filtered, and written again in the same compression.
//!
//! Invariant: a filtered batch has the offsets, sequence numbers, producer and epoch of the original,
//! and each record that is left has its own offset, time, key, value and headers. Any bytes give an
//! answer or an error, never a panic, and no more memory than `DECOMPRESSED_MAX`.

use std::io::{self, Read, Write};

use bytes::Bytes;
use chronik_types::record_batch::{
    BatchHeader, Compression, HEADER_SIZE, LENGTH_PREFIX_SIZE, crc32c,
};

/// Bytes of one batch's records, decompressed.
const DECOMPRESSED_MAX: u64 = 128 << 20;
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// How snappy-java frames blocks, which all clients read: magic, version, lowest version.
const XERIAL_MAGIC: [u8; 8] = [0x82, b'S', b'N', b'A', b'P', b'P', b'Y', 0];
const XERIAL_HEADER_SIZE: usize = 16;
const XERIAL_BLOCK_BYTES: usize = 32 << 10;
/// Fields of the header (Kafka protocol guide, "Record Batch").
const LENGTH_AT: usize = 8;
const CRC_AT: usize = 17;
const ATTRIBUTES_AT: usize = 21;
const BASE_TIMESTAMP_AT: usize = 27;
const MAX_TIMESTAMP_AT: usize = 35;
const COUNT_AT: usize = 57;
const COMPRESSION_MASK: i16 = 0x07;
const HAS_DELETE_HORIZON: i16 = 0x40;

/// One record of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    pub offset_delta: i32,
    pub key: Option<&'a [u8]>,
    /// None: a tombstone.
    pub value: Option<&'a [u8]>,
    timestamp_delta: i64,
    attributes: u8,
    /// The record as it is, its length included.
    raw: &'a [u8],
    /// From the key's length on.
    rest: &'a [u8],
}

/// What is left of a batch.
#[derive(Debug, PartialEq, Eq)]
pub enum Filtered {
    /// All of it, as it was.
    Whole,
    Part(Bytes),
    Nothing,
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The records' bytes of a batch that was checked, decompressed.
pub fn body_of(header: &BatchHeader, batch: &Bytes) -> io::Result<Bytes> {
    let body = batch.slice(HEADER_SIZE..header.size_bytes());
    match header.compression().map_err(invalid)? {
        Compression::None => Ok(body),
        compression => decompress(compression, &body).map(Bytes::from),
    }
}

/// The records in a batch's decompressed body.
pub fn records_of<'a>(header: &BatchHeader, body: &'a [u8]) -> io::Result<Vec<Record<'a>>> {
    let count = usize::try_from(header.record_count).map_err(invalid)?;
    // A record has seven bytes at least.
    let mut records = Vec::with_capacity(count.min(body.len() / 7));
    let mut left = body;
    for _ in 0..count {
        let record = next_record(&mut left).ok_or_else(|| invalid("a record is cut short"))?;
        if !(0..=header.last_offset_delta).contains(&record.offset_delta) {
            return Err(invalid("a record's offset is not in its batch"));
        }
        records.push(record);
    }
    if !left.is_empty() {
        return Err(invalid("the batch has more bytes than records"));
    }
    Ok(records)
}

/// Whether a batch of one transaction marker says that the transaction was aborted; `None` if it is
/// another control record.
pub fn is_abort(records: &[Record<'_>]) -> Option<bool> {
    // Version i16, type i16: 0 abort, 1 commit (Kafka protocol guide, "Control Batches").
    match records.first()?.key? {
        [_, _, 0, 0, ..] => Some(true),
        [_, _, 0, 1, ..] => Some(false),
        _ => None,
    }
}

/// Leaves the records out for which `keep` says no, and sets when what is left of tombstones and
/// markers may go (KIP-534).
pub fn filter(
    header: &BatchHeader,
    batch: &Bytes,
    records: &[Record<'_>],
    keep: &[bool],
    new_horizon: Option<i64>,
) -> io::Result<Filtered> {
    let kept = records.iter().zip(keep).filter(|(_, keep)| **keep);
    let kept: Vec<&Record<'_>> = kept.map(|(record, _)| record).collect();
    if kept.is_empty() {
        return Ok(Filtered::Nothing);
    }
    if kept.len() == records.len() && new_horizon.is_none() {
        return Ok(Filtered::Whole);
    }
    let base_timestamp = new_horizon.unwrap_or(header.base_timestamp);
    let mut body = Vec::new();
    let mut max_timestamp = i64::MIN;
    for record in &kept {
        let timestamp = header.base_timestamp.saturating_add(record.timestamp_delta);
        max_timestamp = max_timestamp.max(timestamp);
        match new_horizon {
            None => body.extend_from_slice(record.raw),
            Some(_) => record.encode(timestamp.wrapping_sub(base_timestamp), &mut body),
        }
    }
    if header.is_log_append_time() {
        max_timestamp = header.max_timestamp;
    }
    let compression = header.compression().map_err(invalid)?;
    let mut out = batch[..HEADER_SIZE].to_vec();
    compress(compression, &body, &mut out)?;
    put(&mut out, BASE_TIMESTAMP_AT, &base_timestamp.to_be_bytes());
    put(&mut out, MAX_TIMESTAMP_AT, &max_timestamp.to_be_bytes());
    let mut attributes = header.attributes;
    if new_horizon.is_some() {
        attributes |= HAS_DELETE_HORIZON;
    }
    finish(out, attributes, kept.len()).map(Filtered::Part)
}

/// The batch without records: it says only how far its producer has come.
pub fn emptied(header: &BatchHeader, batch: &Bytes) -> io::Result<Bytes> {
    let out = batch[..HEADER_SIZE].to_vec();
    finish(
        out,
        header.attributes & !(COMPRESSION_MASK | HAS_DELETE_HORIZON),
        0,
    )
}

fn finish(mut out: Vec<u8>, attributes: i16, count: usize) -> io::Result<Bytes> {
    let length = i32::try_from(out.len() - LENGTH_PREFIX_SIZE).map_err(invalid)?;
    let count = i32::try_from(count).map_err(invalid)?;
    put(&mut out, LENGTH_AT, &length.to_be_bytes());
    put(&mut out, ATTRIBUTES_AT, &attributes.to_be_bytes());
    put(&mut out, COUNT_AT, &count.to_be_bytes());
    let crc = crc32c(&out[ATTRIBUTES_AT..]);
    put(&mut out, CRC_AT, &crc.to_be_bytes());
    Ok(Bytes::from(out))
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

impl Record<'_> {
    fn encode(&self, timestamp_delta: i64, out: &mut Vec<u8>) {
        let mut head = vec![self.attributes];
        put_varint(&mut head, timestamp_delta);
        put_varint(&mut head, i64::from(self.offset_delta));
        put_varint(out, (head.len() + self.rest.len()) as i64);
        out.extend_from_slice(&head);
        out.extend_from_slice(self.rest);
    }
}

fn next_record<'a>(left: &mut &'a [u8]) -> Option<Record<'a>> {
    let start = *left;
    let length = usize::try_from(varint(left)?).ok()?;
    let body = take(left, length)?;
    let raw = &start[..start.len() - left.len()];
    let mut at = body;
    let attributes = take(&mut at, 1)?[0];
    let timestamp_delta = varint(&mut at)?;
    let offset_delta = i32::try_from(varint(&mut at)?).ok()?;
    let rest = at;
    let key = sized(&mut at)?;
    let value = sized(&mut at)?;
    Some(Record {
        offset_delta,
        key,
        value,
        timestamp_delta,
        attributes,
        raw,
        rest,
    })
}

/// Bytes with their length before them; a negative one means null.
fn sized<'a>(left: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    let length = varint(left)?;
    if length < 0 {
        return Some(None);
    }
    take(left, usize::try_from(length).ok()?).map(Some)
}

fn take<'a>(left: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = left.split_at_checked(count)?;
    *left = rest;
    Some(taken)
}

/// Zigzag, seven bits a byte, at most ten bytes.
fn varint(left: &mut &[u8]) -> Option<i64> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let byte = take(left, 1)?[0];
        value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Some((value >> 1) as i64 ^ -((value & 1) as i64));
        }
    }
    None
}

pub fn put_varint(out: &mut Vec<u8>, value: i64) {
    let mut left = (value << 1) as u64 ^ (value >> 63) as u64;
    while left >= 0x80 {
        out.push(left as u8 | 0x80);
        left >>= 7;
    }
    out.push(left as u8);
}

fn decompress(compression: Compression, body: &[u8]) -> io::Result<Vec<u8>> {
    let reader: Box<dyn Read + '_> = match compression {
        Compression::None => Box::new(body),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(body)),
        Compression::Snappy => return decompress_snappy(body),
        Compression::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(body)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(body)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    };
    let mut out = Vec::new();
    reader.take(DECOMPRESSED_MAX + 1).read_to_end(&mut out)?;
    if out.len() as u64 > DECOMPRESSED_MAX {
        return Err(invalid("the batch is too large when decompressed"));
    }
    Ok(out)
}

/// One raw block, or snappy-java's framing of several.
fn decompress_snappy(body: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut add = |block: &[u8]| -> io::Result<()> {
        let size = snap::raw::decompress_len(block).map_err(invalid)?;
        if (out.len() + size) as u64 > DECOMPRESSED_MAX {
            return Err(invalid("the batch is too large when decompressed"));
        }
        let from = out.len();
        out.resize(from + size, 0);
        let mut decoder = snap::raw::Decoder::new();
        decoder
            .decompress(block, &mut out[from..])
            .map_err(invalid)?;
        Ok(())
    };
    if !body.starts_with(&XERIAL_MAGIC) {
        add(body)?;
        return Ok(out);
    }
    let mut left = body.get(XERIAL_HEADER_SIZE..).unwrap_or_default();
    while !left.is_empty() {
        let ends_early = || invalid("snappy framing ends early");
        let size = take(&mut left, 4).ok_or_else(ends_early)?;
        let size = u32::from_be_bytes([size[0], size[1], size[2], size[3]]);
        add(take(&mut left, size as usize).ok_or_else(ends_early)?)?;
    }
    Ok(out)
}

fn compress(compression: Compression, body: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    match compression {
        Compression::None => out.extend_from_slice(body),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::default());
            encoder.write_all(body)?;
            encoder.finish()?;
        }
        Compression::Snappy => {
            out.extend_from_slice(&XERIAL_MAGIC);
            out.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1]);
            for block in body.chunks(XERIAL_BLOCK_BYTES) {
                let block = snap::raw::Encoder::new()
                    .compress_vec(block)
                    .map_err(invalid)?;
                out.extend_from_slice(&(block.len() as u32).to_be_bytes());
                out.extend_from_slice(&block);
            }
        }
        Compression::Lz4 => {
            // What Kafka's own clients write: independent blocks of 64 KiB.
            let info = lz4_flex::frame::FrameInfo::new()
                .block_size(lz4_flex::frame::BlockSize::Max64KB)
                .block_mode(lz4_flex::frame::BlockMode::Independent);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, out);
            encoder.write_all(body)?;
            encoder.finish().map_err(invalid)?;
        }
        Compression::Zstd => zstd::stream::copy_encode(body, out, 3)?,
    }
    Ok(())
}

#[cfg(test)]
#[path = "records_test.rs"]
mod tests;
