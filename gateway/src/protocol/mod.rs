//! The Kafka protocol without any I/O: frames, versions and messages.
//!
//! Invariant: nothing here allocates more than a small multiple of the bytes that came in, and no
//! bytes make it panic.

pub mod frame;
pub mod versions;

pub mod messages;

pub mod fetch;
pub mod produce;

mod wire;

#[cfg(test)]
mod codec_test;

pub use frame::{RequestHeader, Response};
pub use versions::Api;

/// Bytes that are not a request of the announced kind. The connection they came from is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("frame size {0} is negative")]
    NegativeFrame(i32),
    #[error("frame of {size} bytes exceeds the limit of {limit}")]
    FrameTooLarge { size: usize, limit: usize },
    #[error("message ends {missing} bytes early")]
    Truncated { missing: usize },
    #[error("{kind} length {length} is out of range")]
    InvalidLength { kind: &'static str, length: i64 },
    #[error("{0} is not UTF-8")]
    NotUtf8(&'static str),
    #[error("variable-length number is too long")]
    InvalidVarint,
    #[error("api key {0} is not known")]
    UnknownApi(i16),
    #[error("{api} version {version} is not supported")]
    UnsupportedVersion { api: &'static str, version: i16 },
    #[error("{0}")]
    Message(String),
}
