//! What every Chronik process needs in order to be run and observed, set up once: configuration,
//! process life, tracing with OTLP export, metrics and health endpoints.
//!
//! Invariant: a request that is not sampled makes no span and allocates nothing here.

pub mod config;

pub mod process;

pub mod http;
pub mod rpc;
pub mod trace;

pub use opentelemetry::trace::SpanKind;
