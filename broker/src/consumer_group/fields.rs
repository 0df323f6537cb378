//! Strings, lengths and numbers as Kafka's record formats write them, flexible or not.
//!
//! Invariant: reading ends in a value or in None, whatever the bytes are.

use bytes::{Buf, BufMut, Bytes, BytesMut};

pub fn put_string(out: &mut BytesMut, string: &str) {
    put_nullable_string(out, Some(string));
}

pub fn put_nullable_string(out: &mut BytesMut, string: Option<&str>) {
    match string {
        Some(string) => {
            let length =
                i16::try_from(string.len()).expect("requests with longer strings are refused");
            out.put_i16(length);
            out.extend_from_slice(string.as_bytes());
        }
        None => out.put_i16(-1),
    }
}

pub fn put_length(out: &mut BytesMut, length: usize) {
    out.put_i32(i32::try_from(length).expect("the size of a group is bounded far below 2 GiB"));
}

/// Unsigned LEB128, as Kafka's variable-length numbers are made of.
pub fn put_uvarint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

pub fn get_uvarint(bytes: &mut impl Buf) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = bytes.try_get_u8().ok()?;
        // The tenth byte has room for one bit only.
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

pub fn get_i16(bytes: &mut impl Buf) -> Option<i16> {
    bytes.try_get_i16().ok()
}

pub fn get_i32(bytes: &mut impl Buf) -> Option<i32> {
    bytes.try_get_i32().ok()
}

pub fn get_i64(bytes: &mut impl Buf) -> Option<i64> {
    bytes.try_get_i64().ok()
}

pub fn get_string(bytes: &mut impl Buf) -> Option<String> {
    let length = usize::try_from(get_i16(bytes)?).ok()?;
    get_utf8(bytes, length)
}

pub fn get_utf8(bytes: &mut impl Buf, length: usize) -> Option<String> {
    if length > bytes.remaining() {
        return None;
    }
    String::from_utf8(bytes.copy_to_bytes(length).into()).ok()
}

/// A string of either encoding; the inner `None` is null.
pub fn get_versioned_string(bytes: &mut Bytes, flexible: bool) -> Option<Option<String>> {
    let length = if flexible {
        i64::try_from(get_uvarint(bytes)?).ok()?.checked_sub(1)?
    } else {
        i64::from(get_i16(bytes)?)
    };
    match length {
        -1 => Some(None),
        length => get_utf8(bytes, usize::try_from(length).ok()?).map(Some),
    }
}

/// A count of items or bytes of either encoding; the inner `None` is null.
pub fn get_versioned_length(bytes: &mut Bytes, flexible: bool) -> Option<Option<usize>> {
    let length = if flexible {
        i64::try_from(get_uvarint(bytes)?).ok()?.checked_sub(1)?
    } else {
        i64::from(get_i32(bytes)?)
    };
    match length {
        -1 => Some(None),
        length => usize::try_from(length).ok().map(Some),
    }
}

pub fn get_bytes(bytes: &mut Bytes, flexible: bool) -> Option<Bytes> {
    let length = get_versioned_length(bytes, flexible)??;
    (length <= bytes.len()).then(|| bytes.split_to(length))
}

pub fn for_each_tag(bytes: &mut Bytes, mut each: impl FnMut(u64, &[u8])) -> Option<()> {
    for _ in 0..get_uvarint(bytes)? {
        let tag = get_uvarint(bytes)?;
        let length = usize::try_from(get_uvarint(bytes)?).ok()?;
        if length > bytes.len() {
            return None;
        }
        each(tag, &bytes.split_to(length));
    }
    Some(())
}
