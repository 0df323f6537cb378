//! A broker that stands still for longer than its session: SIGSTOP, as a virtual machine that is moved, or a
//! host that swaps, would do it. And one whose disk alone stands still.

use std::time::{Duration, Instant};

use chronik_tests::checker::stall::{LOG_THREAD, Stall};
use chronik_tests::cluster::Cluster;
use chronik_tests::figures::report;
use chronik_tests::ledger::Production;
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const PRODUCE_DEADLINE: Duration = Duration::from_secs(300);

/// What the controllers' metric says of the partitions in a state.
fn counted(cluster: &Cluster, state: &str) -> Result<f64, String> {
    let name = format!("chronik_controller_partitions{{state=\"{state}\"}}");
    cluster.metric("controller-1", &name)
}

#[test]
fn a_broker_that_stands_still_is_replaced_and_takes_nothing_back() {
    let mut cluster = Cluster::start("paused");
    let rest = cluster.rest();
    // With one of three replicas away acks=all goes on where two are enough; `strict` asks for all three.
    rest.create_topic("paused", 6, 3, json!({"min.insync.replicas": "2"}));
    rest.create_topic("strict", 1, 3, json!({"min.insync.replicas": "3"}));
    // Nobody can take over what has no other replica.
    let alone = json!({"name": "alone", "assignments": [[1]], "timeout_ms": 60_000});
    rest.create_topic_in_the_end(&alone, DEADLINE);
    rest.wait_until_healthy("paused", DEADLINE);
    rest.wait_until_healthy("strict", DEADLINE);
    rest.wait_until_healthy("alone", DEADLINE);
    let arguments = ["-partitions", "6", "-records", "3000000", "-until-told"];
    let arguments = [&arguments[..], &["-rate", "8000", "-timeout", "290s"]].concat();
    let production = Production::start(&cluster, "paused", &arguments);
    production.wait_until_acked(20_000, PRODUCE_DEADLINE);

    let paused = cluster.service("broker-1").process.clone();
    let began = Instant::now();
    paused.signal(libc::SIGSTOP);
    wait_for("the others to lead all partitions", DEADLINE, || {
        let partitions = rest.partitions("paused")?;
        let led = partitions.iter().all(|p| p.leader.is_some_and(|l| l != 1));
        holds(led, format!("{partitions:?}"))
    });
    report(&format!(
        "a broker stopped by SIGSTOP leads nothing any more after {:.1} s",
        began.elapsed().as_secs_f64()
    ));
    wait_for("the broker to be fenced", DEADLINE, || {
        let broker = rest.get("/v1/brokers/1")?;
        holds(broker["fenced"] == true, broker.to_string())
    });
    production.wait_until_acked_more(20_000, PRODUCE_DEADLINE);
    wait_for("the missing replicas to be told", DEADLINE, || {
        let lists = (
            rest.count_in_state("paused", "under-replicated")?,
            rest.count_in_state("paused", "offline")?,
        );
        holds(lists == (6, 0), format!("{lists:?}"))?;
        let strict = rest.get("/v1/partitions?state=under-min-isr")?;
        holds(
            strict["partitions"][0]["topic"] == "strict",
            strict.to_string(),
        )
    });
    let metric = |state: &str| counted(&cluster, state);
    wait_for("the metrics to say so too", DEADLINE, || {
        let under = (metric("under_replicated")?, metric("under_min_isr")?);
        let offline = metric("offline")?;
        let are_told = under.0 >= 7.0 && under.1 >= 1.0 && offline >= 1.0;
        holds(are_told, format!("{under:?}, {offline}"))
    });

    assert_eq!(rest.count_in_state("alone", "offline"), Ok(1));

    paused.signal(libc::SIGCONT);
    wait_for("the partition to be back", DEADLINE, || {
        let offline = rest.count_in_state("alone", "offline")?;
        holds(offline == 0, format!("{offline}"))
    });
    rest.wait_until_healthy("paused", DEADLINE);
    rest.wait_until_healthy("strict", DEADLINE);
    // Records go on with the broker back in its place.
    production.wait_until_acked_more(10_000, PRODUCE_DEADLINE);
    let produced = production.finish(PRODUCE_DEADLINE);
    produced.verify(&cluster);
    produced.assert_at_least_acked(40_000);
    wait_for("the lists to be empty", DEADLINE, || {
        let lists = (
            rest.count_in_state("paused", "under-replicated")?,
            metric("under_min_isr")?,
        );
        holds(lists == (0, 0.0), format!("{lists:?}"))
    });
    cluster.assert_no_panic();
    cluster.stop();
}

/// Its links live, and it answers: only its log does not get on.
#[test]
fn a_broker_whose_disk_hangs_leads_nothing_until_it_does_not() {
    let mut cluster = Cluster::start("stuck");
    let rest = cluster.rest();
    rest.create_topic("stuck", 6, 3, json!({"min.insync.replicas": "2"}));
    rest.wait_until_healthy("stuck", DEADLINE);
    let arguments = ["-partitions", "6", "-records", "3000000", "-until-told"];
    let arguments = [&arguments[..], &["-rate", "2000", "-timeout", "290s"]].concat();
    let production = Production::start(&cluster, "stuck", &arguments);
    production.wait_until_acked(5_000, PRODUCE_DEADLINE);
    let leads_some = || {
        let partitions = rest.partitions("stuck")?;
        let leads = partitions.iter().any(|p| p.leader == Some(1));
        holds(leads, format!("{partitions:?}"))
    };
    wait_for("the broker to lead", DEADLINE, leads_some);

    let began = Instant::now();
    let pid = cluster.service("broker-1").process.pid;
    let stall = Stall::begin(pid, LOG_THREAD).expect("the thread can be stopped");
    wait_for("the others to lead all partitions", DEADLINE, || {
        let partitions = rest.partitions("stuck")?;
        let led = partitions.iter().all(|p| p.leader.is_some_and(|l| l != 1));
        holds(led, format!("{partitions:?}"))
    });
    let led = began.elapsed();
    let stuck = |wanted| {
        let stuck = cluster.metric("broker-1", "chronik_broker_disk_stuck")?;
        holds(stuck == wanted, format!("{stuck}"))
    };
    wait_for("the metrics to say so", DEADLINE, || stuck(1.0));
    production.wait_until_acked_more(5_000, PRODUCE_DEADLINE);
    report(&format!(
        "a broker whose disk hangs leads nothing any more after {:.1} s; its clients went on after {:.1} s",
        led.as_secs_f64(),
        began.elapsed().as_secs_f64()
    ));
    assert!(led < Duration::from_secs(30), "{led:?}");

    drop(stall);
    rest.wait_until_healthy("stuck", DEADLINE);
    wait_for("the broker to lead again", DEADLINE, leads_some);
    wait_for("the metrics to say so", DEADLINE, || stuck(0.0));
    let produced = production.finish(PRODUCE_DEADLINE);
    produced.verify(&cluster);
    produced.assert_at_least_acked(10_000);
    cluster.assert_no_panic();
    cluster.stop();
}
