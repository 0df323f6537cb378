//! Spans of sampled requests, through the OpenTelemetry API directly: a span by way of `tracing`
//! costs several times as much, and an unfiltered bridge ten times the request itself.
//!
//! Invariant: the decision to sample is made once, at the edge. From there on a `TraceContext`
//! exists if and only if the request is sampled; without one, nothing is made.

use std::time::SystemTime;

use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags,
    TraceId, TraceState, Tracer as _,
};
use opentelemetry::{Context, KeyValue, Value, global};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler as SdkSampler, SdkTracerProvider};

const TRACER: &str = "chronik";

/// Sets up OTLP export; without an endpoint no span is ever made. Called once, by `process::run`.
pub fn init(
    service: &'static str,
    otlp_endpoint: Option<&str>,
) -> anyhow::Result<Option<SdkTracerProvider>> {
    let Some(endpoint) = otlp_endpoint else {
        return Ok(None);
    };
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()?;
    let provider = SdkTracerProvider::builder()
        // Sampling is decided by `Sampler` before a span is asked for.
        .with_sampler(SdkSampler::AlwaysOn)
        .with_resource(Resource::builder().with_service_name(service).build())
        .with_batch_exporter(exporter)
        .build();
    global::set_tracer_provider(provider.clone());
    Ok(Some(provider))
}

/// Where a sampled request stands in its trace. Does not exist for others.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceContext(SpanContext);

impl TraceContext {
    /// Reads a W3C `traceparent` header. None if it is empty, malformed or not sampled.
    pub fn parse(traceparent: &str) -> Option<TraceContext> {
        let mut parts = traceparent.trim().split('-');
        let version = parts
            .next()
            .filter(|part| is_lower_hex(part, 2) && *part != "ff")?;
        let trace_id = parts.next().filter(|part| is_lower_hex(part, 32))?;
        let span_id = parts.next().filter(|part| is_lower_hex(part, 16))?;
        let flags = parts.next().filter(|part| is_lower_hex(part, 2))?;
        // Version 00 has exactly four parts; a later one may append more (W3C Trace Context 2.2).
        if version == "00" && parts.next().is_some() {
            return None;
        }
        let context = SpanContext::new(
            TraceId::from_hex(trace_id).ok()?,
            SpanId::from_hex(span_id).ok()?,
            TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED,
            true,
            TraceState::default(),
        );
        (context.is_valid() && context.is_sampled()).then_some(TraceContext(context))
    }

    /// The W3C `traceparent` header that carries this context on.
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-01", self.0.trace_id(), self.0.span_id())
    }
}

fn is_lower_hex(part: &str, length: usize) -> bool {
    part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A running span of a sampled request; it ends when dropped.
#[derive(Debug)]
pub struct Span(global::BoxedSpan);

impl Span {
    /// What children of this span, here or in another process, name as their parent.
    pub fn context(&self) -> TraceContext {
        TraceContext(self.0.span_context().clone())
    }

    pub fn attribute(&mut self, key: &'static str, value: impl Into<Value>) {
        self.0.set_attribute(KeyValue::new(key, value));
    }

    /// Points to a span of another trace that did work for this one too.
    pub fn link(&mut self, other: &TraceContext) {
        self.0.add_link(other.0.clone(), Vec::new());
    }

    /// Marks the span as failed.
    pub fn error(&mut self, message: String) {
        self.0.set_status(Status::error(message));
    }
}

/// Starts a child of `parent`; None if there is no parent.
pub fn span(parent: Option<&TraceContext>, name: &'static str, kind: SpanKind) -> Option<Span> {
    span_since(parent, name, kind, None)
}

/// Like `span`, for work that began earlier.
pub fn span_since(
    parent: Option<&TraceContext>,
    name: &'static str,
    kind: SpanKind,
    start: Option<SystemTime>,
) -> Option<Span> {
    let parent = Context::new().with_remote_span_context(parent?.0.clone());
    Some(start_span(name, kind, start, &parent))
}

fn start_span(
    name: &'static str,
    kind: SpanKind,
    start: Option<SystemTime>,
    parent: &Context,
) -> Span {
    let mut builder = SpanBuilder::from_name(name).with_kind(kind);
    builder.start_time = start;
    Span(global::tracer(TRACER).build_with_context(builder, parent))
}

/// Decides at the edge which requests are traced.
#[derive(Debug, Clone)]
pub struct Sampler {
    /// A random number below this is sampled; `u64::MAX` samples all.
    threshold: u64,
}

impl Sampler {
    /// `ratio` from 0 (none) to 1 (all).
    pub fn new(ratio: f64) -> Self {
        let threshold = match ratio {
            r if r <= 0.0 => 0,
            r if r >= 1.0 => u64::MAX,
            r => (r * u64::MAX as f64) as u64,
        };
        Self { threshold }
    }

    /// Whether any request can be sampled.
    pub fn is_enabled(&self) -> bool {
        self.threshold > 0
    }

    /// Starts a trace for this fraction of calls, else None.
    pub fn root(&self, name: &'static str) -> Option<Span> {
        if self.threshold == 0 || rand::random::<u64>() > self.threshold {
            return None;
        }
        let span = start_span(name, SpanKind::Server, None, &Context::new());
        // Without an exporter the span is a no-op that nobody may carry on.
        span.0.span_context().is_sampled().then_some(span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_sampled_traceparent_round_trips() {
        assert_eq!(TraceContext::parse(SAMPLED).unwrap().traceparent(), SAMPLED);
    }

    #[test]
    fn malformed_or_unsampled_traceparents_are_none() {
        let unsampled = SAMPLED.replace("-01", "-00");
        let zero_trace = SAMPLED.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32));
        let upper = SAMPLED.to_uppercase();
        let longer = format!("{SAMPLED}-00");
        for bad in [
            "",
            "00",
            "00-1-2-01",
            &unsampled,
            &zero_trace,
            &upper,
            &longer,
            "\u{1F600}",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn without_a_parent_or_a_ratio_there_is_no_span() {
        assert!(span(None, "x", SpanKind::Internal).is_none());
        assert!(Sampler::new(0.0).root("x").is_none());
        assert!(!Sampler::new(0.0).is_enabled());
    }

    #[test]
    fn a_root_span_is_carried_on_by_its_children() {
        let provider = SdkTracerProvider::builder()
            .with_sampler(SdkSampler::AlwaysOn)
            .build();
        global::set_tracer_provider(provider);
        let root = Sampler::new(1.0).root("root").unwrap();
        let child = span(Some(&root.context()), "child", SpanKind::Internal).unwrap();
        assert_eq!(root.context().0.trace_id(), child.context().0.trace_id());
        assert_ne!(root.context().0.span_id(), child.context().0.span_id());
    }
}
