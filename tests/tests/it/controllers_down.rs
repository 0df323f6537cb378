//! Static stability: with every controller down, records flow, and brokers and gateways restart.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::ledger::{Produced, Production, produce};
use chronik_tests::rest::Rest;
use chronik_tests::wait::{holds, wait_for};
use reqwest::Method;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const RECORDS: u64 = 30_000;

fn fill(cluster: &Cluster, topic: &str, more: &[&str]) -> Produced {
    let mut arguments = vec!["-partitions", "6", "-records", "30000", "-timeout", "100s"];
    arguments.extend(more);
    let produced = produce(cluster, topic, &arguments, DEADLINE);
    produced.assert_all_acked(RECORDS);
    produced
}

#[test]
fn records_flow_and_processes_restart_while_every_controller_is_down() {
    let mut cluster = Cluster::start("no-controllers");
    let rest = cluster.rest();
    let topics = [
        "throughout",
        "without",
        "broker-restarted",
        "gateway-restarted",
    ];
    for topic in topics {
        rest.create_topic(topic, 6, 3, json!({}));
        rest.wait_until_healthy(topic, DEADLINE);
    }
    // One idempotent producer works through all that follows.
    let throughout = Production::start(
        &cluster,
        "throughout",
        &[
            "-partitions",
            "6",
            "-until-told",
            "-records",
            "3000000",
            "-rate",
            "15000",
            "-timeout",
            "290s",
        ],
    );
    throughout.wait_until_acked(10_000, DEADLINE);
    let controllers = ["controller-1", "controller-2", "controller-3"];
    for controller in controllers {
        cluster.kill_9(controller);
    }
    let mut filled = vec![fill(&cluster, "without", &[])];

    cluster.kill_9("broker-2");
    cluster.start_service("broker-2");
    cluster.wait_until_ready("broker-2", DEADLINE);
    filled.push(fill(&cluster, "broker-restarted", &[]));

    cluster.kill_9("gateway-1");
    cluster.start_service("gateway-1");
    cluster.wait_until_ready("gateway-1", DEADLINE);
    // Ids for new idempotent producers come from the controllers, and this gateway has none left.
    filled.push(fill(&cluster, "gateway-restarted", &["-idempotent=false"]));

    // Leaders move by Raft alone; the gateway learns of it from the brokers.
    cluster.kill_9("broker-1");
    throughout.wait_until_acked_more(30_000, DEADLINE);
    let throughout = throughout.finish(DEADLINE);
    throughout.assert_at_least_acked(40_000);
    filled.push(throughout);
    for produced in &filled {
        produced.verify(&cluster);
    }

    cluster.start_service("broker-1");
    for controller in controllers {
        cluster.start_service(controller);
    }
    for topic in topics {
        rest.wait_until_healthy(topic, DEADLINE);
    }
    for produced in &filled {
        produced.verify(&cluster);
    }
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn five_controllers_go_on_without_two_of_them() {
    let options = Options {
        controllers: 5,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("five-controllers", options);
    let rest = cluster.rest();
    rest.create_topic("before", 6, 3, json!({}));
    rest.wait_until_healthy("before", DEADLINE);
    let before = fill(&cluster, "before", &[]);
    cluster.kill_9("controller-1");
    cluster.kill_9("controller-2");
    let others = cluster.rest_addresses()[2..].to_vec();
    let rest = Rest::new(others);
    let body = json!({"name": "after", "partition_count": 6, "replication_factor": 3});
    rest.create_topic_in_the_end(&body, DEADLINE);
    rest.wait_until_healthy("after", DEADLINE);
    let after = fill(&cluster, "after", &[]);
    cluster.kill_9_everything();
    cluster.launch();
    for produced in [before, after] {
        cluster.rest().wait_until_healthy(&produced.topic, DEADLINE);
        produced.verify(&cluster);
    }
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_controller_leader_that_dies_is_invisible_to_records() {
    let mut cluster = Cluster::start("controller-leader");
    let rest = cluster.rest();
    rest.create_topic("steady", 6, 3, json!({}));
    rest.wait_until_healthy("steady", DEADLINE);
    let production = Production::start(
        &cluster,
        "steady",
        &[
            "-partitions",
            "6",
            "-records",
            "200000",
            "-rate",
            "25000",
            "-timeout",
            "100s",
        ],
    );
    production.wait_until_acked(50_000, DEADLINE);
    let name = format!("controller-{}", rest.controller_leader(DEADLINE));
    cluster.kill_9(&name);
    // Metadata can be written again soon: the other two elect.
    let body = json!({"name": "later", "partition_count": 3, "replication_factor": 3});
    rest.create_topic_in_the_end(&body, DEADLINE);
    cluster.start_service(&name);
    let produced = production.finish(DEADLINE);
    produced.assert_all_acked(200_000);
    produced.verify(&cluster);
    rest.wait_until_healthy("later", DEADLINE);
    cluster.assert_no_panic();
    cluster.stop();
}

/// Ends the writers, also where the test fails: they are waited for.
struct EndOfWrites<'a>(&'a AtomicBool);

impl Drop for EndOfWrites<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Sets a config to one value after the other until told; gives the last one that was acknowledged.
fn change_configs(addresses: Vec<String>, topic: &str, is_over: &AtomicBool) -> u64 {
    let rest = Rest::new(addresses);
    let path = format!("/v1/topics/{topic}/configs");
    let mut acked = 0;
    for value in 1.. {
        if is_over.load(Ordering::Acquire) {
            break;
        }
        let body = json!({"configs": {"retention.ms": value.to_string()}});
        match rest.ask(Method::PATCH, &path, Some(&body)) {
            Some(answer) if answer.status < 300 => acked = value,
            _ => {}
        }
    }
    acked
}

/// It sends an entry before its own disk has it. If it went on in its old term, without that entry,
/// the others would keep what it has never heard of.
#[test]
fn a_leading_controller_killed_while_it_writes_and_back_at_once_holds_what_the_others_hold() {
    const WRITERS: usize = 6;
    const ROUNDS: usize = 6;
    let mut cluster = Cluster::start("leader-back");
    let rest = cluster.rest();
    let topics: Vec<String> = (0..WRITERS)
        .map(|index| format!("changed-{index}"))
        .collect();
    for topic in &topics {
        rest.create_topic(topic, 1, 3, json!({}));
    }
    let is_over = AtomicBool::new(false);
    let addresses = cluster.rest_addresses().to_vec();
    let acked: Vec<u64> = thread::scope(|scope| {
        let end = EndOfWrites(&is_over);
        let spawn = |(index, topic): (usize, &String)| {
            let mut addresses = addresses.clone();
            let count = addresses.len();
            addresses.rotate_left(index % count);
            let is_over = &is_over;
            let topic = topic.clone();
            scope.spawn(move || change_configs(addresses, &topic, is_over))
        };
        let writers: Vec<_> = topics.iter().enumerate().map(spawn).collect();
        let revision = || {
            let revision = rest.get("/v1/cluster")?["revision"].as_u64();
            revision.ok_or_else(|| "no revision".to_owned())
        };
        for _ in 0..ROUNDS {
            let name = format!("controller-{}", rest.controller_leader(DEADLINE));
            cluster.kill_9(&name);
            cluster.start_service(&name);
            let before = wait_for("a controller to answer", DEADLINE, revision);
            wait_for("changes to go on", DEADLINE, || {
                let now = revision()?;
                holds(now > before + 50, format!("{before} and {now}"))
            });
        }
        drop(end);
        let ended = writers.into_iter().map(|writer| writer.join());
        ended
            .map(|acked| acked.expect("a writer that does not panic"))
            .collect()
    });
    cluster.assert_controllers_agree();
    for (topic, acked) in topics.iter().zip(acked) {
        let shown = rest.get(&format!("/v1/topics/{topic}")).expect("the topic");
        let value = &shown["configs"]["retention.ms"];
        // What came last may have been done without an answer.
        let kept: u64 = value
            .as_str()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        assert!(acked > 0 && kept >= acked, "{topic}: {kept} of {acked}");
    }
    cluster.assert_no_panic();
    cluster.stop();
}
