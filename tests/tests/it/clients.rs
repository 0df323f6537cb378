//! Unmodified Kafka clients: each writes a few thousand records with every codec it has, reads them
//! back in order and unchanged, and another client reads them too.

use std::time::Duration;

use chronik_tests::cluster::Cluster;
use chronik_tests::tools::{franz_go, kafka_tool, kcat, node, python, run_ok};
use serde_json::json;

const RECORDS: usize = 3000;
const DEADLINE: Duration = Duration::from_secs(180);
const CODECS: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];

/// Starts a cluster with a topic for each codec, named as the clients expect.
fn cluster_for(client: &str, partitions: u32) -> Cluster {
    let cluster = Cluster::start(client);
    let rest = cluster.rest();
    for codec in CODECS {
        rest.create_topic(&format!("{client}-{codec}"), partitions, 3, json!({}));
    }
    cluster
}

fn topics(client: &str) -> String {
    CODECS.map(|codec| format!("{client}-{codec}")).join(",")
}

/// Another client than the one that wrote them reads the records.
fn franz_go_reads(cluster: &Cluster, writer: &str) {
    let (topics, records) = (topics(writer), RECORDS.to_string());
    let arguments = ["-writer", writer, "-topic", &topics, "-records", &records];
    run_ok(
        &mut franz_go("read", &cluster.bootstrap(), &arguments),
        "",
        DEADLINE,
    );
}

fn value(writer: &str, number: usize) -> String {
    let letter = char::from(b'a' + u8::try_from(number % 26).expect("less than 26"));
    format!("{writer}:{number:08}:{}", letter.to_string().repeat(100))
}

fn all_values(writer: &str) -> String {
    (0..RECORDS)
        .map(|number| value(writer, number) + "\n")
        .collect()
}

#[test]
fn franz_go_round_trips_every_codec() {
    let mut cluster = cluster_for("franz-go", 3);
    let records = RECORDS.to_string();
    let mut command = franz_go("roundtrip", &cluster.bootstrap(), &["-records", &records]);
    run_ok(&mut command, "", DEADLINE);
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn confluent_kafka_round_trips_every_codec() {
    let mut cluster = cluster_for("confluent", 3);
    let (bootstrap, records) = (cluster.bootstrap(), RECORDS.to_string());
    run_ok(
        &mut python("roundtrip.py", &["confluent", &bootstrap, &records]),
        "",
        DEADLINE,
    );
    franz_go_reads(&cluster, "confluent");
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn kafka_python_round_trips_every_codec() {
    let mut cluster = cluster_for("kafka-python", 3);
    let (bootstrap, records) = (cluster.bootstrap(), RECORDS.to_string());
    run_ok(
        &mut python("roundtrip.py", &["kafka-python", &bootstrap, &records]),
        "",
        DEADLINE,
    );
    franz_go_reads(&cluster, "kafka-python");
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn kafkajs_round_trips_every_codec() {
    let mut cluster = cluster_for("kafkajs", 3);
    let (bootstrap, records) = (cluster.bootstrap(), RECORDS.to_string());
    run_ok(
        &mut node("roundtrip.js", &[&bootstrap, &records]),
        "",
        DEADLINE,
    );
    franz_go_reads(&cluster, "kafkajs");
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn kcat_round_trips_every_codec() {
    let mut cluster = cluster_for("kcat", 1);
    let bootstrap = cluster.bootstrap();
    let input = all_values("kcat");
    for codec in CODECS {
        let topic = format!("kcat-{codec}");
        let mut produce = kcat(&[
            "-P", "-b", &bootstrap, "-t", &topic, "-z", codec, "-X", "acks=all",
        ]);
        run_ok(&mut produce, &input, DEADLINE);
        let mut consume = kcat(&[
            "-C",
            "-q",
            "-e",
            "-b",
            &bootstrap,
            "-t",
            &topic,
            "-o",
            "beginning",
            "-X",
            "check.crcs=true",
        ]);
        let output = run_ok(&mut consume, "", DEADLINE);
        assert!(
            output == input,
            "{topic}: read {} of {RECORDS} lines",
            output.lines().count()
        );
    }
    franz_go_reads(&cluster, "kcat");
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn kcat_creates_a_topic_by_writing_to_it() {
    let mut cluster = Cluster::start("kcat-hello");
    let bootstrap = cluster.kafka()[0].clone();
    run_ok(
        &mut kcat(&["-P", "-b", &bootstrap, "-t", "hello"]),
        "hello\n",
        DEADLINE,
    );
    let mut consume = kcat(&["-C", "-q", "-e", "-b", &bootstrap, "-t", "hello"]);
    assert_eq!(run_ok(&mut consume, "", DEADLINE), "hello\n");
    let list = run_ok(&mut kcat(&["-L", "-J", "-b", &bootstrap]), "", DEADLINE);
    let list: serde_json::Value = serde_json::from_str(&list).expect("kcat -J prints JSON");
    assert_eq!(list["brokers"].as_array().map(Vec::len), Some(3), "{list}");
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn the_java_console_tools_round_trip_every_codec() {
    let mut cluster = cluster_for("java", 1);
    let bootstrap = cluster.bootstrap();
    let input = all_values("java");
    let records = RECORDS.to_string();
    for codec in CODECS {
        let topic = format!("java-{codec}");
        let mut produce = kafka_tool(
            "org.apache.kafka.tools.ConsoleProducer",
            &[
                "--bootstrap-server",
                &bootstrap,
                "--topic",
                &topic,
                "--compression-codec",
                codec,
                "--command-property",
                "acks=all",
            ],
        );
        run_ok(&mut produce, &input, DEADLINE);
        let mut consume = kafka_tool(
            "org.apache.kafka.tools.consumer.ConsoleConsumer",
            &[
                "--bootstrap-server",
                &bootstrap,
                "--topic",
                &topic,
                "--from-beginning",
                "--max-messages",
                &records,
                "--timeout-ms",
                "30000",
            ],
        );
        let output = run_ok(&mut consume, "", DEADLINE);
        assert!(
            output == input,
            "{topic}: read {} of {RECORDS} lines",
            output.lines().count()
        );
    }
    franz_go_reads(&cluster, "java");
    cluster.assert_sound();
    cluster.stop();
}
