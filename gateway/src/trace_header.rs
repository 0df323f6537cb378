//! Looks for a `traceparent` header in the first record of a batch, for sampled requests only.
//!
//! Invariant: reads within the batch and never fails; what cannot be read has no header.

use bytes::Bytes;
use chronik_types::record_batch::{BatchHeader, Compression, HEADER_SIZE};

const HEADER: &[u8] = b"traceparent";
/// Records with more headers than this are not searched to the end.
const HEADERS_MAX: i64 = 64;

/// The value of the first record's `traceparent` header. None for compressed batches.
pub fn traceparent_of(records: &Bytes) -> Option<&str> {
    let header = BatchHeader::parse(records).ok()?;
    if header.compression() != Ok(Compression::None) || header.record_count < 1 {
        return None;
    }
    let mut rest = records.get(HEADER_SIZE..header.size_bytes())?;
    varint(&mut rest)?; // record length
    take(&mut rest, 1)?; // attributes
    varint(&mut rest)?; // timestamp delta
    varint(&mut rest)?; // offset delta
    field(&mut rest)?; // key
    field(&mut rest)?; // value
    let count = varint(&mut rest)?;
    for _ in 0..count.min(HEADERS_MAX) {
        let key = field(&mut rest)?;
        let value = field(&mut rest)?;
        if key == HEADER {
            return std::str::from_utf8(value).ok();
        }
    }
    None
}

/// A field with its length; a null one is empty.
fn field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    match varint(rest)? {
        -1 => Some(&[]),
        length => take(rest, usize::try_from(length).ok()?),
    }
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(count)?;
    *rest = left;
    Some(taken)
}

/// A zigzag varint.
fn varint(rest: &mut &[u8]) -> Option<i64> {
    let mut value = 0u64;
    for shift in 0..10 {
        let byte = take(rest, 1)?[0];
        value |= u64::from(byte & 0x7f).checked_shl(shift * 7)?;
        if byte & 0x80 == 0 {
            return Some((value >> 1) as i64 ^ -((value & 1) as i64));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::batch_with_headers;

    #[test]
    fn the_header_of_the_first_record_is_found() {
        let value = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let batch = batch_with_headers(&[("other", "x"), ("traceparent", value)]);
        assert_eq!(traceparent_of(&batch), Some(value));
        assert_eq!(traceparent_of(&batch_with_headers(&[])), None);
    }

    proptest! {
        #[test]
        fn damaged_records_have_no_header_and_do_no_harm(
            at in 61usize..120,
            byte in any::<u8>(),
        ) {
            let mut batch = batch_with_headers(&[("traceparent", "v")]).to_vec();
            if let Some(slot) = batch.get_mut(at) {
                *slot = byte;
            }
            let _ = traceparent_of(&Bytes::from(batch));
        }
    }
}
