//! Consumer groups as Apache Kafka's own kafka-consumer-groups shows them.
//!
//! Invariant: every figure is known beforehand: offsets that were committed, ends that follow from what
//! was written, and the one member, which consumes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::process::Talking;
use chronik_tests::tools::{franz_go, kafka_consumer_groups, kcat, run_ok};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(60);
const GROUP: &str = "readers";
const TOPIC: &str = "work";

type Row = BTreeMap<String, String>;

/// A table with a line of names above it: each row by its columns' names.
fn table(output: &str) -> Vec<Row> {
    let mut lines = output
        .lines()
        .skip_while(|line| !line.starts_with("GROUP "));
    let words = |line: &str| -> Vec<String> { line.split_whitespace().map(String::from).collect() };
    let names = words(lines.next().unwrap_or_else(|| panic!("no table: {output}")));
    let row = |line: &str| -> Row {
        let values = words(line);
        assert_eq!(values.len(), names.len(), "{output}");
        names.iter().cloned().zip(values).collect()
    };
    lines.filter(|line| !line.is_empty()).map(row).collect()
}

fn columns<'a>(row: &'a Row, names: &[&str]) -> Vec<&'a str> {
    let value = |name: &&str| match row.get(*name) {
        Some(value) => value.as_str(),
        None => panic!("no column {name}: {row:?}"),
    };
    names.iter().map(value).collect()
}

fn groups(cluster: &Cluster, arguments: &[&str]) -> String {
    let mut command = kafka_consumer_groups(&cluster.bootstrap(), arguments);
    run_ok(&mut command, "", DEADLINE)
}

/// `--describe` of the group, sorted by partition.
fn described(cluster: &Cluster) -> Vec<Row> {
    let mut rows = table(&groups(cluster, &["--describe", "--group", GROUP]));
    rows.sort_by_key(|row| row.get("PARTITION").cloned());
    rows
}

/// The figures of each row must be these: partition, committed, end, lag.
fn assert_figures(rows: &[Row], expected: &[[&str; 4]]) {
    let names = [
        "GROUP",
        "TOPIC",
        "PARTITION",
        "CURRENT-OFFSET",
        "LOG-END-OFFSET",
        "LAG",
    ];
    let seen: Vec<Vec<&str>> = rows.iter().map(|row| columns(row, &names)).collect();
    let expected: Vec<Vec<&str>> = expected
        .iter()
        .map(|figures| [[GROUP, TOPIC].as_slice(), figures.as_slice()].concat())
        .collect();
    assert_eq!(seen, expected);
}

fn write(cluster: &Cluster, partition: u32, records: usize) {
    let (bootstrap, partition) = (cluster.bootstrap(), partition.to_string());
    let arguments = [
        "-P", "-b", &bootstrap, "-t", TOPIC, "-p", &partition, "-X", "acks=all",
    ];
    run_ok(
        &mut kcat(&arguments),
        &"a record\n".repeat(records),
        DEADLINE,
    );
}

#[test]
fn kafka_consumer_groups_tells_the_true_figures() {
    let options = Options {
        controllers: 1,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("group-tools", options);
    cluster.rest().create_topic(TOPIC, 3, 3, json!({}));
    for (partition, records) in [(0, 10), (1, 20), (2, 30)] {
        write(&cluster, partition, records);
    }
    // Nothing is committed for the last partition.
    let offsets = "0=4,1=20";
    let arguments = ["-topic", TOPIC, "-group", GROUP, "-offsets", offsets];
    let mut command = franz_go("hold", &cluster.bootstrap(), &arguments);
    let member = Talking::spawn("member", &mut command, &cluster.file("member.log"));
    member.wait_for_line("all partitions", DEADLINE, |line| {
        (line == "holding 3").then_some(())
    });

    assert_eq!(groups(&cluster, &["--list"]).trim(), GROUP);
    let rows = described(&cluster);
    assert_figures(
        &rows,
        &[
            ["0", "4", "10", "6"],
            ["1", "20", "20", "0"],
            ["2", "-", "30", "-"],
        ],
    );

    let members = table(&groups(
        &cluster,
        &["--describe", "--group", GROUP, "--members"],
    ));
    let who = ["GROUP", "HOST", "CLIENT-ID", "#PARTITIONS"];
    let seen: Vec<Vec<&str>> = members.iter().map(|row| columns(row, &who)).collect();
    assert_eq!(seen, [[GROUP, "/127.0.0.1", "holder", "3"]]);
    // Every partition is that member's.
    let same = ["CONSUMER-ID", "HOST", "CLIENT-ID"];
    let member_columns = columns(&members[0], &same);
    assert!(member_columns[0].starts_with("holder-"), "{members:?}");
    for row in &rows {
        assert_eq!(columns(row, &same), member_columns);
    }

    // Who falls behind, falls behind by so much.
    write(&cluster, 1, 5);
    let behind = [
        ["0", "4", "10", "6"],
        ["1", "20", "25", "5"],
        ["2", "-", "30", "-"],
    ];
    assert_figures(&described(&cluster), &behind);

    // Without members the offsets stay, and what was never committed is not told.
    member.finish(DEADLINE);
    let rows = described(&cluster);
    assert_figures(&rows, &behind[..2]);
    for row in &rows {
        assert_eq!(columns(row, &same), ["-", "-", "-"]);
    }
    let members = ["--describe", "--group", GROUP, "--members"];
    assert!(table(&groups(&cluster, &members)).is_empty());
    assert_eq!(groups(&cluster, &["--list"]).trim(), GROUP);
    cluster.assert_sound();
    cluster.stop();
}
