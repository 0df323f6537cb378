//! What only `make test-all` runs: a real Jaeger, containers, and figures that take long.

mod broken_build;
mod catch_up;
mod compaction;
mod containers;
mod replication_lag;
mod rolling;
mod scale;
mod tracing;
