//! What only `make test-all` runs: a real Jaeger, and containers.

mod containers;
mod tracing;
