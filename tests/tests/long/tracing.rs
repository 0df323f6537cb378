//! One produce request is one trace, read back from a real Jaeger: gateway, leader, both followers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use chronik_tests::cluster::{BROKERS, Cluster, Options};
use chronik_tests::figures::report;
use chronik_tests::process::OwnChild;
use chronik_tests::rest::Rest;
use chronik_tests::tools::{cached, kafka_topics, kcat, run_ok};
use chronik_tests::wait::{holds, wait_for};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

/// The resource attribute that tells processes of one service apart, set from the environment.
const INSTANCE: &str = "service.instance.id";

/// A Jaeger that keeps traces in memory.
struct Jaeger {
    _process: OwnChild,
    _folder: tempfile::TempDir,
    query: Rest,
    otlp: String,
}

fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it is bound").to_string()
}

impl Jaeger {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("the temporary folder is writable");
        let (http, grpc, otlp) = (free_address(), free_address(), free_address());
        // YAML is a superset of JSON.
        let config = json!({
            "service": {
                "extensions": ["jaeger_storage", "jaeger_query"],
                "pipelines": {"traces": {
                    "receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"],
                }},
                "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
            },
            "extensions": {
                "jaeger_storage": {"backends": {"traces": {"memory": {"max_traces": 10000}}}},
                "jaeger_query": {
                    "storage": {"traces": "traces"}, "enable_tracing": false,
                    "http": {"endpoint": http}, "grpc": {"endpoint": grpc},
                },
            },
            "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": otlp}}}},
            "exporters": {"jaeger_storage_exporter": {"trace_storage": "traces"}},
        });
        let file = folder.path().join("jaeger.yaml");
        std::fs::write(&file, config.to_string()).expect("the folder is writable");
        let log = std::fs::File::create(folder.path().join("jaeger.log"));
        let mut command = Command::new(cached("bin/jaeger"));
        command
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("the folder is writable"));
        let process = OwnChild::spawn(&mut command);
        let query = Rest::new(vec![http]);
        wait_for("Jaeger to answer", DEADLINE, || query.get("/api/services"));
        Self {
            _process: process,
            _folder: folder,
            query,
            otlp: format!("http://{otlp}"),
        }
    }

    fn trace(&self, trace_id: &str) -> Result<Trace, String> {
        let answer = self.query.get(&format!("/api/traces/{trace_id}"))?;
        Trace::from_json(&answer["data"][0])
    }

    fn traces_of(&self, service: &str, operation: &str) -> Result<Vec<Trace>, String> {
        let path = format!("/api/traces?service={service}&operation={operation}&limit=100");
        let answer = self.query.get(&path)?;
        answer["data"]
            .as_array()
            .into_iter()
            .flatten()
            .map(Trace::from_json)
            .collect()
    }
}

#[derive(Debug, Clone)]
struct Span {
    id: String,
    parent: Option<String>,
    service: String,
    /// Which of the processes of that name.
    instance: String,
    operation: String,
    tags: BTreeMap<String, Value>,
}

#[derive(Debug)]
struct Trace {
    id: String,
    spans: Vec<Span>,
}

impl Trace {
    fn from_json(value: &Value) -> Result<Self, String> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let spans = value["spans"].as_array().ok_or("no such trace yet")?;
        let spans = spans.iter().map(|span| {
            let process = &value["processes"][text(&span["processID"])];
            let tags = span["tags"].as_array().into_iter().flatten();
            let mut of_process = process["tags"].as_array().into_iter().flatten();
            let instance = of_process
                .find(|tag| tag["key"] == INSTANCE)
                .map(|tag| &tag["value"]);
            Span {
                id: text(&span["spanID"]),
                parent: span["references"][0]["spanID"].as_str().map(str::to_owned),
                service: text(&process["serviceName"]),
                instance: instance.map(text).unwrap_or_default(),
                operation: text(&span["operationName"]),
                tags: tags
                    .map(|tag| (text(&tag["key"]), tag["value"].clone()))
                    .collect(),
            }
        });
        Ok(Self {
            id: text(&value["traceID"]),
            spans: spans.collect(),
        })
    }

    fn named(&self, operation: &str) -> Vec<&Span> {
        self.spans
            .iter()
            .filter(|span| span.operation == operation)
            .collect()
    }

    fn outline(&self) -> String {
        let line = |span: &Span| {
            format!(
                "{} {} {} {:?}",
                span.service, span.instance, span.operation, span.tags
            )
        };
        self.spans.iter().map(line).collect::<Vec<_>>().join("\n  ")
    }

    /// Complete: gateway, leader, and a log append on each of the three replicas.
    fn check_produce(&self) -> Result<(), String> {
        holds(
            self.named("kafka.Produce").len() == 1,
            "no span of the gateway",
        )?;
        holds(
            self.named("broker.produce").len() == 1,
            "no span of the leader",
        )?;
        let appends = self.named("wal.append");
        holds(
            appends.len() == 3,
            format!("{} appends: {}", appends.len(), self.outline()),
        )?;
        let brokers: BTreeSet<&str> = appends.iter().map(|span| span.instance.as_str()).collect();
        holds(
            brokers == BTreeSet::from(BROKERS),
            format!("appends of {brokers:?}: {}", self.outline()),
        )?;
        // Every span but the first hangs on another one of this trace.
        let ids: BTreeSet<&str> = self.spans.iter().map(|span| span.id.as_str()).collect();
        let loose: Vec<&Span> = self
            .spans
            .iter()
            .filter(|span| span.operation != "kafka.Produce")
            .filter(|span| {
                !span
                    .parent
                    .as_deref()
                    .is_some_and(|parent| ids.contains(parent))
            })
            .collect();
        holds(
            loose.is_empty(),
            format!("spans without their parent: {loose:?}"),
        )
    }
}

fn traced_cluster(name: &str, jaeger: &Jaeger, ratio: f64) -> Cluster {
    let options = Options {
        otlp_endpoint: Some(jaeger.otlp.clone()),
        trace_sample_ratio: Some(ratio),
        ..Options::default()
    };
    let mut cluster = Cluster::start_with(name, options);
    for broker in BROKERS {
        let attributes = format!("{INSTANCE}={broker}");
        cluster.kill_9(broker);
        cluster.start_service_with(broker, &[("OTEL_RESOURCE_ATTRIBUTES", &attributes)]);
    }
    for broker in BROKERS {
        cluster.wait_until_ready(broker, DEADLINE);
    }
    let rest = cluster.rest();
    rest.create_topic("traced", 1, 3, json!({}));
    rest.wait_until_healthy("traced", DEADLINE);
    cluster
}

fn produce(cluster: &Cluster, header: Option<&str>) {
    let bootstrap = cluster.bootstrap();
    let mut command = kcat(&[
        "-P", "-b", &bootstrap, "-t", "traced", "-p", "0", "-X", "acks=all",
    ]);
    if let Some(header) = header {
        command.args(["-H", header]);
    }
    run_ok(&mut command, "a record\n", DEADLINE);
}

#[test]
fn a_sampled_produce_is_one_trace_through_gateway_leader_and_followers() {
    let jaeger = Jaeger::start();
    let mut cluster = traced_cluster("traced", &jaeger, 1.0);
    produce(&cluster, None);
    let trace = wait_for("the trace to be complete in Jaeger", DEADLINE, || {
        // A write that came while leadership moved was refused and tried again: another trace.
        let mut seen = "no trace yet".to_owned();
        for trace in jaeger.traces_of("chronik-gateway", "kafka.Produce")? {
            match trace.check_produce() {
                Ok(()) => return Ok(trace),
                Err(missing) => seen = missing,
            }
        }
        Err(seen)
    });
    let first = trace.named("kafka.Produce")[0];
    assert_eq!(first.parent, None, "{first:?}");
    report(&format!(
        "trace {} of one produce:\n  {}",
        trace.id,
        trace.outline()
    ));
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn the_producers_own_trace_is_gone_on_with() {
    let jaeger = Jaeger::start();
    let mut cluster = traced_cluster("trace-header", &jaeger, 1.0);
    let trace_id = "0af7651916cd43dd8448eb211c80319c";
    produce(
        &cluster,
        Some(&format!("traceparent=00-{trace_id}-b7ad6b7169203331-01")),
    );
    wait_for("the trace to be complete in Jaeger", DEADLINE, || {
        let trace = jaeger.trace(trace_id)?;
        trace.check_produce()?;
        let first = trace.named("kafka.Produce")[0];
        holds(
            first.parent.as_deref() == Some("b7ad6b7169203331"),
            format!("{first:?}"),
        )
    });
    cluster.assert_no_panic();
    cluster.stop();
}

/// A call of the gateway, and what it makes another service do, in one trace.
fn wait_for_call(jaeger: &Jaeger, request: &str, call: &str) {
    wait_for(&format!("{request} with {call}"), DEADLINE, || {
        let traces = jaeger.traces_of("chronik-gateway", request)?;
        let is_whole = |trace: &Trace| {
            let of_request: BTreeSet<_> =
                trace.named(request).iter().map(|s| s.id.clone()).collect();
            let calls = trace.named(call);
            calls
                .iter()
                .any(|span| span.parent.as_ref().is_some_and(|p| of_request.contains(p)))
        };
        let seen = traces.first().map(Trace::outline);
        holds(
            traces.iter().any(is_whole),
            format!("{} traces, as {seen:?}", traces.len()),
        )
    });
}

#[test]
fn calls_of_the_gateway_carry_the_trace() {
    let jaeger = Jaeger::start();
    let mut cluster = traced_cluster("traced-calls", &jaeger, 1.0);
    let bootstrap = cluster.bootstrap();
    let create = [
        "--create",
        "--topic",
        "made",
        "--partitions",
        "1",
        "--replication-factor",
        "3",
    ];
    run_ok(&mut kafka_topics(&bootstrap, &create), "", DEADLINE);
    produce(&cluster, None);
    let consume = [
        "-b",
        &bootstrap,
        "-X",
        "auto.offset.reset=earliest",
        "-c",
        "1",
        "-G",
        "traced",
        "traced",
    ];
    run_ok(&mut kcat(&consume), "", DEADLINE);
    // What was made is flushed when the services stop.
    cluster.assert_no_panic();
    cluster.stop();
    for (request, call) in [
        ("kafka.CreateTopics", "controller.create_topics"),
        ("kafka.JoinGroup", "broker.join_group"),
        ("kafka.SyncGroup", "broker.sync_group"),
        ("kafka.OffsetFetch", "broker.fetch_offsets"),
        ("kafka.ListOffsets", "broker.list_offsets"),
        ("kafka.Fetch", "broker.fetch"),
    ] {
        wait_for_call(&jaeger, request, call);
    }
}

#[test]
fn nothing_is_sampled_where_the_ratio_is_zero() {
    let jaeger = Jaeger::start();
    let mut cluster = traced_cluster("untraced", &jaeger, 0.0);
    for _ in 0..20 {
        produce(&cluster, None);
    }
    // Spans are flushed when the services stop: what was made is in Jaeger after that.
    cluster.stop();
    let services = jaeger.query.get("/api/services").expect("Jaeger answers");
    let services = services["data"].as_array().cloned().unwrap_or_default();
    let chronik: Vec<_> = services
        .iter()
        .filter(|name| {
            name.as_str()
                .is_some_and(|name| name.starts_with("chronik"))
        })
        .collect();
    assert!(chronik.is_empty(), "spans were made by {chronik:?}");
}
