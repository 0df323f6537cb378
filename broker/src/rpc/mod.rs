//! The broker's gRPC services for gateways, one file per service. Each file's owner adds its line.

pub mod data;
pub mod error;
pub mod groups;
