//! Records that carry their numbers, written and read by kcat: what can be read is a list of numbers.
//!
//! Invariant: all are in partition 0, of about 1 KiB each, and acknowledged by acks=all.

use std::process::Command;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::tools::{kcat, run_ok};

const DEADLINE: Duration = Duration::from_secs(120);

fn at_partition_0(cluster: &Cluster, topic: &str, mode: &str) -> Command {
    let bootstrap = cluster.bootstrap();
    kcat(&[mode, "-b", &bootstrap, "-t", topic, "-p", "0"])
}

/// Writes `count` records, numbered from `first`.
pub fn write(cluster: &Cluster, topic: &str, first: u64, count: u64) {
    let filler = "x".repeat(1000);
    let input: String = (first..first + count)
        .map(|number| format!("{number:08} {filler}\n"))
        .collect();
    let options = ["acks=all", "enable.idempotence=true", "linger.ms=5"];
    let options = options.iter().flat_map(|option| ["-X", *option]);
    let mut produce = at_partition_0(cluster, topic, "-P");
    produce.args(options);
    run_ok(&mut produce, &input, DEADLINE);
}

/// Numbers of all records that can be read.
pub fn read(cluster: &Cluster, topic: &str) -> Vec<u64> {
    let mut consume = at_partition_0(cluster, topic, "-C");
    consume.args(["-q", "-e", "-o", "beginning"]);
    let output = run_ok(&mut consume, "", DEADLINE);
    let number = |line: &str| line[..8].parse().expect("a number");
    output.lines().map(number).collect()
}
