//! The REST API: every route, problem documents, OpenAPI, writes through a follower.

use std::time::Duration;

use crate::common::{FakeBroker, Group, within};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode, header};
use chronik_controller::controller::Controller;
use chronik_controller::metrics::Metrics;
use chronik_controller::rest;
use chronik_telemetry::http::Health;
use serde_json::{Value, json};
use tower::ServiceExt;

fn router(controller: &Controller) -> Router {
    let (_, registry) = Metrics::new();
    rest::router(controller.clone(), registry, Health::new())
}

async fn call(router: &Router, method: Method, uri: &str, body: &str) -> (StatusCode, Value) {
    let request = Request::builder()
        .method(method)
        .uri(uri)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_owned()))
        .unwrap();
    let response = within(uri, router.clone().oneshot(request)).await.unwrap();
    let status = response.status();
    let content_type = response.headers().get(header::CONTENT_TYPE).cloned();
    let bytes = to_bytes(response.into_body(), 10_000_000).await.unwrap();
    if status.is_client_error() || status.is_server_error() {
        assert_eq!(content_type.unwrap(), "application/problem+json");
        let problem: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(problem["status"], status.as_u16());
        assert_eq!(problem["instance"], uri);
        for field in ["type", "title", "detail"] {
            assert!(
                !problem[field].as_str().unwrap().is_empty(),
                "{field} of {problem}"
            );
        }
        return (status, problem);
    }
    (
        status,
        serde_json::from_slice(&bytes).unwrap_or(Value::Null),
    )
}

/// The last part of a problem's type.
fn kind(problem: &Value) -> &str {
    problem["type"]
        .as_str()
        .unwrap()
        .rsplit('/')
        .next()
        .unwrap()
}

#[tokio::test]
async fn topics_are_managed_through_any_controller() {
    let group = Group::start(3).await;
    let leader = group.leader().await;
    let mut broker = FakeBroker::register(&group, leader, 1).await;
    let mut heart = FakeBroker {
        sessions: broker.sessions.clone(),
        ..broker
    };
    let images = group.controller(leader).feed().subscribe();
    let router = router(group.controller(group.follower_of(leader)));
    let work = async {
        let topic = r#"{"name":"t","partition_count":2,"replication_factor":1,"configs":{"retention.ms":"5"}}"#;
        let (status, created) = call(&router, Method::POST, "/v1/topics", topic).await;
        assert_eq!(
            (status, &created["partition_count"]),
            (StatusCode::CREATED, &json!(2))
        );
        let (status, problem) = call(&router, Method::POST, "/v1/topics", topic).await;
        assert_eq!(
            (status, kind(&problem)),
            (StatusCode::CONFLICT, "topic-already-exists")
        );
        let bad = r#"{"name":"a/b"}"#;
        let (status, problem) = call(&router, Method::POST, "/v1/topics", bad).await;
        assert_eq!(
            (status, kind(&problem)),
            (StatusCode::BAD_REQUEST, "invalid-topic-name")
        );

        let (_, topic) = call(&router, Method::GET, "/v1/topics/t", "").await;
        assert_eq!(topic["configs"], json!({"retention.ms": "5"}));
        let partition = &topic["partitions"][0];
        assert_eq!(
            (&partition["leader"], &partition["leader_epoch"]),
            (&json!(1), &json!(1)),
            "{topic}"
        );
        assert_eq!(
            (&partition["replicas"], &partition["isr"]),
            (&json!([1]), &json!([1]))
        );
        let (_, topics) = call(&router, Method::GET, "/v1/topics", "").await;
        assert_eq!(topics["topics"][0]["name"], "t");

        let uri = "/v1/topics/t/configs";
        let patch = r#"{"configs":{"retention.ms":null,"segment.ms":"7"},"append":{"cleanup.policy":"compact"}}"#;
        let (status, topic) = call(&router, Method::PATCH, uri, patch).await;
        assert_eq!(status, StatusCode::OK);
        let configs = json!({"cleanup.policy": "delete,compact", "segment.ms": "7"});
        assert_eq!(topic["configs"], configs);
        let patch = r#"{"configs":{"no.such.key":"1"}}"#;
        let (status, problem) = call(&router, Method::PATCH, uri, patch).await;
        assert_eq!(
            (status, kind(&problem)),
            (StatusCode::BAD_REQUEST, "invalid-config")
        );

        let uri = "/v1/topics/t/partitions";
        let (status, topic) = call(&router, Method::POST, uri, r#"{"total_count":3}"#).await;
        assert_eq!(
            (status, &topic["partition_count"]),
            (StatusCode::OK, &json!(3))
        );
        let (status, problem) = call(&router, Method::POST, uri, r#"{"total_count":3}"#).await;
        assert_eq!(
            (status, kind(&problem)),
            (StatusCode::BAD_REQUEST, "invalid-partitions")
        );

        let (status, _) = call(&router, Method::DELETE, "/v1/topics/t", "").await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        let (status, problem) = call(&router, Method::GET, "/v1/topics/t", "").await;
        assert_eq!(
            (status, kind(&problem)),
            (StatusCode::NOT_FOUND, "unknown-topic")
        );
        let (status, problem) = call(&router, Method::DELETE, "/v1/topics/t", "").await;
        assert_eq!(
            (status, kind(&problem)),
            (StatusCode::NOT_FOUND, "unknown-topic")
        );
    };
    tokio::select! {
        () = broker.lead_all(images) => panic!("the broker ended"),
        () = heart.live(Duration::from_millis(300)) => panic!("the broker ended"),
        () = work => {}
    }
}

#[tokio::test]
async fn the_cluster_is_described_and_errors_are_problems() {
    let group = Group::start(1).await;
    group.leader().await;
    FakeBroker::register(&group, 0, 7).await;
    let router = router(group.controller(0));
    let (_, cluster) = call(&router, Method::GET, "/v1/cluster", "").await;
    assert_eq!(
        (&cluster["controller_leader"], &cluster["broker_count"]),
        (&json!(1), &json!(1))
    );
    let (_, controllers) = call(&router, Method::GET, "/v1/controllers", "").await;
    assert_eq!(controllers["controllers"][0]["is_leader"], true);
    let (_, brokers) = call(&router, Method::GET, "/v1/brokers", "").await;
    assert_eq!(brokers["brokers"][0]["broker_id"], 7);
    let (_, broker) = call(&router, Method::GET, "/v1/brokers/7", "").await;
    assert_eq!(broker["fenced"], false);
    let (_, gateways) = call(&router, Method::GET, "/v1/gateways", "").await;
    assert_eq!(gateways["gateways"], json!([]));

    for (method, uri, body, expected) in [
        (Method::GET, "/v1/brokers/8", "", StatusCode::NOT_FOUND),
        (Method::GET, "/v1/brokers/x", "", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/nothing", "", StatusCode::NOT_FOUND),
        (
            Method::PUT,
            "/v1/topics",
            "",
            StatusCode::METHOD_NOT_ALLOWED,
        ),
        (Method::POST, "/v1/topics", "{", StatusCode::BAD_REQUEST),
        (
            Method::POST,
            "/v1/topics",
            r#"{"nam":"t"}"#,
            StatusCode::UNPROCESSABLE_ENTITY,
        ),
    ] {
        let (status, _) = call(&router, method, uri, body).await;
        assert_eq!(status, expected, "{uri} {body}");
    }
}

#[tokio::test]
async fn openapi_names_every_route() {
    let group = Group::start(1).await;
    let router = router(group.controller(0));
    let (_, document) = call(&router, Method::GET, "/openapi.json", "").await;
    let mut routes: Vec<String> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| {
            item.as_object()
                .unwrap()
                .keys()
                .map(move |method| format!("{method} {path}"))
        })
        .collect();
    routes.sort_unstable();
    assert_eq!(
        routes,
        [
            "delete /v1/brokers/{broker_id}",
            "delete /v1/brokers/{broker_id}/drain",
            "delete /v1/reassignments",
            "delete /v1/topics/{name}",
            "get /v1/brokers",
            "get /v1/brokers/{broker_id}",
            "get /v1/brokers/{broker_id}/drain",
            "get /v1/cluster",
            "get /v1/cluster/backup",
            "get /v1/cluster/settings",
            "get /v1/controllers",
            "get /v1/gateways",
            "get /v1/partitions",
            "get /v1/reassignments",
            "get /v1/topics",
            "get /v1/topics/{name}",
            "patch /v1/cluster/settings",
            "patch /v1/topics/{name}/configs",
            "post /v1/brokers/{broker_id}/drain",
            "post /v1/leader-elections",
            "post /v1/reassignments",
            "post /v1/rebalance",
            "post /v1/topics",
            "post /v1/topics/{name}/partitions",
        ]
    );
    assert!(document["components"]["schemas"]["Problem"].is_object());
}

#[tokio::test]
async fn probes_and_metrics_answer_on_the_rest_port() {
    let group = Group::start(1).await;
    group.leader().await;
    let (metrics, registry) = Metrics::new();
    drop(metrics);
    let router = rest::router(group.controller(0).clone(), registry, Health::new());
    let get = async |uri: &str| {
        let request = Request::get(uri).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = to_bytes(response.into_body(), 1_000_000).await.unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    };
    assert_eq!(get("/healthz").await.0, StatusCode::OK);
    assert_eq!(get("/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get("/metrics").await.0, StatusCode::OK);
    // What the running controller itself serves.
    let address = group.controllers[0].as_ref().unwrap().rest_address;
    let text = within("metrics", http_get(address, "/metrics")).await;
    for name in [
        "chronik_controller_is_leader 1",
        "chronik_controller_image_revision 1",
        "chronik_controller_commands_total{result=\"applied\"} 1",
        "chronik_controller_brokers{state=\"active\"} 0",
        "chronik_controller_partitions{state=\"leaderless\"} 0",
        "chronik_controller_raft_log_index{position=\"applied\"}",
        "chronik_controller_raft_term",
        "chronik_controller_watchers 0",
        "chronik_controller_full_images_sent_total 0",
        "chronik_controller_gateways 0",
        "chronik_controller_topics 0",
    ] {
        assert!(text.contains(name), "{name} is not in\n{text}");
    }
    assert!(
        within("ready", http_get(address, "/readyz"))
            .await
            .contains("200 OK")
    );
}

async fn http_get(address: std::net::SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}
