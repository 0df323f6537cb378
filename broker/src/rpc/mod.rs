//! The broker's gRPC services for gateways, one file per service. Each file's owner adds its line.

pub mod data;
#[cfg(test)]
mod data_test;
pub mod error;
pub mod groups;
pub mod segments;
