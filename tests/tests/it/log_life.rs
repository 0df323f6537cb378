//! The life of a log: deletion by hand, by age and by size, on every replica.

use std::collections::BTreeMap;
use std::time::Duration;

use chronik_tests::cluster::{BROKERS, Cluster};
use chronik_tests::log_files;
use chronik_tests::numbered::{read, write};
use chronik_tests::tools::{kafka_tool, kafka_topics, kcat, run, run_ok};
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

fn earliest(cluster: &Cluster, topic: &str) -> i64 {
    let query = format!("{topic}:0:-2");
    let bootstrap = cluster.bootstrap();
    // kcat asks once; after a restart the leader may just be changing.
    wait_for("an answer about the log start", DEADLINE, || {
        let asked = run(
            &mut kcat(&["-Q", "-b", &bootstrap, "-t", &query]),
            "",
            DEADLINE,
        );
        holds(asked.success, &asked.stderr)?;
        let offset = asked.stdout.trim().rsplit(' ').next().unwrap_or_default();
        offset.parse().map_err(|_| asked.stdout.clone())
    })
}

/// kill -9 of everything, and all up again.
fn crash(cluster: &mut Cluster, topic: &str) {
    cluster.kill_9_everything();
    cluster.launch();
    cluster.rest().wait_until_healthy(topic, DEADLINE);
}

fn delete_records(cluster: &Cluster, topic: &str, offset: i64) -> String {
    let file = cluster.file("delete.json");
    let wanted = json!({"version": 1, "partitions": [
        {"topic": topic, "partition": 0, "offset": offset}]});
    std::fs::write(&file, wanted.to_string()).expect("the test's folder is writable");
    let bootstrap = cluster.bootstrap();
    let path = file.to_string_lossy();
    let mut command = kafka_tool(
        "org.apache.kafka.tools.DeleteRecordsCommand",
        &[
            "--bootstrap-server",
            &bootstrap,
            "--offset-json-file",
            &path,
        ],
    );
    let finished = run(&mut command, "", DEADLINE);
    format!("{}{}", finished.stdout, finished.stderr)
}

#[test]
fn records_are_deleted_by_kafkas_own_tool_on_every_replica() {
    let mut cluster = Cluster::with_log_settings("delete-records", &[]);
    let rest = cluster.rest();
    rest.create_topic("trim", 1, 3, json!({}));
    rest.wait_until_healthy("trim", DEADLINE);
    write(&cluster, "trim", 0, 100);
    let told = delete_records(&cluster, "trim", 40);
    assert!(told.contains("low_watermark: 40"), "{told}");
    assert_eq!(earliest(&cluster, "trim"), 40);
    assert_eq!(read(&cluster, "trim"), (40..100).collect::<Vec<_>>());
    let told = delete_records(&cluster, "trim", 101);
    assert!(
        told.to_lowercase().contains("out of range") || told.contains("OffsetOutOfRange"),
        "{told}"
    );
    // What was agreed on is known to whoever leads next, and after a crash of all.
    let leader = rest.partition("trim", 0).unwrap().leader.unwrap();
    cluster.kill_9(&format!("broker-{leader}"));
    assert_eq!(read(&cluster, "trim"), (40..100).collect::<Vec<_>>());
    crash(&mut cluster, "trim");
    assert_eq!(earliest(&cluster, "trim"), 40);
    assert_eq!(read(&cluster, "trim"), (40..100).collect::<Vec<_>>());
    let told = delete_records(&cluster, "trim", -1);
    assert!(told.contains("low_watermark: 100"), "{told}");
    assert_eq!(read(&cluster, "trim"), Vec::<u64>::new());
    write(&cluster, "trim", 100, 10);
    assert_eq!(read(&cluster, "trim"), (100..110).collect::<Vec<_>>());
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn retention_by_size_and_age_frees_the_disks_of_all_replicas() {
    let settings = [("RETENTION_CHECK_INTERVAL_MS", "500")];
    let mut cluster = Cluster::with_log_settings("retention", &settings);
    let rest = cluster.rest();
    let configs = json!({"segment.bytes": "1048576", "retention.bytes": "3145728"});
    rest.create_topic("kept", 1, 3, configs);
    rest.wait_until_healthy("kept", DEADLINE);
    write(&cluster, "kept", 0, 16 * 1024);
    // What is still in memory is no file yet, so the files alone say nothing.
    wait_for("the log start to rise", DEADLINE, || {
        let start = earliest(&cluster, "kept");
        holds(start > 10 * 1024, start)
    });
    for broker in BROKERS {
        wait_for(&format!("{broker} to delete"), DEADLINE, || {
            let bytes = log_files::size(&cluster, broker);
            holds(bytes < 6 * MIB, format!("{bytes} bytes"))
        });
    }
    let start = earliest(&cluster, "kept");
    let all: Vec<u64> = (start as u64..16 * 1024).collect();
    assert_eq!(read(&cluster, "kept"), all);
    crash(&mut cluster, "kept");
    assert!(earliest(&cluster, "kept") >= start);
    // By age, with a config that takes effect without a restart.
    let bootstrap = cluster.bootstrap();
    let mut alter = kafka_tool(
        "kafka.admin.ConfigCommand",
        &[
            "--bootstrap-server",
            &bootstrap,
            "--alter",
            "--entity-type",
            "topics",
            "--entity-name",
            "kept",
            "--add-config",
            "retention.ms=1000",
        ],
    );
    run_ok(&mut alter, "", DEADLINE);
    for broker in BROKERS {
        wait_for(&format!("{broker} to delete all"), DEADLINE, || {
            let bytes = log_files::size(&cluster, broker);
            holds(bytes == 0, format!("{bytes} bytes"))
        });
    }
    assert_eq!(earliest(&cluster, "kept"), 16 * 1024);
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_deleted_topic_gives_its_disk_back() {
    let mut cluster = Cluster::with_log_settings("deleted", &[]);
    let rest = cluster.rest();
    rest.create_topic("gone", 1, 3, json!({}));
    rest.wait_until_healthy("gone", DEADLINE);
    write(&cluster, "gone", 0, 8 * 1024);
    for broker in BROKERS {
        wait_for(&format!("{broker} to write segments"), DEADLINE, || {
            let bytes = log_files::size(&cluster, broker);
            holds(bytes > 4 * MIB, format!("{bytes} bytes"))
        });
    }
    let bootstrap = cluster.bootstrap();
    let mut delete = kafka_topics(&bootstrap, &["--delete", "--topic", "gone"]);
    run_ok(&mut delete, "", DEADLINE);
    for broker in BROKERS {
        wait_for(&format!("{broker} to delete"), DEADLINE, || {
            let left = log_files::folders(&cluster, broker);
            holds(left.is_empty(), format!("{left:?}"))
        });
    }
    cluster.assert_no_panic();
    cluster.stop();
}

/// Last value of each key.
fn read_by_key(cluster: &Cluster, topic: &str) -> BTreeMap<String, String> {
    let bootstrap = cluster.bootstrap();
    let mut consume = kcat(&[
        "-C",
        "-q",
        "-e",
        "-b",
        &bootstrap,
        "-t",
        topic,
        "-p",
        "0",
        "-o",
        "beginning",
        "-K",
        "\t",
    ]);
    let output = run_ok(&mut consume, "", DEADLINE);
    let pairs = output.lines().filter_map(|line| line.split_once('\t'));
    pairs
        .map(|(key, value)| (key.to_owned(), value[..8].to_owned()))
        .collect()
}

#[test]
fn a_compacted_topic_keeps_the_last_value_of_every_key_on_every_replica() {
    const KEYS: usize = 100;
    const ROUNDS: usize = 120;
    let settings = [("RETENTION_CHECK_INTERVAL_MS", "500")];
    let mut cluster = Cluster::with_log_settings("compacted", &settings);
    let rest = cluster.rest();
    let configs = json!({"cleanup.policy": "compact", "segment.bytes": "1048576",
        "min.cleanable.dirty.ratio": "0.01", "delete.retention.ms": "1000"});
    rest.create_topic("latest", 1, 3, configs);
    rest.wait_until_healthy("latest", DEADLINE);
    let filler = "x".repeat(1000);
    let mut input = String::new();
    for round in 0..ROUNDS {
        for key in 0..KEYS {
            input.push_str(&format!("key-{key:03}\t{round:08} {filler}\n"));
        }
    }
    let bootstrap = cluster.bootstrap();
    let mut produce = kcat(&[
        "-P",
        "-b",
        &bootstrap,
        "-t",
        "latest",
        "-p",
        "0",
        "-K",
        "\t",
        "-X",
        "acks=all",
        "-X",
        "enable.idempotence=true",
    ]);
    run_ok(&mut produce, &input, DEADLINE);
    for broker in BROKERS {
        wait_for(&format!("{broker} to compact"), DEADLINE, || {
            let bytes = log_files::size(&cluster, broker);
            holds(bytes < 3 * MIB, format!("{bytes} bytes"))
        });
    }
    let expected: BTreeMap<String, String> = (0..KEYS)
        .map(|key| (format!("key-{key:03}"), format!("{:08}", ROUNDS - 1)))
        .collect();
    assert_eq!(read_by_key(&cluster, "latest"), expected);
    crash(&mut cluster, "latest");
    assert_eq!(read_by_key(&cluster, "latest"), expected);
    // Whoever leads has the same.
    let leader = rest.partition("latest", 0).expect("REST answers").leader;
    cluster.kill_9(&format!("broker-{}", leader.expect("a leader")));
    assert_eq!(read_by_key(&cluster, "latest"), expected);
    cluster.start_service(&format!("broker-{}", leader.expect("a leader")));
    rest.wait_until_healthy("latest", DEADLINE);

    // A record without a key would be lost with the next compaction: it is refused.
    let to_latest = ["-P", "-b", &bootstrap, "-t", "latest", "-p", "0"];
    let refused = run(&mut kcat(&to_latest), "no key\n", DEADLINE);
    let told = format!("{}{}", refused.stdout, refused.stderr);
    assert!(told.contains("Delivery failed"), "{refused:?}");
    // How librdkafka words INVALID_RECORD: any other error would not be about the key.
    assert!(told.contains("failed to validate record"), "{refused:?}");

    // A deleted key is told to consumers for delete.retention.ms, then nothing is left of it.
    let keyed = [&to_latest[..], &["-K", "\t", "-Z", "-X", "acks=all"]].concat();
    run_ok(&mut kcat(&keyed), "key-000\t\n", DEADLINE);
    let full = format!("key-001\t{:08} {filler}\n", ROUNDS);
    wait_for("nothing to be left of a deleted key", DEADLINE, || {
        // What compaction may look at is sealed by what comes after.
        run_ok(&mut kcat(&keyed), &full.repeat(300), DEADLINE);
        let of_latest = [
            "-C", "-q", "-e", "-b", &bootstrap, "-t", "latest", "-K", "\t",
        ];
        let lines = run_ok(&mut kcat(&of_latest), "", DEADLINE);
        let left = lines.lines().filter(|line| line.starts_with("key-000"));
        let mut other = lines.lines().filter(|line| line.starts_with("key-002"));
        assert!(other.next().is_some(), "other keys stay");
        holds(left.count() == 0, "the key or its tombstone is still there")
    });
    cluster.assert_no_panic();
    cluster.stop();
}
