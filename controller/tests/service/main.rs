//! Controllers as services, in this process: gRPC and REST from outside, real disks and sockets.
#![allow(clippy::unwrap_used)]

mod backup;
mod cluster;
mod common;
mod disk;
mod growth;
mod rest;
mod sessions;
