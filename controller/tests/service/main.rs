//! Controllers as services, in this process: gRPC and REST from outside, real disks and sockets.
#![allow(clippy::unwrap_used)]

mod cluster;
mod common;
mod rest;
