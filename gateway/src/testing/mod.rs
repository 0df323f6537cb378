//! Helpers shared by this crate's tests.

mod fakes;
mod gateway_test;
mod kafka_client;

use bytes::{BufMut, Bytes, BytesMut};
use chronik_types::record_batch::{HEADER_SIZE, LENGTH_PREFIX_SIZE, crc32c};

/// A batch of one uncompressed record with the value "v" and the given headers.
pub fn batch_with_headers(headers: &[(&str, &str)]) -> Bytes {
    let mut record = vec![0, 0, 0, 1, 2, b'v'];
    varint(&mut record, headers.len());
    for (key, value) in headers {
        varint(&mut record, key.len());
        record.extend_from_slice(key.as_bytes());
        varint(&mut record, value.len());
        record.extend_from_slice(value.as_bytes());
    }
    let mut body = Vec::new();
    varint(&mut body, record.len());
    body.extend_from_slice(&record);
    batch(&body)
}

/// A batch that says it holds one record, with any bytes as that record.
pub fn batch(body: &[u8]) -> Bytes {
    let mut bytes = BytesMut::zeroed(HEADER_SIZE);
    bytes.put_slice(body);
    let length = (bytes.len() - LENGTH_PREFIX_SIZE) as i32;
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes[16] = 2;
    bytes[43..51].copy_from_slice(&(-1i64).to_be_bytes());
    bytes[57..61].copy_from_slice(&1i32.to_be_bytes());
    let crc = crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes.freeze()
}

/// A zigzag varint of a small number.
fn varint(out: &mut Vec<u8>, number: usize) {
    let mut value = number << 1;
    while value >= 0x80 {
        out.push(value as u8 & 0x7f | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
