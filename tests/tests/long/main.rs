//! What only `make test-all` runs: a real Jaeger, containers, and very many partitions.

mod containers;
mod scale;
mod tracing;
