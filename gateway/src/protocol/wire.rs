//! Kafka's primitive types, read from and written to byte buffers by the hand-made codecs.
//!
//! Invariant: a length or a count from the wire is compared with the bytes that are left before
//! anything is allocated for it. Strings and byte fields are slices of the frame, never copies.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::Malformed;
use super::messages::StrBytes;

/// Reads primitives off the front of a frame.
pub(super) struct Reader {
    bytes: Bytes,
}

impl Reader {
    pub(super) fn new(bytes: Bytes) -> Self {
        Self { bytes }
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn rest(self) -> Bytes {
        self.bytes
    }

    pub(super) fn i16(&mut self) -> Result<i16, Malformed> {
        self.need(2)?;
        Ok(self.bytes.get_i16())
    }

    pub(super) fn i32(&mut self) -> Result<i32, Malformed> {
        self.need(4)?;
        Ok(self.bytes.get_i32())
    }

    pub(super) fn uuid(&mut self) -> Result<Uuid, Malformed> {
        self.need(16)?;
        Ok(Uuid::from_u128(self.bytes.get_u128()))
    }

    /// An unsigned varint of at most five bytes.
    pub(super) fn uvarint(&mut self) -> Result<u32, Malformed> {
        let mut value = 0u64;
        for shift in 0..5 {
            self.need(1)?;
            let byte = self.bytes.get_u8();
            value |= u64::from(byte & 0x7f) << (shift * 7);
            if byte & 0x80 == 0 {
                return u32::try_from(value).map_err(|_| Malformed::InvalidVarint);
            }
        }
        Err(Malformed::InvalidVarint)
    }

    /// The number of elements of an array that must not be null, each at least
    /// `element_size_min` bytes long.
    pub(super) fn array(
        &mut self,
        flexible: bool,
        element_size_min: usize,
    ) -> Result<usize, Malformed> {
        let length = self.length(flexible)?;
        let count = usize::try_from(length).map_err(|_| Malformed::InvalidLength {
            kind: "array",
            length,
        })?;
        let fits = count
            .checked_mul(element_size_min)
            .is_some_and(|size| size <= self.remaining());
        if fits {
            Ok(count)
        } else {
            Err(Malformed::InvalidLength {
                kind: "array",
                length,
            })
        }
    }

    /// A byte field that may be null, as a slice of the frame.
    pub(super) fn nullable_bytes(&mut self, flexible: bool) -> Result<Option<Bytes>, Malformed> {
        let length = self.length(flexible)?;
        self.slice("bytes", length)
    }

    pub(super) fn nullable_string(
        &mut self,
        flexible: bool,
    ) -> Result<Option<StrBytes>, Malformed> {
        let length = if flexible {
            self.length(true)?
        } else {
            i64::from(self.i16()?)
        };
        let Some(bytes) = self.slice("string", length)? else {
            return Ok(None);
        };
        StrBytes::try_from(bytes)
            .map(Some)
            .map_err(|_| Malformed::NotUtf8("string"))
    }

    pub(super) fn string(&mut self, flexible: bool) -> Result<StrBytes, Malformed> {
        self.nullable_string(flexible)?
            .ok_or(Malformed::InvalidLength {
                kind: "string",
                length: -1,
            })
    }

    /// Tagged fields of a flexible version; none is known where this is used.
    pub(super) fn skip_tagged_fields(&mut self, flexible: bool) -> Result<(), Malformed> {
        if !flexible {
            return Ok(());
        }
        let count = self.uvarint()?;
        for _ in 0..count {
            self.uvarint()?;
            let size = self.uvarint()? as usize;
            self.need(size)?;
            self.bytes.advance(size);
        }
        Ok(())
    }

    /// A length; -1: null. Compact lengths are stored plus one.
    fn length(&mut self, flexible: bool) -> Result<i64, Malformed> {
        if flexible {
            Ok(i64::from(self.uvarint()?) - 1)
        } else {
            Ok(i64::from(self.i32()?))
        }
    }

    fn slice(&mut self, kind: &'static str, length: i64) -> Result<Option<Bytes>, Malformed> {
        if length == -1 {
            return Ok(None);
        }
        let size =
            usize::try_from(length).map_err(|_| Malformed::InvalidLength { kind, length })?;
        self.need(size)?;
        Ok(Some(self.bytes.split_to(size)))
    }

    fn need(&self, size: usize) -> Result<(), Malformed> {
        match size.checked_sub(self.bytes.len()) {
            None | Some(0) => Ok(()),
            Some(missing) => Err(Malformed::Truncated { missing }),
        }
    }
}

/// Writes an unsigned varint.
pub(super) fn put_uvarint(out: &mut BytesMut, mut value: u32) {
    while value >= 0x80 {
        out.put_u8(value as u8 & 0x7f | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

/// Writes the length of an array or byte field. Lengths come from our own structures, which are
/// far below the limit; a longer one would be cut to it and refused by the reader.
pub(super) fn put_length(out: &mut BytesMut, flexible: bool, length: usize) {
    if flexible {
        put_uvarint(
            out,
            u32::try_from(length).unwrap_or(u32::MAX).saturating_add(1),
        );
    } else {
        out.put_i32(i32::try_from(length).unwrap_or(i32::MAX));
    }
}

pub(super) fn put_string(out: &mut BytesMut, flexible: bool, value: &str) {
    if flexible {
        put_length(out, true, value.len());
    } else {
        out.put_i16(i16::try_from(value.len()).unwrap_or(i16::MAX));
    }
    out.put_slice(value.as_bytes());
}

pub(super) fn put_nullable_string(out: &mut BytesMut, flexible: bool, value: Option<&str>) {
    match value {
        Some(value) => put_string(out, flexible, value),
        None if flexible => put_uvarint(out, 0),
        None => out.put_i16(-1),
    }
}

/// Writes an empty tagged-field section where the version has one.
pub(super) fn put_no_tagged_fields(out: &mut BytesMut, flexible: bool) {
    if flexible {
        out.put_u8(0);
    }
}
