//! The contracts between the services: generated gRPC code, and the only conversions between the
//! wire and `chronik_types`.

/// Generated from `proto/chronik/*.proto`.
#[allow(clippy::all, clippy::unwrap_used)]
pub mod v1 {
    tonic::include_proto!("chronik.v1");
}

mod convert;

pub use convert::{InvalidMessage, uuid, uuid_bytes};

/// Largest gRPC message accepted, in bytes: a produce request of Kafka's default
/// `socket.request.max.bytes` (100 MiB) and its framing.
pub const MESSAGE_SIZE_MAX: usize = 104 * 1024 * 1024;
/// Largest HTTP/2 frame, in bytes. The default of 16 KiB halves bulk throughput.
pub const HTTP2_FRAME_SIZE: u32 = 1024 * 1024;
/// HTTP/2 flow-control windows, in bytes, per stream and per connection.
pub const HTTP2_STREAM_WINDOW: u32 = 8 * 1024 * 1024;
pub const HTTP2_CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
