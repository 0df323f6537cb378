//! Administration: Apache Kafka's own kafka-topics, the REST API and `chronik` see one cluster.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use chronik_tests::bin_dir;
use chronik_tests::cluster::Cluster;
use chronik_tests::rest::Partition;
use chronik_tests::tools::{kafka_tool, kafka_topics, run, run_ok};
use chronik_tests::wait::{holds, wait_for};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

/// What `kafka-topics --describe` says: partition to leader, replicas, sorted ISR.
fn described(output: &str) -> BTreeMap<i64, (i64, Vec<i64>, Vec<i64>)> {
    let ids = |text: &str| -> Vec<i64> {
        text.split(',')
            .filter_map(|id| id.trim().parse().ok())
            .collect()
    };
    let mut partitions = BTreeMap::new();
    for line in output.lines().filter(|line| line.contains("\tPartition: ")) {
        let field = |name: &str| -> String {
            line.split('\t')
                .find_map(|field| field.trim().strip_prefix(name))
                .unwrap_or_else(|| panic!("no {name} in {line:?}"))
                .trim()
                .to_owned()
        };
        let mut isr = ids(&field("Isr:"));
        isr.sort_unstable();
        partitions.insert(
            field("Partition:").parse().expect("a partition number"),
            (
                field("Leader:").parse().unwrap_or(-1),
                ids(&field("Replicas:")),
                isr,
            ),
        );
    }
    partitions
}

fn as_described(partitions: &[Partition]) -> BTreeMap<i64, (i64, Vec<i64>, Vec<i64>)> {
    let row = |p: &Partition| (p.leader.unwrap_or(-1), p.replicas.clone(), p.isr.clone());
    partitions.iter().map(|p| (p.partition, row(p))).collect()
}

fn assert_tools_agree(cluster: &Cluster, topic: &str, partitions: usize) {
    let bootstrap = cluster.bootstrap();
    let rest = cluster.rest();
    wait_for("kafka-topics and REST to agree", DEADLINE, || {
        let before = rest.partitions(topic)?;
        let mut command = kafka_topics(&bootstrap, &["--describe", "--topic", topic]);
        let output = run_ok(&mut command, "", DEADLINE);
        let (kafka, rest) = (described(&output), as_described(&before));
        holds(
            kafka.len() == partitions,
            format!("{} partitions: {output}", kafka.len()),
        )?;
        holds(
            kafka == rest,
            format!("kafka-topics {kafka:?}, REST {rest:?}"),
        )
    });
}

/// What clients are promised, old ones and new ones. A version that goes is a break, one that comes is
/// added here. `api_versions.rs` calls them all.
pub const VERSIONS: [&str; 28] = [
    "Produce(0): 0 to 13",
    "Fetch(1): 4 to 18",
    "ListOffsets(2): 1 to 11",
    "Metadata(3): 0 to 13",
    "OffsetCommit(8): 2 to 10",
    "OffsetFetch(9): 1 to 10",
    "FindCoordinator(10): 0 to 6",
    "JoinGroup(11): 0 to 9",
    "Heartbeat(12): 0 to 4",
    "LeaveGroup(13): 0 to 5",
    "SyncGroup(14): 0 to 5",
    "DescribeGroups(15): 0 to 6",
    "ListGroups(16): 0 to 5",
    "ApiVersions(18): 0 to 5",
    "CreateTopics(19): 2 to 7",
    "DeleteTopics(20): 1 to 6",
    "DeleteRecords(21): 0 to 2",
    "InitProducerId(22): 0 to 5",
    "OffsetForLeaderEpoch(23): 2 to 4",
    "DescribeConfigs(32): 1 to 4",
    "DescribeLogDirs(35): 1 to 5",
    "CreatePartitions(37): 0 to 3",
    "ElectLeaders(43): 0 to 2",
    "IncrementalAlterConfigs(44): 0 to 1",
    "AlterPartitionReassignments(45): 0 to 1",
    "ListPartitionReassignments(46): 0",
    "DescribeCluster(60): 0 to 2",
    "UnregisterBroker(64): 0",
];

#[test]
fn kafkas_own_tool_finds_every_version_usable() {
    let mut cluster = Cluster::start("api-versions");
    let bootstrap = cluster.bootstrap();
    let arguments = ["--bootstrap-server", &bootstrap];
    let mut tool = kafka_tool(
        "org.apache.kafka.tools.BrokerApiVersionsCommand",
        &arguments,
    );
    let told = run_ok(&mut tool, "", DEADLINE);
    // Every endpoint says the same.
    let endpoints = told.lines().filter(|line| line.ends_with("-> (")).count();
    assert_eq!(endpoints, 3, "{told}");
    let offered = told.lines().filter(|line| line.contains("[usable: "));
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for line in offered {
        let (offer, _) = line.trim().split_once(" [usable: ").expect("just found");
        *seen.entry(offer).or_default() += 1;
    }
    let expected: BTreeMap<&str, usize> = VERSIONS.iter().map(|offer| (*offer, 3)).collect();
    assert_eq!(seen, expected, "{told}");
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn kafka_topics_creates_describes_alters_and_deletes() {
    let mut cluster = Cluster::start("kafka-topics");
    let bootstrap = cluster.bootstrap();
    let topics =
        |arguments: &[&str]| run_ok(&mut kafka_topics(&bootstrap, arguments), "", DEADLINE);
    topics(&[
        "--create",
        "--topic",
        "orders",
        "--partitions",
        "6",
        "--replication-factor",
        "3",
        "--config",
        "min.insync.replicas=2",
        "--config",
        "retention.ms=3600000",
    ]);
    let rest = cluster.rest();
    rest.wait_until_healthy("orders", DEADLINE);
    assert_tools_agree(&cluster, "orders", 6);
    let topic = rest.get("/v1/topics/orders").expect("REST knows the topic");
    assert_eq!(topic["configs"]["min.insync.replicas"], "2", "{topic}");
    assert!(topics(&["--describe", "--topic", "orders"]).contains("retention.ms=3600000"));

    let mut again = kafka_topics(&bootstrap, &["--create", "--topic", "orders"]);
    let refused = run(&mut again, "", DEADLINE);
    assert!(!refused.success, "a topic was created twice: {refused:?}");

    topics(&["--alter", "--topic", "orders", "--partitions", "9"]);
    rest.wait_until_healthy("orders", DEADLINE);
    assert_tools_agree(&cluster, "orders", 9);

    let entity = ["--entity-type", "topics", "--entity-name", "orders"];
    let configs = |arguments: &[&str]| {
        let mut all = vec!["--bootstrap-server", &bootstrap];
        all.extend(entity);
        all.extend(arguments);
        run_ok(
            &mut kafka_tool("kafka.admin.ConfigCommand", &all),
            "",
            DEADLINE,
        )
    };
    configs(&["--alter", "--add-config", "retention.ms=7200000"]);
    assert!(configs(&["--describe"]).contains("retention.ms=7200000"));

    // Every broker tells of its own disk.
    let arguments = ["--bootstrap-server", &bootstrap, "--describe"];
    let mut log_dirs = kafka_tool("org.apache.kafka.tools.LogDirsCommand", &arguments);
    let told = run_ok(&mut log_dirs, "", DEADLINE);
    let told = told.lines().find(|line| line.starts_with('{'));
    let told: Value = serde_json::from_str(told.expect("a line of JSON")).expect("JSON");
    let brokers = told["brokers"].as_array().expect("a list").clone();
    assert_eq!(brokers.len(), 3, "{told}");
    for broker in &brokers {
        let folder = format!("broker-{}", broker["broker"]);
        let log_dir = &broker["logDirs"][0];
        let path = log_dir["logDir"].as_str().unwrap_or_default();
        assert!(path.ends_with(&folder), "{broker}");
        let partitions = log_dir["partitions"].as_array().expect("a list");
        let of_topic = |one: &&Value| {
            let name = one["partition"].as_str().unwrap_or_default();
            name.starts_with("orders-")
        };
        assert_eq!(partitions.iter().filter(of_topic).count(), 9, "{broker}");
    }

    assert!(topics(&["--list"]).lines().any(|line| line == "orders"));
    topics(&["--delete", "--topic", "orders"]);
    wait_for("the topic to be gone", DEADLINE, || {
        let list = topics(&["--list"]);
        holds(!list.lines().any(|line| line == "orders"), list)
    });
    let gone = rest
        .ask(reqwest::Method::GET, "/v1/topics/orders", None)
        .expect("an answer");
    assert_eq!(gone.status, 404, "{gone:?}");
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn leaders_are_spread_over_the_brokers() {
    let mut cluster = Cluster::start("spread");
    let rest = cluster.rest();
    rest.create_topic("spread", 12, 3, json!({}));
    wait_for("each broker to lead a third", DEADLINE, || {
        let mut leaders: BTreeMap<Option<i64>, usize> = BTreeMap::new();
        for partition in rest.partitions("spread")? {
            *leaders.entry(partition.leader).or_default() += 1;
        }
        let balanced = leaders.len() == 3 && leaders.values().all(|count| *count == 4);
        holds(balanced, format!("{leaders:?}"))
    });
    assert_tools_agree(&cluster, "spread", 12);
    cluster.stop();
}

#[test]
fn chronik_administers_topics_over_rest() {
    let mut cluster = Cluster::start("cli");
    let urls: Vec<String> = cluster
        .rest_addresses()
        .iter()
        .map(|address| format!("http://{address}"))
        .collect();
    let urls = urls.join(",");
    let chronik = |arguments: &[&str]| {
        let mut command = Command::new(bin_dir().join("chronik"));
        command.args(arguments).env("CHRONIK_REST_URL", &urls);
        command
    };
    let ok = |arguments: &[&str]| run_ok(&mut chronik(arguments), "", DEADLINE);
    let as_json = |arguments: &[&str]| -> Value {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let output = ok(&all);
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("{error}: {output}"))
    };
    ok(&[
        "topic",
        "create",
        "books",
        "--partitions",
        "4",
        "--replication-factor",
        "3",
    ]);
    ok(&[
        "topic",
        "alter-config",
        "books",
        "--set",
        "retention.ms=1000000",
    ]);
    ok(&["topic", "add-partitions", "books", "--total", "5"]);
    let topic = as_json(&["topic", "describe", "books"]);
    assert_eq!(
        topic["partitions"].as_array().map(Vec::len),
        Some(5),
        "{topic}"
    );
    assert_eq!(topic["configs"]["retention.ms"], "1000000", "{topic}");
    let brokers = as_json(&["broker", "list"]);
    assert_eq!(
        brokers["brokers"].as_array().map(Vec::len),
        Some(3),
        "{brokers}"
    );
    assert_eq!(as_json(&["cluster", "describe"])["broker_count"], 3);

    let missing = run(
        &mut chronik(&["topic", "describe", "no-such-topic"]),
        "",
        DEADLINE,
    );
    assert!(
        !missing.success && missing.stderr.contains("no-such-topic"),
        "{missing:?}"
    );

    // Any controller takes a write, leader or not, also while another is down.
    cluster.kill_9("controller-1");
    wait_for("a write with one controller down", DEADLINE, || {
        let finished = run(&mut chronik(&["topic", "create", "after"]), "", DEADLINE);
        holds(
            finished.success || finished.stderr.contains("exist"),
            finished.stderr,
        )
    });
    wait_for("a deletion with one controller down", DEADLINE, || {
        let finished = run(&mut chronik(&["topic", "delete", "books"]), "", DEADLINE);
        holds(
            finished.success || finished.stderr.contains("no topic"),
            finished.stderr,
        )
    });
    wait_for("the topic to be gone", DEADLINE, || {
        let finished = run(&mut chronik(&["topic", "describe", "books"]), "", DEADLINE);
        holds(!finished.success, finished.stdout)
    });
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn rest_errors_are_problem_details_and_the_api_describes_itself() {
    let mut cluster = Cluster::start("rest");
    let rest = cluster.rest();
    let openapi = rest.get("/openapi.json").expect("OpenAPI is served");
    for path in [
        "/v1/cluster",
        "/v1/brokers",
        "/v1/gateways",
        "/v1/controllers",
        "/v1/topics",
    ] {
        assert!(
            openapi["paths"][path].is_object(),
            "{path} is not described"
        );
        rest.get(path).unwrap_or_else(|error| panic!("{error}"));
    }
    let topic = |name: &str| json!({"name": name, "partition_count": 1, "replication_factor": 1});
    for (method, path, body, status) in [
        (reqwest::Method::GET, "/v1/topics/none", None, 404),
        (reqwest::Method::GET, "/v1/nothing", None, 404),
        (reqwest::Method::DELETE, "/v1/cluster", None, 405),
        (
            reqwest::Method::POST,
            "/v1/topics",
            Some(topic("bad name")),
            400,
        ),
        (reqwest::Method::POST, "/v1/topics", Some(topic("..")), 400),
        (
            reqwest::Method::POST,
            "/v1/topics",
            Some(json!({"unknown": 1})),
            400,
        ),
    ] {
        let answer = rest
            .ask(method.clone(), path, body.as_ref())
            .expect("an answer");
        let told = format!("{method} {path}: {answer:?}");
        let in_range = answer.status == status || (status == 400 && answer.status == 422);
        assert!(in_range, "{told}");
        assert!(
            answer.content_type.starts_with("application/problem+json"),
            "{told}"
        );
        assert_eq!(answer.body["status"], answer.status, "{told}");
        assert!(
            answer.body["title"].is_string() && answer.body["detail"].is_string(),
            "{told}"
        );
    }
    cluster.assert_sound();
    cluster.stop();
}
