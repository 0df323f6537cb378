//! Figures with a bound: how fast a cluster starts, what it costs when idle.

use std::time::{Duration, Instant};

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::figures::{Spread, cpu_time, memory_mib, report};
use chronik_tests::tools::{franz_go, run_ok};
use chronik_tests::wait::measure_over;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const START_BOUND: Duration = Duration::from_secs(2);
const IDLE_WINDOW: Duration = Duration::from_secs(20);
/// Share of one core.
const IDLE_CPU_BOUND: f64 = 0.05;

#[test]
fn a_cluster_takes_its_first_record_within_two_seconds_of_its_start() {
    let mut times = Vec::new();
    for _ in 0..3 {
        let options = Options {
            alone: true,
            ..Options::default()
        };
        let mut cluster = Cluster::start_with("start", options);
        // Creates the topic too, and includes the start of the client.
        let began = Instant::now();
        let arguments = ["-topic", "first", "-count", "1"];
        run_ok(
            &mut franz_go("probe", &cluster.bootstrap(), &arguments),
            "",
            DEADLINE,
        );
        times.push(cluster.started_in() + began.elapsed());
        cluster.stop();
    }
    let spread = Spread::of(times);
    report(&format!(
        "start of a fresh cluster to the first acked record, 3 runs: {spread}"
    ));
    assert!(spread.max < START_BOUND, "{spread}");
}

#[test]
fn an_idle_cluster_with_300_partitions_uses_next_to_no_cpu() {
    let options = Options {
        alone: true,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("idle", options);
    let rest = cluster.rest();
    let empty: f64 = cluster.pids().into_iter().map(memory_mib).sum();
    let began = Instant::now();
    rest.create_topic("idle", 300, 3, json!({}));
    rest.wait_until_healthy("idle", DEADLINE);
    let created = began.elapsed();
    // One record in each partition, so that none is idle for want of having been used.
    let arguments = [
        "-topic",
        "idle",
        "-partitions",
        "300",
        "-records",
        "3000",
        "-idempotent=false",
    ];
    run_ok(
        &mut franz_go("produce", &cluster.bootstrap(), &arguments),
        "",
        DEADLINE,
    );
    rest.wait_until_healthy("idle", DEADLINE);

    let mut processes: Vec<(String, u32)> = cluster
        .services()
        .map(|service| (service.name.clone(), service.process.pid))
        .collect();
    processes.push(("chronik dev".to_owned(), cluster.launcher_pid()));
    let before: Vec<Duration> = processes.iter().map(|(_, pid)| cpu_time(*pid)).collect();
    measure_over(IDLE_WINDOW);
    let shares: Vec<f64> = processes
        .iter()
        .zip(before)
        .map(|((_, pid), before)| {
            (cpu_time(*pid) - before).as_secs_f64() / IDLE_WINDOW.as_secs_f64()
        })
        .collect();
    let share: f64 = shares.iter().sum();
    let full: f64 = cluster.pids().into_iter().map(memory_mib).sum();
    report(&format!(
        "300 partitions x 3 replicas: created in {:.2} s; idle they use {:.2} % of one core; \
         memory of all 7 processes {full:.0} MiB, {empty:.0} MiB before them",
        created.as_secs_f64(),
        share * 100.0
    ));
    for ((name, pid), share) in processes.iter().zip(&shares) {
        let memory = memory_mib(*pid);
        report(&format!(
            "  {name}: {:.2} %, {memory:.1} MiB",
            share * 100.0
        ));
    }
    assert!(share < IDLE_CPU_BOUND, "{:.2} % of one core", share * 100.0);
    cluster.assert_sound();
    cluster.stop();
}
