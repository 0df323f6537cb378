//! Metrics of the gateway. Every name is a constant here, and every metric is fed.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::protocol::Api;

pub const CONNECTIONS: &str = "chronik_gateway_connections";
pub const CONNECTIONS_REFUSED: &str = "chronik_gateway_connections_refused";
pub const MALFORMED_REQUESTS: &str = "chronik_gateway_malformed_requests";
pub const REQUESTS: &str = "chronik_gateway_requests";
pub const REQUEST_SECONDS: &str = "chronik_gateway_request_duration_seconds";
pub const BYTES_IN: &str = "chronik_gateway_received_bytes";
pub const BYTES_OUT: &str = "chronik_gateway_sent_bytes";
pub const PRODUCE_ERRORS: &str = "chronik_gateway_produce_partition_errors";
pub const FETCH_ERRORS: &str = "chronik_gateway_fetch_partition_errors";
pub const BROKER_LINKS_UP: &str = "chronik_gateway_broker_links_up";
pub const BROKER_LINK_FAILURES: &str = "chronik_gateway_broker_link_failures";
pub const IMAGE_REVISION: &str = "chronik_gateway_image_revision";
pub const CONTROLLER_CONNECTED: &str = "chronik_gateway_controller_watch_connected";

/// `api`: the Kafka API's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ApiLabels {
    pub api: &'static str,
}

/// `error`: Kafka's error code.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ErrorLabels {
    pub error: i16,
}

#[derive(Debug, Clone)]
struct PerApi {
    requests: Counter,
    seconds: Histogram,
}

/// Handles to all metrics; cheap to share.
#[derive(Debug)]
pub struct Metrics {
    pub connections: Gauge<i64, AtomicI64>,
    pub connections_refused: Counter,
    pub malformed_requests: Counter,
    pub bytes_in: Counter<u64, AtomicU64>,
    pub bytes_out: Counter<u64, AtomicU64>,
    pub produce_errors: Family<ErrorLabels, Counter>,
    pub fetch_errors: Family<ErrorLabels, Counter>,
    pub broker_links_up: Gauge<i64, AtomicI64>,
    pub broker_link_failures: Counter,
    pub image_revision: Gauge<i64, AtomicI64>,
    pub controller_connected: Gauge<i64, AtomicI64>,
    /// By the API's place in `Api::ALL`: no lock and no hashing per request.
    per_api: Vec<PerApi>,
}

impl Metrics {
    /// Makes all metrics and registers them.
    pub fn new(registry: &mut Registry) -> Arc<Metrics> {
        let requests = Family::<ApiLabels, Counter>::default();
        let seconds =
            Family::<ApiLabels, Histogram>::new_with_constructor(|| Histogram::new(BUCKETS));
        let per_api = Api::ALL
            .iter()
            .map(|api| {
                let labels = ApiLabels { api: api.name() };
                PerApi {
                    requests: requests.get_or_create_owned(&labels),
                    seconds: seconds.get_or_create_owned(&labels),
                }
            })
            .collect();
        let metrics = Metrics {
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            malformed_requests: Counter::default(),
            bytes_in: Counter::default(),
            bytes_out: Counter::default(),
            produce_errors: Family::default(),
            fetch_errors: Family::default(),
            broker_links_up: Gauge::default(),
            broker_link_failures: Counter::default(),
            image_revision: Gauge::default(),
            controller_connected: Gauge::default(),
            per_api,
        };
        registry.register(REQUESTS, "Requests answered, by API", requests);
        registry.register(
            REQUEST_SECONDS,
            "From a whole request to its answer, by API",
            seconds,
        );
        metrics.register(registry);
        Arc::new(metrics)
    }

    /// Counts one answered request.
    pub fn answered(&self, api: Api, took: Duration) {
        let at = Api::ALL.iter().position(|other| *other == api);
        if let Some(per_api) = at.and_then(|at| self.per_api.get(at)) {
            per_api.requests.inc();
            per_api.seconds.observe(took.as_secs_f64());
        }
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            CONNECTIONS,
            "Open client connections",
            self.connections.clone(),
        );
        registry.register(
            CONNECTIONS_REFUSED,
            "Connections closed at accept because there were too many",
            self.connections_refused.clone(),
        );
        registry.register(
            MALFORMED_REQUESTS,
            "Connections closed because of bytes that are no request",
            self.malformed_requests.clone(),
        );
        registry.register(BYTES_IN, "Bytes of requests", self.bytes_in.clone());
        registry.register(BYTES_OUT, "Bytes of responses", self.bytes_out.clone());
        registry.register(
            PRODUCE_ERRORS,
            "Partitions of produce requests answered with an error, by Kafka error code",
            self.produce_errors.clone(),
        );
        registry.register(
            FETCH_ERRORS,
            "Partitions of fetch requests answered with an error, by Kafka error code",
            self.fetch_errors.clone(),
        );
        registry.register(
            BROKER_LINKS_UP,
            "Produce and fetch streams to brokers that are open",
            self.broker_links_up.clone(),
        );
        registry.register(
            BROKER_LINK_FAILURES,
            "Streams to brokers that broke or could not be opened",
            self.broker_link_failures.clone(),
        );
        registry.register(
            IMAGE_REVISION,
            "Revision of the cluster image in use",
            self.image_revision.clone(),
        );
        registry.register(
            CONTROLLER_CONNECTED,
            "1 while a controller sends image changes",
            self.controller_connected.clone(),
        );
    }
}

/// From 100 µs to 10 s.
const BUCKETS: [f64; 15] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_exported() {
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        metrics.answered(Api::Produce, Duration::from_millis(1));
        metrics
            .produce_errors
            .get_or_create(&ErrorLabels { error: 6 })
            .inc();
        metrics
            .fetch_errors
            .get_or_create(&ErrorLabels { error: 1 })
            .inc();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for name in [
            CONNECTIONS,
            CONNECTIONS_REFUSED,
            MALFORMED_REQUESTS,
            REQUESTS,
            REQUEST_SECONDS,
            BYTES_IN,
            BYTES_OUT,
            PRODUCE_ERRORS,
            FETCH_ERRORS,
            BROKER_LINKS_UP,
            BROKER_LINK_FAILURES,
            IMAGE_REVISION,
            CONTROLLER_CONNECTED,
        ] {
            assert!(text.contains(name), "{name} is missing");
        }
        assert!(
            text.contains("chronik_gateway_requests_total{api=\"Produce\"} 1"),
            "{text}"
        );
    }
}
