//! Record batches for tests, made by hand so that the tests do not trust the code they test.

use chronik_types::record_batch::{HEADER_SIZE, LENGTH_PREFIX_SIZE, crc32c};

/// Header fields that tests vary.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    pub attributes: i16,
    pub record_count: i32,
    pub base_timestamp: i64,
    pub max_timestamp: i64,
    pub producer_id: i64,
    pub producer_epoch: i16,
    pub base_sequence: i32,
}

impl Default for Spec {
    fn default() -> Self {
        Spec {
            attributes: 0,
            record_count: 1,
            base_timestamp: 0,
            max_timestamp: 0,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
        }
    }
}

/// A batch with that header and body, length and CRC right.
pub fn batch(spec: Spec, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_SIZE];
    bytes.extend_from_slice(body);
    let length = (bytes.len() - LENGTH_PREFIX_SIZE) as i32;
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes[16] = 2;
    bytes[21..23].copy_from_slice(&spec.attributes.to_be_bytes());
    bytes[23..27].copy_from_slice(&(spec.record_count - 1).to_be_bytes());
    bytes[27..35].copy_from_slice(&spec.base_timestamp.to_be_bytes());
    bytes[35..43].copy_from_slice(&spec.max_timestamp.to_be_bytes());
    bytes[43..51].copy_from_slice(&spec.producer_id.to_be_bytes());
    bytes[51..53].copy_from_slice(&spec.producer_epoch.to_be_bytes());
    bytes[53..57].copy_from_slice(&spec.base_sequence.to_be_bytes());
    bytes[57..61].copy_from_slice(&spec.record_count.to_be_bytes());
    let crc = crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes
}

/// A batch of `records` (timestamp, value) without compression.
pub fn with_records(records: &[(i64, &[u8])]) -> Vec<u8> {
    let first = records.first().map_or(0, |r| r.0);
    let max = records.iter().map(|r| r.0).max().unwrap_or(-1);
    let spec = Spec {
        record_count: records.len() as i32,
        base_timestamp: first,
        max_timestamp: max,
        ..Spec::default()
    };
    batch(spec, &record_bytes(records))
}

/// The records of a batch whose base timestamp is the first record's.
pub fn record_bytes(records: &[(i64, &[u8])]) -> Vec<u8> {
    let first = records.first().map_or(0, |r| r.0);
    let mut body = Vec::new();
    for (index, (timestamp, value)) in records.iter().enumerate() {
        let mut record = vec![0];
        put_varint(&mut record, timestamp - first);
        put_varint(&mut record, index as i64);
        put_varint(&mut record, -1);
        put_varint(&mut record, value.len() as i64);
        record.extend_from_slice(value);
        put_varint(&mut record, 0);
        put_varint(&mut body, record.len() as i64);
        body.extend_from_slice(&record);
    }
    body
}

/// One record whose value is `value`.
pub fn value(value: &str) -> Vec<u8> {
    with_records(&[(1_000, value.as_bytes())])
}

/// A batch of an idempotent producer.
pub fn idempotent(producer_id: i64, epoch: i16, base_sequence: i32, count: i32) -> Vec<u8> {
    let values: Vec<(i64, &[u8])> = (0..count).map(|_| (1_000, &b"v"[..])).collect();
    let spec = Spec {
        record_count: count,
        base_timestamp: 1_000,
        max_timestamp: 1_000,
        producer_id,
        producer_epoch: epoch,
        base_sequence,
        ..Spec::default()
    };
    batch(spec, &record_bytes(&values))
}

/// Zigzag, seven bits a byte.
pub fn put_varint(out: &mut Vec<u8>, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)) as u64;
    while rest >= 0x80 {
        out.push((rest as u8 & 0x7f) | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}
