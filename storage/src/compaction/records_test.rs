//! Batches are filtered in every compression, and any bytes give an error at worst.

use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use chronik_types::record_batch::stamp;
use proptest::prelude::*;

use super::*;

/// A record's offset delta, timestamp delta, key and value.
type Plain<'a> = (i32, i64, Option<&'a [u8]>, Option<&'a [u8]>);

fn put_sized(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    put_varint(out, bytes.map_or(-1, |bytes| bytes.len() as i64));
    out.extend_from_slice(bytes.unwrap_or_default());
}

fn body(plain: &[Plain<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for (offset_delta, timestamp_delta, key, value) in plain {
        let mut record = vec![0];
        put_varint(&mut record, *timestamp_delta);
        put_varint(&mut record, i64::from(*offset_delta));
        put_sized(&mut record, *key);
        put_sized(&mut record, *value);
        put_varint(&mut record, 1);
        put_sized(&mut record, Some(b"header"));
        put_sized(&mut record, None);
        put_varint(&mut out, record.len() as i64);
        out.extend(record);
    }
    out
}

fn batch(attributes: i16, count: i32, compressed: &[u8]) -> Bytes {
    let mut out = vec![0; HEADER_SIZE];
    out[16] = 2;
    out.extend_from_slice(compressed);
    put(&mut out, 23, &(count - 1).to_be_bytes());
    put(&mut out, BASE_TIMESTAMP_AT, &1000i64.to_be_bytes());
    put(&mut out, MAX_TIMESTAMP_AT, &1009i64.to_be_bytes());
    put(&mut out, 43, &77i64.to_be_bytes());
    put(&mut out, 51, &3i16.to_be_bytes());
    put(&mut out, 53, &5i32.to_be_bytes());
    let out = finish(out, attributes, count as usize).unwrap();
    let mut out = out.to_vec();
    stamp(&mut out, Offset(40), LeaderEpoch(6));
    Bytes::from(out)
}

/// Offset, time, key, and whether there is a value.
type Found = (i64, i64, Option<Vec<u8>>, bool);

fn plain_of(batch: &Bytes) -> (BatchHeader, Vec<Found>) {
    let header = BatchHeader::parse(batch).unwrap();
    header.verify_crc(batch).unwrap();
    let body = body_of(&header, batch).unwrap();
    let records = records_of(&header, &body).unwrap();
    let plain = records.iter().map(|record| {
        let offset = header.base_offset.0 + i64::from(record.offset_delta);
        let time = header.base_timestamp + record.timestamp_delta;
        (
            offset,
            time,
            record.key.map(<[u8]>::to_vec),
            record.value.is_some(),
        )
    });
    (header, plain.collect())
}

const RECORDS: [Plain<'_>; 4] = [
    (0, 0, Some(b"a"), Some(b"first")),
    (1, 9, Some(b"b"), None),
    (2, 4, None, Some(b"no key")),
    (3, 2, Some(b""), Some(b"")),
];

#[test]
fn what_stays_keeps_its_offset_and_time_in_every_compression() {
    for attributes in 0..=4 {
        let mut compressed = Vec::new();
        let compression = BatchHeader::parse(&batch(attributes, 4, b""))
            .unwrap()
            .compression();
        compress(compression.unwrap(), &body(&RECORDS), &mut compressed).unwrap();
        let original = batch(attributes, 4, &compressed);
        let (header, all) = plain_of(&original);
        assert_eq!(all.len(), 4);
        assert_eq!((all[1].0, all[1].1, all[1].3), (41, 1009, false));
        let body = body_of(&header, &original).unwrap();
        let records = records_of(&header, &body).unwrap();
        let filter = |keep: [bool; 4], horizon| {
            filter(&header, &original, &records, &keep, horizon).unwrap()
        };
        assert_eq!(filter([true; 4], None), Filtered::Whole);
        assert_eq!(filter([false; 4], Some(5)), Filtered::Nothing);
        for (keep, horizon) in [
            ([true, false, true, false], None),
            ([false, true, false, true], None),
            ([true, true, true, true], Some(123_456)),
            ([false, false, false, true], Some(-9)),
        ] {
            let Filtered::Part(part) = filter(keep, horizon) else {
                panic!("{keep:?}");
            };
            let (new, left) = plain_of(&part);
            let expected = all
                .iter()
                .zip(keep)
                .filter(|(_, keep)| *keep)
                .map(|(r, _)| r.clone());
            assert_eq!(left, expected.collect::<Vec<_>>());
            assert_eq!(
                new.max_timestamp,
                left.iter().map(|record| record.1).max().unwrap()
            );
            assert_eq!(new.delete_horizon_ms(), horizon);
            assert_eq!(new.compression(), header.compression());
            let identity = |h: &BatchHeader| {
                let producer = (h.producer_id, h.producer_epoch, h.base_sequence);
                (h.base_offset, h.last_offset_delta, h.leader_epoch, producer)
            };
            assert_eq!(identity(&new), identity(&header));
            let empty = emptied(&new, &part).unwrap();
            let (empty_header, none) = plain_of(&empty);
            assert_eq!((none.len(), empty.len()), (0, HEADER_SIZE));
            assert_eq!(identity(&empty_header), identity(&header));
            assert_eq!(empty_header.delete_horizon_ms(), None);
        }
    }
}

#[test]
fn a_batch_that_claims_too_much_is_refused() {
    // 512 MiB of zeroes, compressed.
    let zeroes = vec![0; 1 << 20];
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    (0..512).for_each(|_| encoder.write_all(&zeroes).unwrap());
    let bomb = batch(4, 1, &encoder.finish().unwrap());
    assert!(body_of(&BatchHeader::parse(&bomb).unwrap(), &bomb).is_err());
    let claim = [0xff, 0xff, 0xff, 0xff, 0x0f, 0];
    let bomb = batch(2, 1, &claim);
    assert!(body_of(&BatchHeader::parse(&bomb).unwrap(), &bomb).is_err());
}

#[test]
fn markers_say_what_became_of_a_transaction() {
    for (kind, expected) in [(0, Some(true)), (1, Some(false)), (2, None)] {
        let body = body(&[(0, 0, Some(&[0, 0, 0, kind]), Some(b"x"))]);
        let marker = batch(0x30, 1, &body);
        let header = BatchHeader::parse(&marker).unwrap();
        assert!(header.is_control());
        let body = body_of(&header, &marker).unwrap();
        assert_eq!(is_abort(&records_of(&header, &body).unwrap()), expected);
    }
}

proptest! {
    #[test]
    fn any_body_is_read_or_refused(
        attributes in 0i16..8,
        count in -2i32..9,
        body in proptest::collection::vec(any::<u8>(), 0..120),
    ) {
        let mut bytes = batch(attributes, 5, &body).to_vec();
        put(&mut bytes, COUNT_AT, &count.to_be_bytes());
        let bytes = Bytes::from(bytes);
        let header = BatchHeader::parse(&bytes).unwrap();
        if let Ok(body) = body_of(&header, &bytes)
            && let Ok(records) = records_of(&header, &body)
        {
            let keep: Vec<bool> = (0..records.len()).map(|i| i % 2 == 0).collect();
            let _ = filter(&header, &bytes, &records, &keep, Some(i64::MAX));
            let _ = is_abort(&records);
        }
    }
}
