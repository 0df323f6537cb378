//! A gateway with a single listener before three brokers: the one port serves every client.
//!
//! Invariant: clients know no other address than that port, and there is none; Metadata names the real
//! brokers, leaders and replicas all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::ledger::{Production, verify};
use chronik_tests::rest::Partition;
use chronik_tests::tools::{kafka_consumer_groups, kafka_tool, kcat, run_ok};
use chronik_tests::wait::{holds, wait_for};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
const PARTITIONS: u32 = 6;
const RECORDS: usize = 3000;

/// A cluster whose gateway was started anew with the first of its listeners only, and that address.
fn cluster_behind_one_port() -> (Cluster, String) {
    let options = Options {
        controllers: 1,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("one-endpoint", options);
    let port = cluster.kafka()[0].clone();
    cluster.stop_service("gateway-1");
    let listeners = json!([port]).to_string();
    let environment = [("CHRONIK_GATEWAY_LISTENERS", listeners.as_str())];
    cluster.start_service_with("gateway-1", &environment);
    cluster.wait_until_ready("gateway-1", DEADLINE);
    (cluster, port)
}

fn metadata(port: &str, topic: &str) -> Result<Value, String> {
    let arguments = ["-L", "-J", "-b", port, "-t", topic];
    let list = run_ok(&mut kcat(&arguments), "", DEADLINE);
    serde_json::from_str(&list).map_err(|error| format!("{error}: {list}"))
}

/// Partition, leader, replicas, sorted ISR.
type Row = (i64, Option<i64>, Vec<i64>, Vec<i64>);

fn as_listed(topic: &Value) -> Vec<Row> {
    let ids = |value: &Value| -> Vec<i64> {
        let list = value.as_array().into_iter().flatten();
        list.filter_map(|one| one["id"].as_i64()).collect()
    };
    let row = |partition: &Value| {
        let mut isr = ids(&partition["isrs"]);
        isr.sort_unstable();
        let number = partition["partition"].as_i64().unwrap_or(-1);
        let replicas = ids(&partition["replicas"]);
        (number, partition["leader"].as_i64(), replicas, isr)
    };
    let list = topic["partitions"].as_array().into_iter().flatten();
    list.map(row).collect()
}

fn as_held(partitions: &[Partition]) -> Vec<Row> {
    let row = |p: &Partition| (p.partition, p.leader, p.replicas.clone(), p.isr.clone());
    partitions.iter().map(row).collect()
}

/// Three brokers at the one port, and each partition where the controllers have it. All of them lead: the
/// port has to pass requests on to each.
fn assert_metadata_is_true(cluster: &Cluster, port: &str, topic: &str) {
    let rest = cluster.rest();
    wait_for("Metadata of the real brokers", DEADLINE, || {
        let held = rest.partitions(topic)?;
        let told = metadata(port, topic)?;
        let brokers = json!([1, 2, 3].map(|id| json!({"id": id, "name": port})));
        holds(told["brokers"] == brokers, &told)?;
        holds(as_listed(&told["topics"][0]) == as_held(&held), &told)?;
        let leaders: BTreeSet<Option<i64>> = held.iter().map(|p| p.leader).collect();
        holds(leaders.len() == 3, format!("{leaders:?} lead"))
    });
}

/// Written with a key each: a key's records, and so a partition's, keep their order.
fn java_tools_write_and_read(port: &str, topic: &str) {
    let input: String = (0..RECORDS)
        .map(|number| format!("key-{}:{number:06}\n", number % 40))
        .collect();
    let mut produce = kafka_tool(
        "org.apache.kafka.tools.ConsoleProducer",
        &["--bootstrap-server", port, "--topic", topic],
    );
    produce
        .args(["--command-property", "acks=all"])
        .args(["--reader-property", "parse.key=true"])
        .args(["--reader-property", "key.separator=:"]);
    run_ok(&mut produce, &input, DEADLINE);
    let mut consume = kafka_tool(
        "org.apache.kafka.tools.consumer.ConsoleConsumer",
        &["--bootstrap-server", port, "--topic", topic],
    );
    consume
        .args(["--from-beginning", "--max-messages", &RECORDS.to_string()])
        .args(["--timeout-ms", "30000", "--group", "java-readers"])
        .args(["--formatter-property", "print.partition=true"])
        .args(["--formatter-property", "print.offset=true"])
        .args(["--formatter-property", "print.key=true"]);
    let output = run_ok(&mut consume, "", DEADLINE);

    let mut next: BTreeMap<String, usize> = BTreeMap::new();
    let mut last: BTreeMap<String, usize> = BTreeMap::new();
    let mut seen = vec![false; RECORDS];
    for line in output.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [partition, offset, key, number] = fields[..] else {
            panic!("a bad line: {line}")
        };
        let expected = next.entry(partition.to_owned()).or_default();
        assert_eq!(offset, format!("Offset:{expected}"), "{line}");
        *expected += 1;
        let number: usize = number.parse().expect("a number");
        assert_eq!(key, format!("key-{}", number % 40), "{line}");
        let before = last.insert(partition.to_owned(), number);
        assert!(
            before < Some(number),
            "out of order after {before:?}: {line}"
        );
        assert!(!std::mem::replace(&mut seen[number], true), "twice: {line}");
    }
    let missing = seen.iter().filter(|seen| !**seen).count();
    assert_eq!(missing, 0, "records that were not read");
    assert_eq!(next.len(), PARTITIONS as usize, "partitions: {next:?}");
}

/// All that the verified producer got acknowledged can be read once, in order, unchanged.
fn franz_go_writes_and_reads(cluster: &Cluster, port: &str, topic: &str) {
    let partitions = PARTITIONS.to_string();
    let records = (2 * RECORDS).to_string();
    let arguments = [
        "-partitions",
        &partitions,
        "-records",
        &records,
        "-acks",
        "all",
    ];
    let production = Production::start_at(port, &cluster.file(""), topic, &arguments);
    let produced = production.finish(DEADLINE);
    produced.assert_all_acked(2 * RECORDS as u64);
    let verdict = verify(port, topic, &produced.ledger);
    assert_eq!(verdict["read"], 2 * RECORDS, "{verdict}");
}

#[test]
fn one_listener_before_three_brokers_serves_every_client() {
    let (mut cluster, port) = cluster_behind_one_port();
    let rest = cluster.rest();
    for topic in ["java", "go"] {
        rest.create_topic(topic, PARTITIONS, 3, json!({"min.insync.replicas": "2"}));
        rest.wait_until_healthy(topic, DEADLINE);
    }
    let gateways = rest.get("/v1/gateways").expect("REST tells gateways");
    let endpoints = gateways["gateways"][0]["endpoints"].as_array();
    assert_eq!(endpoints.map(Vec::len), Some(1), "{gateways}");
    assert_metadata_is_true(&cluster, &port, "java");
    java_tools_write_and_read(&port, "java");
    franz_go_writes_and_reads(&cluster, &port, "go");
    // What a tool asks each broker for comes three times from the one port, and is one thing.
    let list = run_ok(&mut kafka_consumer_groups(&port, &["--list"]), "", DEADLINE);
    assert_eq!(list.trim(), "java-readers");
    assert_metadata_is_true(&cluster, &port, "go");
    cluster.assert_sound();
    cluster.stop();
}
