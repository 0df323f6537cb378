//! Records as one uncompressed record batch v2, written and read: what the coordinator puts into
//! its own partition. Batches of clients are never decoded here.
//!
//! Invariant: reading any bytes ends in records or an error, and allocates no more than the bytes
//! that are there.

use bytes::{BufMut, Bytes, BytesMut};
use chronik_types::offset::Offset;
use chronik_types::record_batch::{
    BatchHeader, Compression, HEADER_SIZE, InvalidBatch, LENGTH_PREFIX_SIZE, crc32c,
};

/// Bytes of `BatchHeader` from which the CRC counts.
const CRC_START: usize = 21;

/// A record's key and value; no value is a tombstone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub key: Bytes,
    pub value: Option<Bytes>,
}

impl Record {
    /// Upper bound of the record's bytes in a batch.
    pub fn size_bytes_max(&self) -> usize {
        self.key.len() + self.value.as_ref().map_or(0, Bytes::len) + 32
    }
}

/// Why a batch of the coordinator's partition cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnreadableBatch {
    #[error(transparent)]
    Invalid(#[from] InvalidBatch),
    #[error("record batch is compressed with {0:?}, which the coordinator never writes")]
    Compressed(Compression),
    #[error("record {record} of the batch is malformed")]
    MalformedRecord { record: i32 },
}

/// One batch with base offset 0 and no leader epoch: the replica stamps both.
pub fn encode(records: &[Record], timestamp_ms: i64) -> Bytes {
    let size: usize = records.iter().map(Record::size_bytes_max).sum();
    let mut batch = BytesMut::with_capacity(HEADER_SIZE + size);
    batch.put_bytes(0, HEADER_SIZE);
    let mut body = BytesMut::new();
    for (delta, record) in records.iter().enumerate() {
        body.clear();
        encode_record(&mut body, delta as i64, record);
        put_varint(&mut batch, body.len() as i64);
        batch.extend_from_slice(&body);
    }
    let count = i32::try_from(records.len()).expect("a write is bounded far below 2^31 records");
    let length = i32::try_from(batch.len() - LENGTH_PREFIX_SIZE)
        .expect("a write is bounded far below 2 GiB");
    batch[8..12].copy_from_slice(&length.to_be_bytes());
    batch[12..16].copy_from_slice(&(-1i32).to_be_bytes());
    batch[16] = 2;
    batch[23..27].copy_from_slice(&(count - 1).to_be_bytes());
    batch[27..35].copy_from_slice(&timestamp_ms.to_be_bytes());
    batch[35..43].copy_from_slice(&timestamp_ms.to_be_bytes());
    batch[43..51].copy_from_slice(&(-1i64).to_be_bytes());
    batch[51..53].copy_from_slice(&(-1i16).to_be_bytes());
    batch[53..57].copy_from_slice(&(-1i32).to_be_bytes());
    batch[57..61].copy_from_slice(&count.to_be_bytes());
    let crc = crc32c(&batch[CRC_START..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
    batch.freeze()
}

fn encode_record(out: &mut BytesMut, offset_delta: i64, record: &Record) {
    out.put_i8(0); // attributes
    put_varint(out, 0); // timestamp delta
    put_varint(out, offset_delta);
    put_varint(out, record.key.len() as i64);
    out.extend_from_slice(&record.key);
    match &record.value {
        Some(value) => {
            put_varint(out, value.len() as i64);
            out.extend_from_slice(value);
        }
        None => put_varint(out, -1),
    }
    put_varint(out, 0); // headers
}

/// The batch at the front of `bytes`: its header and its records with their offsets, values
/// sharing the batch's memory. A control batch has no records for the coordinator.
pub fn decode(bytes: &Bytes) -> Result<(BatchHeader, Vec<(Offset, Record)>), UnreadableBatch> {
    let header = BatchHeader::parse(bytes)?;
    header.verify_crc(bytes)?;
    if header.is_control() {
        return Ok((header, Vec::new()));
    }
    match header.compression()? {
        Compression::None => {}
        other => return Err(UnreadableBatch::Compressed(other)),
    }
    let mut body = bytes.slice(HEADER_SIZE..header.size_bytes());
    let mut records = Vec::new();
    for record in 0..header.record_count {
        let malformed = UnreadableBatch::MalformedRecord { record };
        let decoded = decode_record(&mut body).ok_or(malformed)?;
        records.push((header.base_offset.plus(decoded.0), decoded.1));
    }
    Ok((header, records))
}

fn decode_record(body: &mut Bytes) -> Option<(i64, Record)> {
    let length = usize::try_from(get_varint(body)?).ok()?;
    if length > body.len() {
        return None;
    }
    let mut record = body.split_to(length);
    take(&mut record, 1)?; // attributes
    get_varint(&mut record)?; // timestamp delta
    let offset_delta = get_varint(&mut record)?;
    let key = nullable(&mut record)?.unwrap_or_default();
    let value = nullable(&mut record)?;
    // Headers, if any, are not for the coordinator.
    (offset_delta >= 0).then_some((offset_delta, Record { key, value }))
}

fn nullable(bytes: &mut Bytes) -> Option<Option<Bytes>> {
    match get_varint(bytes)? {
        -1 => Some(None),
        length => take(bytes, usize::try_from(length).ok()?).map(Some),
    }
}

fn take(bytes: &mut Bytes, length: usize) -> Option<Bytes> {
    (length <= bytes.len()).then(|| bytes.split_to(length))
}

fn put_varint(out: &mut BytesMut, value: i64) {
    super::fields::put_uvarint(out, ((value << 1) ^ (value >> 63)) as u64);
}

fn get_varint(bytes: &mut Bytes) -> Option<i64> {
    let zigzag = super::fields::get_uvarint(bytes)?;
    Some((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64))
}

#[cfg(test)]
mod tests {
    use kafka_protocol::records::RecordBatchDecoder;
    use proptest::prelude::*;

    use super::*;

    fn record(key: &[u8], value: Option<&[u8]>) -> Record {
        Record {
            key: Bytes::copy_from_slice(key),
            value: value.map(Bytes::copy_from_slice),
        }
    }

    fn records() -> impl Strategy<Value = Vec<Record>> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..100);
        let one = (bytes(), proptest::option::of(bytes()))
            .prop_map(|(key, value)| record(&key, value.as_deref()));
        proptest::collection::vec(one, 1..20)
    }

    #[test]
    fn another_implementation_reads_our_batches() {
        let written = [
            record(b"k1", Some(b"v1")),
            record(b"k2", None),
            record(b"k3", Some(&[0; 300])),
        ];
        let mut batch = encode(&written, 1_234);
        let read = RecordBatchDecoder::decode(&mut batch).unwrap();
        let read: Vec<_> = read
            .records
            .into_iter()
            .map(|r| {
                (
                    r.offset,
                    r.timestamp,
                    Record {
                        key: r.key.unwrap(),
                        value: r.value,
                    },
                )
            })
            .collect();
        for (at, record) in written.iter().enumerate() {
            assert_eq!(read[at], (at as i64, 1_234, record.clone()));
        }
        assert_eq!(read.len(), written.len());
    }

    #[test]
    fn a_record_count_that_lies_is_an_error() {
        let mut batch = encode(&[record(b"k", Some(b"v"))], 0).to_vec();
        batch[57..61].copy_from_slice(&i32::MAX.to_be_bytes());
        let crc = crc32c(&batch[CRC_START..]);
        batch[17..21].copy_from_slice(&crc.to_be_bytes());
        let result = decode(&Bytes::from(batch));
        assert_eq!(result, Err(UnreadableBatch::MalformedRecord { record: 1 }));
    }

    proptest! {
        #[test]
        fn batches_round_trip(written in records(), timestamp in 0i64..i64::MAX) {
            let (header, read) = decode(&encode(&written, timestamp)).unwrap();
            prop_assert_eq!(header.max_timestamp, timestamp);
            prop_assert_eq!(header.verify_from_producer(), Ok(()));
            let expected: Vec<_> =
                written.into_iter().enumerate().map(|(at, r)| (Offset(at as i64), r)).collect();
            prop_assert_eq!(read, expected);
        }

        #[test]
        fn damaged_records_fail_without_panic(
            written in records(),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut batch = encode(&written, 7).to_vec();
            for (at, byte) in damage {
                let at = HEADER_SIZE + at.index(batch.len() - HEADER_SIZE);
                batch[at] = byte;
            }
            // A valid checksum, so that the damage reaches the record decoder.
            let crc = crc32c(&batch[CRC_START..]);
            batch[17..21].copy_from_slice(&crc.to_be_bytes());
            let _ = decode(&Bytes::from(batch));
        }

        #[test]
        fn any_bytes_decode_or_fail_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let _ = decode(&Bytes::from(bytes));
        }
    }
}
