//! Processes that start in any order, on folders that are empty and on folders that are not.

use std::time::Duration;

use chronik_tests::cluster::{BROKERS, Cluster};
use chronik_tests::ledger::{Produced, produce};
use chronik_tests::rest::Rest;
use chronik_tests::wait::wait_for;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const RECORDS: u64 = 1000;
const CONTROLLERS: [&str; 3] = ["controller-1", "controller-2", "controller-3"];

/// Starts one after the other, each when the one before is at work or waits for those that are missing, and looks
/// whether the cluster does its work.
fn start_and_use(cluster: &mut Cluster, order: &[&str], topic: &str) -> Produced {
    for name in order {
        cluster.start_service(name);
        let http = Rest::new(vec![cluster.service(name).http.clone()]);
        wait_for(&format!("{name} to run"), DEADLINE, || {
            http.text("/healthz")
        });
    }
    for name in order {
        cluster.wait_until_ready(name, DEADLINE);
    }
    let arguments = ["-partitions", "3", "-records", "1000", "-timeout", "100s"];
    let body = json!({"name": topic, "partition_count": 3, "replication_factor": 3});
    cluster.rest().create_topic_in_the_end(&body, DEADLINE);
    let produced = produce(cluster, topic, &arguments, DEADLINE);
    produced.assert_all_acked(RECORDS);
    produced.verify(cluster);
    produced
}

#[test]
fn processes_may_start_in_any_order() {
    let mut cluster = Cluster::start("start-order");
    cluster.kill_9_everything();
    // Nothing that they could remember: who needs others waits for them.
    for name in BROKERS.iter().chain(&CONTROLLERS).chain(&["gateway-1"]) {
        let folder = cluster.data_dir().join(name);
        std::fs::remove_dir_all(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    }
    let clients_first = ["gateway-1", "broker-3", "broker-1", "broker-2"];
    let order = [&clients_first[..], &CONTROLLERS].concat();
    let first = start_and_use(&mut cluster, &order, "from-nothing");

    for name in order {
        cluster.kill_9(name);
    }
    let mixed = [
        "broker-2",
        "controller-3",
        "gateway-1",
        "broker-1",
        "controller-1",
        "broker-3",
        "controller-2",
    ];
    start_and_use(&mut cluster, &mixed, "again");
    first.verify(&cluster);
    cluster.assert_no_panic();
    cluster.stop();
}
