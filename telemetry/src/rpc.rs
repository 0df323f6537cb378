//! Carries the trace of a sampled request over gRPC calls whose messages have no field for it: the W3C header
//! `traceparent` in the call's metadata.
//!
//! Invariant: what is called outside of any trace sends no header, and what comes without one makes no span.

use tokio_util::either::Either;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};

use crate::SpanKind;
use crate::trace::{Span, TraceContext, span};

const TRACEPARENT: &str = "traceparent";

tokio::task_local! {
    static CURRENT: TraceContext;
}

/// Runs `future`: the calls that it makes, but for those of tasks that it spawns, carry `trace` on.
pub fn within<F: Future>(
    trace: Option<TraceContext>,
    future: F,
) -> impl Future<Output = F::Output> {
    match trace {
        Some(trace) => Either::Left(CURRENT.scope(trace, future)),
        None => Either::Right(future),
    }
}

/// What makes a client's calls carry the trace on that they are made within.
pub type Carry = fn(Request<()>) -> Result<Request<()>, Status>;

/// A channel of a client whose calls carry the trace on.
pub fn carrying<C>(channel: C) -> InterceptedService<C, Carry> {
    InterceptedService::new(channel, carry)
}

fn carry(mut request: Request<()>) -> Result<Request<()>, Status> {
    // An error says that this is outside of any trace.
    let _ = CURRENT.try_with(|trace| set(&mut request, trace));
    Ok(request)
}

fn set<T>(request: &mut Request<T>, trace: &TraceContext) {
    if let Ok(traceparent) = trace.traceparent().parse() {
        request.metadata_mut().insert(TRACEPARENT, traceparent);
    }
}

/// The span of a call that comes within a trace; from then on the request names it as its parent, for whoever gets it
/// next.
pub fn server_span<T>(request: &mut Request<T>, name: &'static str) -> Option<Span> {
    let parent = request.metadata().get(TRACEPARENT)?.to_str().ok()?;
    let span = span(TraceContext::parse(parent).as_ref(), name, SpanKind::Server)?;
    set(request, &span.context());
    Some(span)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn header(request: &Request<()>) -> Option<&str> {
        request.metadata().get(TRACEPARENT)?.to_str().ok()
    }

    #[tokio::test]
    async fn calls_within_a_trace_carry_it_and_others_carry_nothing() {
        let trace = TraceContext::parse(SAMPLED);
        let sent = within(trace, async { carry(Request::new(())).unwrap() }).await;
        assert_eq!(header(&sent), Some(SAMPLED));
        let sent = within(None, async { carry(Request::new(())).unwrap() }).await;
        assert_eq!(header(&sent), None);
        assert_eq!(header(&carry(Request::new(())).unwrap()), None);
    }

    #[test]
    fn a_call_without_a_trace_makes_no_span() {
        assert!(server_span(&mut Request::new(()), "a.call").is_none());
        let mut unsampled = Request::new(());
        let header = SAMPLED.replace("-01", "-00").parse().unwrap();
        unsampled.metadata_mut().insert(TRACEPARENT, header);
        assert!(server_span(&mut unsampled, "a.call").is_none());
    }
}
