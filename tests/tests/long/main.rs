//! What only `make test-all` runs: a real Jaeger, and containers.

mod broken_build;
mod containers;
mod tracing;
