//! Frames: a 4-byte size, a header, a body.
//!
//! Invariant: a request whose header could be read can be answered under its correlation id,
//! whatever its body holds.

use bytes::{Bytes, BytesMut};

use super::Malformed;
use super::messages::StrBytes;
use super::versions::Api;
use super::wire::Reader;

/// Bytes of a frame that come before its header.
pub const SIZE_PREFIX: usize = 4;

/// The size that a frame announces, checked against `limit`.
pub fn frame_size(prefix: [u8; SIZE_PREFIX], limit: usize) -> Result<usize, Malformed> {
    let size = i32::from_be_bytes(prefix);
    let size = usize::try_from(size).map_err(|_| Malformed::NegativeFrame(size))?;
    if size > limit {
        Err(Malformed::FrameTooLarge { size, limit })
    } else {
        Ok(size)
    }
}

/// The header of a request, and what follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHeader {
    pub api_key: i16,
    pub api_version: i16,
    pub correlation_id: i32,
    pub client_id: Option<StrBytes>,
}

impl RequestHeader {
    /// Splits a frame (without its size) into header and body.
    pub fn decode(frame: Bytes) -> Result<(RequestHeader, Bytes), Malformed> {
        let mut reader = Reader::new(frame);
        let api_key = reader.i16()?;
        let api_version = reader.i16()?;
        let correlation_id = reader.i32()?;
        let client_id = reader.nullable_string(false)?;
        // An ApiVersions request of a version from the future may have a header from the future.
        let flexible = Api::from_key(api_key)
            .is_some_and(|api| api.supports(api_version) && api.is_flexible(api_version));
        reader.skip_tagged_fields(flexible)?;
        Ok((
            RequestHeader {
                api_key,
                api_version,
                correlation_id,
                client_id,
            },
            reader.rest(),
        ))
    }
}

/// A whole response frame, in pieces that are written one after the other.
#[derive(Debug, Default)]
pub struct Response {
    pub pieces: Vec<Bytes>,
}

impl Response {
    pub fn size_bytes(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum()
    }
}

/// Starts a response frame: room for the size, then the response header.
pub fn begin_response(correlation_id: i32, flexible_header: bool) -> BytesMut {
    let mut out = BytesMut::with_capacity(256);
    out.extend_from_slice(&[0; SIZE_PREFIX]);
    out.extend_from_slice(&correlation_id.to_be_bytes());
    if flexible_header {
        out.extend_from_slice(&[0]);
    }
    out
}

/// Ends a response that lies in one buffer: fills in its size.
pub fn finish_response(mut out: BytesMut) -> Response {
    let size = out.len().saturating_sub(SIZE_PREFIX);
    set_size(&mut out, size);
    Response {
        pieces: vec![out.freeze()],
    }
}

/// Writes `size` into the room at the front of a response.
pub(super) fn set_size(first: &mut BytesMut, size: usize) {
    // Response sizes are bounded by the fetch limits, far below 2 GiB.
    let size = i32::try_from(size).unwrap_or(i32::MAX);
    first[..SIZE_PREFIX].copy_from_slice(&size.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_checked() {
        assert_eq!(frame_size([0, 0, 0, 9], 10), Ok(9));
        assert_eq!(frame_size([0xff; 4], 10), Err(Malformed::NegativeFrame(-1)));
        assert!(matches!(
            frame_size([0, 0, 0, 11], 10),
            Err(Malformed::FrameTooLarge {
                size: 11,
                limit: 10
            })
        ));
    }

    #[test]
    fn flexible_headers_have_tagged_fields() {
        // Metadata v9, correlation 7, client id "c", one tagged field of two bytes, body "x".
        let frame = [0, 3, 0, 9, 0, 0, 0, 7, 0, 1, b'c', 1, 5, 2, 9, 9, b'x'];
        let (header, body) = RequestHeader::decode(Bytes::copy_from_slice(&frame)).unwrap();
        assert_eq!(
            (header.api_key, header.api_version, header.correlation_id),
            (3, 9, 7)
        );
        assert_eq!(header.client_id.as_deref(), Some("c"));
        assert_eq!(&body[..], b"x");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let _ = RequestHeader::decode(Bytes::from(bytes));
        }
    }
}
