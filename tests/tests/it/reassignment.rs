//! Replicas move while they are written and read, whatever is killed meanwhile; and Kafka's own tools
//! ask for it, follow it and take it back.

use std::collections::BTreeSet;
use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::ledger::Production;
use chronik_tests::rest::Rest;
use chronik_tests::tools::{kafka_tool, run, run_ok};
use chronik_tests::wait::{holds, wait_for};
use reqwest::Method;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(120);
const PRODUCE_DEADLINE: Duration = Duration::from_secs(300);

fn cluster(name: &str, brokers: u16) -> Cluster {
    let options = Options {
        brokers,
        ..Options::default()
    };
    Cluster::start_with(name, options)
}

/// Creates a topic on the named brokers, partition by partition.
fn create_on(rest: &Rest, topic: &str, assignments: &[Vec<i64>]) {
    let body = json!({
        "name": topic, "assignments": assignments, "timeout_ms": 60_000,
        "configs": {"min.insync.replicas": if assignments[0].len() > 2 { "2" } else { "1" }},
    });
    let answer = rest.ask(Method::POST, "/v1/topics", Some(&body));
    let answer = answer.expect("a controller answers");
    assert!(answer.status < 300, "{answer:?}");
}

fn ask_to_move(rest: &Rest, topic: &str, targets: &[Vec<i64>]) {
    let partition = |(index, replicas): (usize, &Vec<i64>)| json!({"topic": topic, "partition": index, "replicas": replicas});
    let partitions: Vec<Value> = targets.iter().enumerate().map(partition).collect();
    let body = json!({ "partitions": partitions });
    let answer = rest.ask(Method::POST, "/v1/reassignments", Some(&body));
    let answer = answer.expect("a controller answers");
    assert_eq!(answer.status, 200, "{answer:?}");
    let refused = |one: &Value| !one["problem"].is_null();
    let results = answer.body["partitions"].as_array().cloned();
    assert!(
        !results.unwrap_or_default().iter().any(refused),
        "{answer:?}"
    );
}

/// Waits until no move is left and the topic is exactly where it should be.
fn wait_until_at(rest: &Rest, topic: &str, targets: &[Vec<i64>]) {
    wait_for(&format!("{topic} to be moved"), DEADLINE, || {
        let moves = rest.get("/v1/reassignments")?;
        let of_topic = moves["reassignments"].as_array().into_iter().flatten();
        let left = of_topic.filter(|one| one["topic"] == topic).count();
        let partitions = rest.partitions(topic)?;
        let at: Vec<Vec<i64>> = partitions.iter().map(|p| p.replicas.clone()).collect();
        holds(left == 0 && at == targets, format!("{moves} {at:?}"))?;
        let healthy = partitions.iter().all(|partition| partition.is_healthy());
        holds(healthy, format!("{partitions:?}"))
    });
}

/// The brokers of `ids` in turn, `factor` for each of `count` partitions.
fn rotated(ids: &[i64], count: usize, factor: usize) -> Vec<Vec<i64>> {
    let replicas = |index: usize| (0..factor).map(move |place| ids[(index + place) % ids.len()]);
    (0..count).map(|index| replicas(index).collect()).collect()
}

#[test]
fn every_partition_moves_under_load_and_nothing_is_lost_or_repeated() {
    let mut cluster = cluster("reassign", 4);
    let rest = cluster.rest();
    create_on(&rest, "moved", &rotated(&[1, 2, 3], 6, 3));
    // Nobody of the old ones stays.
    create_on(&rest, "disjoint", &rotated(&[1, 2], 2, 2));
    let arguments = ["-until-told", "-records", "3000000"];
    let arguments = [&arguments[..], &["-rate", "8000", "-timeout", "290s"]].concat();
    let with = |partitions: &'static str| {
        let mut all = vec!["-partitions", partitions];
        all.extend(&arguments);
        all
    };
    let productions = [
        Production::start(&cluster, "moved", &with("6")),
        Production::start(&cluster, "disjoint", &with("2")),
    ];
    for production in &productions {
        production.wait_until_acked(20_000, PRODUCE_DEADLINE);
    }
    let (moved, disjoint) = (rotated(&[4, 3, 2], 6, 3), rotated(&[3, 4], 2, 2));
    ask_to_move(&rest, "moved", &moved);
    ask_to_move(&rest, "disjoint", &disjoint);
    wait_until_at(&rest, "moved", &moved);
    wait_until_at(&rest, "disjoint", &disjoint);
    wait_for("broker 1 to give its disk back", DEADLINE, || {
        let count = cluster.metric("broker-1", "chronik_broker_replicas")?;
        holds(count == 0.0, format!("{count} replicas"))
    });
    // The load has outlived the moves.
    for production in &productions {
        production.wait_until_acked_more(10_000, PRODUCE_DEADLINE);
    }
    for production in productions {
        let produced = production.finish(PRODUCE_DEADLINE);
        produced.verify(&cluster);
        produced.assert_at_least_acked(20_000);
    }
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn a_move_goes_on_after_kill_9_of_leader_target_and_controller() {
    let mut cluster = cluster("reassign-kill", 4);
    let rest = cluster.rest();
    create_on(&rest, "moved", &rotated(&[1, 2, 3], 6, 3));
    let arguments = ["-partitions", "6", "-records", "400000", "-timeout", "290s"];
    let production = Production::start(&cluster, "moved", &arguments);
    production.wait_until_acked(100_000, PRODUCE_DEADLINE);
    let targets = rotated(&[4, 3, 2], 6, 3);
    ask_to_move(&rest, "moved", &targets);
    cluster.kill_9("broker-4");
    cluster.kill_9("controller-1");
    cluster.kill_9("broker-1");
    let left = wait_for("the controllers to answer", DEADLINE, || {
        rest.count_in_state("moved", "reassigning")
    });
    assert!(left > 0, "all moves were over before anything was killed");
    cluster.start_service("broker-4");
    cluster.start_service("controller-1");
    cluster.start_service("broker-1");
    wait_until_at(&rest, "moved", &targets);
    let produced = production.finish(PRODUCE_DEADLINE);
    produced.verify(&cluster);
    produced.assert_all_acked(400_000);
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_cancelled_move_goes_back_to_where_it_was() {
    let mut cluster = cluster("reassign-cancel", 4);
    let rest = cluster.rest();
    let home = rotated(&[1, 2, 3], 4, 3);
    create_on(&rest, "home", &home);
    let arguments = ["-partitions", "4", "-records", "60000", "-timeout", "290s"];
    let production = Production::start(&cluster, "home", &arguments);
    production.wait_until_acked(10_000, PRODUCE_DEADLINE);
    // With the target dead the move cannot end.
    cluster.kill_9("broker-4");
    ask_to_move(&rest, "home", &rotated(&[4, 3, 2], 4, 3));
    wait_for("the broker to be known as dead", DEADLINE, || {
        let broker = rest.get("/v1/brokers/4")?;
        holds(broker["fenced"] == true, broker.to_string())
    });
    assert_eq!(rest.count_in_state("home", "reassigning"), Ok(4));
    let answer = rest.ask(Method::DELETE, "/v1/reassignments?topic=home", None);
    let answer = answer.expect("a controller answers");
    assert_eq!(answer.status, 200, "{answer:?}");
    wait_until_at(&rest, "home", &home);
    cluster.start_service("broker-4");
    let produced = production.finish(PRODUCE_DEADLINE);
    produced.verify(&cluster);
    produced.assert_all_acked(60_000);
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn kafkas_own_tools_move_list_verify_cancel_and_elect() {
    let mut cluster = cluster("kafka-reassign", 4);
    let (rest, bootstrap) = (cluster.rest(), cluster.bootstrap());
    create_on(&rest, "tool", &rotated(&[1, 2, 3], 3, 3));
    let plan = cluster.file("plan.json");
    let write_plan = |targets: &[Vec<i64>]| {
        let partition = |(index, replicas): (usize, &Vec<i64>)| json!({"topic": "tool", "partition": index, "replicas": replicas});
        let partitions: Vec<Value> = targets.iter().enumerate().map(partition).collect();
        let text = json!({"version": 1, "partitions": partitions}).to_string();
        std::fs::write(&plan, text).expect("the folder is writable");
    };
    let path = plan.to_string_lossy().into_owned();
    let reassign = |arguments: &[&str]| {
        let class = "org.apache.kafka.tools.reassign.ReassignPartitionsCommand";
        let mut command = kafka_tool(class, &["--bootstrap-server", &bootstrap]);
        command.args(arguments);
        command
    };
    let ok = |arguments: &[&str]| run_ok(&mut reassign(arguments), "", DEADLINE);
    let targets = rotated(&[4, 3, 2], 3, 3);
    write_plan(&targets);
    let throttled = [
        "--execute",
        "--reassignment-json-file",
        &path,
        "--throttle",
        "1000",
    ];
    let refused = run(&mut reassign(&throttled), "", DEADLINE);
    let told = format!("{}{}", refused.stdout, refused.stderr);
    assert!(told.contains("chronik cluster set"), "{refused:?}");
    ok(&["--execute", "--reassignment-json-file", &path]);
    wait_until_at(&rest, "tool", &targets);
    let verified = ok(&["--verify", "--reassignment-json-file", &path]);
    let complete = verified.matches("is completed").count();
    assert_eq!(complete, 3, "{verified}");
    assert!(ok(&["--list"]).contains("No partition reassignments found"));

    // Without a majority of its old replicas no partition can move; the tool wants all brokers of a
    // plan to be alive.
    cluster.kill_9("broker-2");
    cluster.kill_9("broker-3");
    wait_for("the partitions to be told offline", DEADLINE, || {
        let offline = rest.count_in_state("tool", "offline")?;
        holds(offline == 3, format!("{offline}"))
    });
    write_plan(&[vec![1, 4], vec![1, 4], vec![1, 4]]);
    ok(&["--execute", "--reassignment-json-file", &path]);
    let listed = ok(&["--list"]);
    assert!(listed.contains("tool-0"), "{listed}");
    ok(&["--cancel", "--reassignment-json-file", &path]);
    cluster.start_service("broker-2");
    cluster.start_service("broker-3");
    wait_until_at(&rest, "tool", &targets);
    rest.wait_until_healthy("tool", DEADLINE);

    let class = "org.apache.kafka.tools.LeaderElectionCommand";
    let elect = |kind: &str| {
        let arguments = ["--bootstrap-server", &bootstrap, "--election-type", kind];
        let mut command = kafka_tool(class, &arguments);
        command.args(["--topic", "tool", "--partition", "0"]);
        run(&mut command, "", DEADLINE)
    };
    let first = elect("preferred");
    assert!(first.success, "{first:?}");
    let unclean = elect("unclean");
    let told = format!("{}{}", unclean.stdout, unclean.stderr);
    assert!(told.contains("majority"), "{unclean:?}");
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_broker_is_drained_decommissioned_and_removed_under_load() {
    let mut cluster = cluster("drain", 4);
    let rest = cluster.rest();
    rest.create_topic("drained", 12, 3, json!({"min.insync.replicas": "2"}));
    rest.wait_until_healthy("drained", DEADLINE);
    let arguments = ["-partitions", "12", "-records", "3000000", "-until-told"];
    let arguments = [&arguments[..], &["-rate", "10000", "-timeout", "290s"]].concat();
    let production = Production::start(&cluster, "drained", &arguments);
    production.wait_until_acked(20_000, PRODUCE_DEADLINE);
    let drain = |body: Value| {
        let answer = rest.ask(Method::POST, "/v1/brokers/2/drain", Some(&body));
        answer.expect("a controller answers")
    };
    let wait_until_done = || {
        wait_for("the drain to be done", DEADLINE, || {
            let drain = rest.get("/v1/brokers/2/drain")?;
            holds(drain["done"] == true, drain.to_string())
        });
    };
    assert_eq!(drain(json!({})).status, 200);
    wait_until_done();
    let led = |rest: &Rest| -> BTreeSet<i64> {
        let partitions = rest.partitions("drained").expect("REST answers");
        partitions.iter().filter_map(|p| p.leader).collect()
    };
    wait_for("the others to lead", DEADLINE, || {
        let led = led(&rest);
        holds(led == BTreeSet::from([1, 3, 4]), format!("{led:?}"))
    });
    let undrained = rest.ask(Method::DELETE, "/v1/brokers/2/drain", None);
    assert_eq!(undrained.expect("an answer").status, 200);
    wait_for("leaders to come back", DEADLINE, || {
        holds(led(&rest).contains(&2), format!("{:?}", led(&rest)))
    });

    assert_eq!(drain(json!({"decommission": true})).status, 200);
    wait_until_done();
    // Three brokers are left for three replicas: nobody else may go.
    let body = json!({"decommission": true});
    let refused = rest.ask(Method::POST, "/v1/brokers/3/drain", Some(&body));
    assert_eq!(refused.expect("an answer").status, 409);
    let alive = rest.ask(Method::DELETE, "/v1/brokers/2", None);
    assert_eq!(alive.expect("an answer").status, 409, "it still runs");
    cluster.kill_9("broker-2");
    wait_for("the broker to be unregistered", DEADLINE, || {
        let gone = rest.ask(Method::DELETE, "/v1/brokers/2", None);
        let status = gone.map(|answer| answer.status);
        holds(status == Some(204), format!("{status:?}"))
    });
    // The load has outlived all of it.
    production.wait_until_acked_more(10_000, PRODUCE_DEADLINE);
    let produced = production.finish(PRODUCE_DEADLINE);
    produced.verify(&cluster);
    produced.assert_at_least_acked(20_000);
    rest.wait_until_healthy("drained", DEADLINE);
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_broker_with_an_empty_disk_comes_back_as_new_replicas_by_itself() {
    let mut cluster = cluster("empty-disk", 3);
    let rest = cluster.rest();
    rest.create_topic("refilled", 6, 3, json!({"min.insync.replicas": "2"}));
    let arguments = ["-partitions", "6", "-records", "300000", "-timeout", "290s"];
    let production = Production::start(&cluster, "refilled", &arguments);
    production.wait_until_acked(50_000, PRODUCE_DEADLINE);
    let epoch_of_3 = || -> Result<u64, String> {
        let brokers = rest.get("/v1/brokers")?;
        let all = brokers["brokers"].as_array().into_iter().flatten();
        let mut epochs = all.filter(|broker| broker["broker_id"] == 3);
        let epoch = epochs.next().and_then(|b| b["broker_epoch"].as_u64());
        epoch.ok_or_else(|| brokers.to_string())
    };
    let epoch_before = epoch_of_3().expect("it is registered");
    cluster.kill_9("broker-3");
    std::fs::remove_dir_all(cluster.data_dir().join("broker-3")).expect("its data is there");
    cluster.start_service("broker-3");
    let produced = production.finish(PRODUCE_DEADLINE);
    produced.assert_all_acked(300_000);
    // Before, the controllers may still take it for the broker that it was.
    wait_for("the broker to be registered anew", DEADLINE, || {
        let epoch = epoch_of_3()?;
        holds(epoch > epoch_before, epoch)
    });
    rest.wait_until_healthy("refilled", DEADLINE);
    // A majority that needs the new replicas, and only they and one old one are left.
    cluster.kill_9("broker-1");
    produced.verify(&cluster);
    let more = ["-topic", "refilled", "-count", "20"];
    let mut probe = chronik_tests::tools::franz_go("probe", &cluster.bootstrap(), &more);
    run_ok(&mut probe, "", DEADLINE);
    cluster.start_service("broker-1");
    rest.wait_until_healthy("refilled", DEADLINE);
    cluster.assert_no_panic();
    cluster.stop();
}
