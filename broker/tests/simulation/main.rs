//! Deterministic simulation of the replication code: whole brokers (storage, replicas, Raft, the
//! streams between them, the leadership driver) in one thread, over simulated time, network and
//! disks, with everything that goes wrong decided by a seed. CONTRIBUTING.md says how to run many.
//!
//! Invariant: a seed always gives the same run, so a seed that fails is a test case.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests may panic and print"
)]

mod boot;
mod disk;
mod faults;
mod host;
mod invariants;
mod machine;
mod network;
mod plan;
mod process;
mod producer;
mod reader;
mod requests;
mod run;
mod trace;
mod transit;

use std::ops::Range;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use machine::Simulated;
use plan::Sabotage;
use trace::LogLines;

/// Seeds of an ordinary test run.
const SEEDS: Range<u64> = 0..40;
/// Processes at a time.
const PARALLEL: usize = 2;
/// No run takes as long on any machine; one that does is caught in a loop.
const LIMIT: Duration = Duration::from_secs(180);

/// Set for the process that runs one seed.
const SEED: &str = "CHRONIK_SIMULATION_SEED";
const SABOTAGE: &str = "CHRONIK_SIMULATION_SABOTAGE";
/// What to log of the brokers.
const LOG: &str = "CHRONIK_SIMULATION_LOG";
/// Prints every line as it comes.
const PRINT: &str = "CHRONIK_SIMULATION_PRINT";
/// Seeds to run instead of `SEEDS`: from..to.
const RANGE: &str = "CHRONIK_SIMULATION_SEEDS";

/// Begins the lines that say how a run ended.
const PASSED: &str = "PASSED ";
const FAILED: &str = "FAILED ";

/// One seed, 0 unless the environment names one. Other tests run it in a process of its own, since
/// tokio's randomness depends on what else has run in the process.
#[test]
fn one_seed_keeps_every_promise() {
    let seed = std::env::var(SEED).map_or(0, |seed| seed.parse().unwrap());
    let sabotage = std::env::var(SABOTAGE).map_or(Sabotage::None, |name| Sabotage::named(&name));
    let log = std::env::var(LOG).unwrap_or("info,openraft=error".to_owned());
    let prints = std::env::var_os(PRINT).is_some();
    let (sender, ended) = mpsc::channel();
    let thread = thread::Builder::new().name(format!("seed {seed}"));
    let simulation = move || {
        // Before anything that draws randomness once per thread.
        let machine = Simulated::start(seed);
        trace::start(prints);
        let lines = tracing_subscriber::fmt()
            .with_writer(LogLines)
            .with_ansi(false)
            .without_time()
            .with_env_filter(log)
            .finish();
        let run = || run::run(machine, seed, sabotage);
        let result = tracing::subscriber::with_default(lines, run);
        sender.send((result, trace::finish())).ok();
    };
    thread.spawn(simulation).unwrap();
    let Ok((result, trace)) = ended.recv_timeout(LIMIT) else {
        panic!("\n{FAILED}seed {seed}: it panicked, or is caught in a loop");
    };
    match result {
        Ok(summary) => println!("\n{PASSED}seed {seed}: {summary:?} {:?}", trace.fingerprint),
        Err(why) => {
            let tail = trace.tail.join("\n");
            panic!("\n{tail}\n{FAILED}seed {seed}: {why}");
        }
    }
}

/// Runs a seed in a process of its own: how it ended, and all that it wrote.
fn run_alone(
    seed: u64,
    sabotage: Sabotage,
    settings: &[(&str, &str)],
) -> (Result<String, String>, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "one_seed_keeps_every_promise", "--nocapture"])
        .env_remove(RANGE)
        .env(SEED, seed.to_string())
        .env(SABOTAGE, sabotage.name())
        .env("RUST_BACKTRACE", "0")
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let last = |mark: &str| {
        let line = text.lines().rfind(|line| line.starts_with(mark));
        line.map(|line| line[mark.len()..].to_owned())
    };
    let result = match (output.status.success(), last(PASSED), last(FAILED)) {
        (true, Some(what), _) => Ok(what),
        (_, _, why) => Err(why.unwrap_or("it died".to_owned())),
    };
    (result, text)
}

fn seeds() -> Range<u64> {
    let Ok(range) = std::env::var(RANGE) else {
        return SEEDS;
    };
    let parsed = range
        .split_once("..")
        .and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    parsed.unwrap_or_else(|| panic!("{RANGE}={range} is not from..to"))
}

#[test]
fn seeds_keep_every_promise() {
    let seeds = seeds();
    let next = AtomicU64::new(seeds.start);
    let work = || {
        let mut failed = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if !seeds.contains(&seed) {
                return failed;
            }
            let (result, text) = run_alone(seed, Sabotage::None, &[]);
            match result {
                Ok(what) => println!("{PASSED}{what}"),
                Err(why) => {
                    println!("{FAILED}{why}");
                    failed.push((seed, text));
                }
            }
        }
    };
    let failed: Vec<(u64, String)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..PARALLEL).map(|_| scope.spawn(work)).collect();
        let results = workers.into_iter().map(|worker| worker.join().unwrap());
        results.flatten().collect()
    });
    let count = failed.len();
    if let Some((seed, text)) = failed.into_iter().next() {
        panic!(
            "{text}\n{count} of the seeds {seeds:?} failed; this was {seed}. Again: {SEED}={seed} \
             {PRINT}=1 cargo test --release -p chronik-broker --test simulation one_seed -- \
             --nocapture"
        );
    }
}

#[test]
fn a_seed_gives_the_same_run_twice() {
    let whole = [(LOG, "debug"), (PRINT, "1")];
    let lines = |seed| {
        let (result, text) = run_alone(seed, Sabotage::None, &whole);
        assert!(result.is_ok(), "seed {seed}: {result:?}");
        // The test runner says how long it took.
        let is_kept = |line: &&str| !line.starts_with("test result:");
        text.lines()
            .filter(is_kept)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let [once, again] = [lines(5), lines(5)];
    assert!(once.len() > 1_000, "nothing happened");
    let differs = once.iter().zip(&again).find(|(one, other)| one != other);
    assert_eq!(differs, None);
    assert_eq!(once.len(), again.len());
    assert!(lines(4) != once, "the seed decides nothing");
}

/// Some of the seeds must find the sabotage, each by itself, and by what it breaks: `found` are parts of
/// what they say.
fn is_caught(sabotage: Sabotage, seeds: Range<u64>, found: &[&str]) {
    for seed in seeds.clone() {
        let (result, text) = run_alone(seed, sabotage, &[]);
        if let Err(why) = result {
            println!("{sabotage:?}: {why}");
            let is_expected = found.iter().any(|part| why.contains(part));
            assert!(
                is_expected,
                "seed {seed} failed in another way: {why}\n{text}"
            );
            return;
        }
    }
    panic!("none of the seeds {seeds:?} finds {sabotage:?}");
}

const TWO_LEADERS: &str = "two leaders in one epoch";

#[test]
fn a_disk_that_lies_about_fsync_is_caught() {
    // Frames of the WAL that were confirmed are not there.
    let torn = ".wal is corrupt at byte";
    is_caught(Sabotage::LyingDisks, 0..10, &[torn, TWO_LEADERS]);
}

#[test]
fn votes_that_are_forgotten_are_caught() {
    is_caught(Sabotage::ForgetVotes, 0..40, &[TWO_LEADERS]);
}

#[test]
fn acks_before_the_commit_are_caught() {
    let found = [
        "two batches were acknowledged at offset",
        "but another batch was committed there",
    ];
    is_caught(Sabotage::AckBeforeCommit, 10..60, &found);
}
