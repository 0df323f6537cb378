//! Controllers that lose their disks: one after the other, and all of them with a backup.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use chronik_tests::bin_dir;
use chronik_tests::cluster::{BROKERS, Cluster};
use chronik_tests::ledger::{Produced, produce};
use chronik_tests::log_files;
use chronik_tests::rest::Rest;
use chronik_tests::tools::run;
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const RECORDS: u64 = 20_000;
const CONTROLLERS: [&str; 3] = ["controller-1", "controller-2", "controller-3"];

fn fill(cluster: &Cluster, topic: &str) -> Produced {
    let arguments = ["-partitions", "6", "-records", "20000", "-timeout", "100s"];
    let produced = produce(cluster, topic, &arguments, DEADLINE);
    produced.assert_all_acked(RECORDS);
    produced
}

fn create(rest: &Rest, topic: &str) {
    rest.create_topic(topic, 6, 3, json!({}));
    rest.wait_until_healthy(topic, DEADLINE);
}

/// Creates a topic through whoever leads by now.
fn create_in_the_end(rest: &Rest, topic: &str) {
    let body = json!({"name": topic, "partition_count": 3, "replication_factor": 3});
    rest.create_topic_in_the_end(&body, DEADLINE);
    rest.wait_until_healthy(topic, DEADLINE);
}

fn lose_disk(cluster: &mut Cluster, name: &str) {
    cluster.kill_9(name);
    std::fs::remove_dir_all(cluster.data_dir().join(name)).expect("the folder can be removed");
}

/// Starts it with an empty folder and waits until it votes again.
fn start_empty(cluster: &mut Cluster, name: &str) {
    let votes = "votes among the controllers";
    let before = cluster.log(name).matches(votes).count();
    cluster.start_service(name);
    cluster.wait_until_ready(name, DEADLINE);
    wait_for(&format!("{name} to vote"), DEADLINE, || {
        let now = cluster.log(name).matches(votes).count();
        holds(now > before, format!("{now} times"))
    });
}

#[test]
fn controllers_that_lose_their_disks_come_back_by_themselves() {
    let mut cluster = Cluster::start("controller-disk");
    let rest = cluster.rest();
    create(&rest, "first");
    let filled = fill(&cluster, "first");

    let first_leader = format!("controller-{}", rest.controller_leader(DEADLINE));
    let follower = CONTROLLERS
        .into_iter()
        .find(|name| *name != first_leader)
        .expect("there are three");
    lose_disk(&mut cluster, follower);
    create_in_the_end(&rest, "without-a-follower");
    start_empty(&mut cluster, follower);

    lose_disk(&mut cluster, &first_leader);
    create_in_the_end(&rest, "without-the-leader");
    start_empty(&mut cluster, &first_leader);

    // The two new disks are a majority without the third.
    let third = CONTROLLERS
        .into_iter()
        .find(|name| *name != first_leader && *name != follower)
        .expect("there are three");
    cluster.kill_9(third);
    create_in_the_end(&rest, "without-the-third");
    for topic in ["first", "without-a-follower", "without-the-leader"] {
        rest.wait_until_healthy(topic, DEADLINE);
    }
    filled.verify(&cluster);
    cluster.start_service(third);
    cluster.wait_until_ready(third, DEADLINE);
    assert_eq!(
        rest.get("/v1/controllers").expect("an answer")["controllers"]
            .as_array()
            .map(Vec::len),
        Some(3)
    );
    cluster.assert_sound();
    cluster.stop();
}

fn back_up(cluster: &Cluster, to: &Path) -> (bool, String) {
    let urls = cluster.rest_addresses().join(",");
    let mut command = Command::new(bin_dir().join("chronik"));
    command
        .args(["cluster", "backup", "--rest-url", &urls])
        .arg("--to")
        .arg(to);
    let finished = run(&mut command, "", DEADLINE);
    (finished.success, finished.stderr)
}

fn restore(cluster: &Cluster, name: &str, from: &Path) -> (bool, String) {
    let service = cluster.service(name);
    let mut command = Command::new(&service.binary);
    command
        .arg("restore")
        .arg("--from")
        .arg(from)
        .arg("--config")
        .arg(&service.config);
    let finished = run(&mut command, "", DEADLINE);
    (
        finished.success,
        format!("{}{}", finished.stdout, finished.stderr),
    )
}

/// The segments of records of all brokers, with their sizes.
fn segments_of_brokers(cluster: &Cluster) -> BTreeMap<PathBuf, u64> {
    let with_size = |path: PathBuf| {
        let bytes = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        (path, bytes)
    };
    BROKERS
        .iter()
        .flat_map(|broker| log_files::files(cluster, broker, "log"))
        .map(with_size)
        .collect()
}

#[test]
fn a_backup_brings_the_metadata_back_and_nothing_newer_is_deleted() {
    let mut cluster = Cluster::start("controller-backup");
    let rest = cluster.rest();
    create(&rest, "kept");
    let mut kept = vec![fill(&cluster, "kept")];
    let backup = cluster.file("metadata.backup");
    let (done, told) = back_up(&cluster, &backup);
    assert!(done, "{told}");
    let (done, told) = back_up(&cluster, &backup);
    assert!(!done && told.contains("exists already"), "{told}");

    create(&rest, "newer");
    fill(&cluster, "newer");
    let cluster_id = rest.get("/v1/cluster").expect("an answer")["cluster_id"].clone();
    let (done, told) = restore(&cluster, "controller-1", &backup);
    assert!(!done && told.contains("is not empty"), "{told}");
    cluster.stop();

    let before = segments_of_brokers(&cluster);
    let logs = 2 * 6 * 3;
    assert!(before.len() >= logs, "both topics are in files: {before:?}");
    for name in CONTROLLERS {
        std::fs::remove_dir_all(cluster.data_dir().join(name)).expect("it can be removed");
    }
    let mut damaged = std::fs::read(&backup).expect("the backup");
    let middle = damaged.len() / 2;
    damaged[middle..middle + 8192].fill(0x55);
    let damaged_file = cluster.file("damaged.backup");
    std::fs::write(&damaged_file, damaged).expect("it can be written");
    let (done, told) = restore(&cluster, "controller-1", &damaged_file);
    assert!(!done && told.contains("damaged"), "{told}");
    for name in CONTROLLERS {
        let (done, told) = restore(&cluster, name, &backup);
        assert!(done, "{told}");
    }

    cluster.launch();
    let rest = cluster.rest();
    rest.wait_until_healthy("kept", DEADLINE);
    let described = rest.get("/v1/cluster").expect("an answer");
    assert_eq!(described["cluster_id"], cluster_id);
    assert_eq!(
        described["topic_count"], 1,
        "the newer topic is not known: {described}"
    );
    kept[0].verify(&cluster);
    for name in BROKERS {
        wait_for("a word on the logs that are kept", DEADLINE, || {
            let log = cluster.log(name);
            holds(log.contains("they are kept on disk"), "not told")
        });
    }
    let after = segments_of_brokers(&cluster);
    for (path, bytes) in &before {
        let now = after.get(path).copied().unwrap_or(0);
        assert!(
            now >= *bytes,
            "{} had {bytes} bytes, now {now}",
            path.display()
        );
    }
    // The cluster is a whole one: what is made now does not meet what was forgotten.
    create(&rest, "newer");
    std::fs::remove_file(cluster.file("newer.ledger")).expect("the forgotten topic's ledger");
    kept.push(fill(&cluster, "newer"));
    for topic in ["kept", "newer"] {
        rest.wait_until_healthy(topic, DEADLINE);
    }
    for name in ["broker-1", "controller-2", "broker-3"] {
        cluster.kill_9(name);
        cluster.start_service(name);
        cluster.wait_until_ready(name, DEADLINE);
    }
    for produced in &kept {
        produced.verify(&cluster);
    }
    cluster.assert_no_panic();
    cluster.stop();
}
