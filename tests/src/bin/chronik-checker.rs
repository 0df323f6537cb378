//! The long form of the consistency checker: run after run, each with a cluster of its own and a new
//! seed, until the time is over or an anomaly is found. Exit code 1: one was found.
#![expect(clippy::print_stdout, reason = "a person or a script reads it")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use chronik_tests::checker::judge::judge;
use chronik_tests::checker::run::{Options, new_seed, run};
use chronik_tests::checker::schedule::{ALL_FAMILIES, ALL_KINDS, Family};
use chronik_tests::checker::workload::read_history;
use clap::Parser;

/// In this time every kind of fault has come, and replicas that moved, or lost their disk, took copies.
const ALL_WITHIN: Duration = Duration::from_secs(1_200);

/// Many Kafka clients write and read while faults are injected; then everything is read back and
/// judged. Needs the product's binaries (CHRONIK_BIN_DIR) and scripts/install-test-tools.sh.
#[derive(Parser)]
#[command(name = "chronik-checker")]
struct Arguments {
    /// How long to go on, in all.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Minutes of faults per run; each run has a new cluster and the next seed.
    #[arg(long, default_value_t = 5.0)]
    run_minutes: f64,
    /// Seed of the first run. Without it: a new one.
    #[arg(long)]
    seed: Option<u64>,
    /// Families of faults, with commas: kill, pause, network, disk, roll, move, wipe.
    #[arg(long, value_delimiter = ',', value_parser = family)]
    faults: Vec<Family>,
    /// Producers of each of the three modes.
    #[arg(long, default_value_t = 2)]
    producers: usize,
    /// Sends per second of each producer.
    #[arg(long, default_value_t = 60)]
    rate: usize,
    /// Each partition has three replicas: with 3, none can move.
    #[arg(long, default_value_t = 4)]
    brokers: usize,
    /// How long clients may take to make progress after everything was healed.
    #[arg(long, default_value_t = 60)]
    bound_seconds: u64,
    /// Run brokers that are built wrong on purpose: ack-before-commit, forget-sequences or
    /// read-uncommitted. Needs chronik-broker-sabotaged, as scripts/test-all.sh builds it.
    #[arg(long)]
    sabotage: Option<String>,
    /// Go on after an anomaly, with the next seed.
    #[arg(long)]
    go_on: bool,
    /// Keep the files of clean runs, too.
    #[arg(long)]
    keep: bool,
    /// Only judge a history that was kept.
    #[arg(long, value_name = "FILE")]
    judge: Option<PathBuf>,
}

fn family(name: &str) -> Result<Family, String> {
    Family::named(name).ok_or_else(|| "expected one of the families of faults".to_owned())
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(path) = &arguments.judge {
        let verdict = judge(&read_history(path)?);
        print!("{verdict}");
        return Ok(ExitCode::from(u8::from(!verdict.is_clean())));
    }
    if arguments.minutes.min(arguments.run_minutes) <= 0.0 || arguments.brokers < 3 {
        bail!("minutes must be above 0, brokers at least 3");
    }
    let started = Instant::now();
    let length = Duration::from_secs_f64(arguments.minutes * 60.0);
    let mut seed = arguments.seed.unwrap_or_else(new_seed);
    let (mut runs, mut failed, mut copies) = (0, Vec::new(), 0);
    let mut faults: BTreeMap<String, usize> = BTreeMap::new();
    while runs == 0 || started.elapsed() < length {
        let left = length.saturating_sub(started.elapsed());
        let per_run = Duration::from_secs_f64(arguments.run_minutes * 60.0);
        let mut options = Options::new(seed, per_run.min(left).max(Duration::from_secs(20)));
        options.families = if arguments.faults.is_empty() {
            ALL_FAMILIES.to_vec()
        } else {
            arguments.faults.clone()
        };
        options.producers = arguments.producers;
        options.rate = arguments.rate;
        options.bound = Duration::from_secs(arguments.bound_seconds);
        options.shape.brokers = arguments.brokers;
        if let Some(name) = &arguments.sabotage {
            options.shape = options.shape.sabotaged(name);
        }
        options.keep = arguments.keep;
        let outcome = run(&options, &|line| {
            println!("[{:>6.0} s] {line}", started.elapsed().as_secs_f64());
        });
        println!("{outcome}");
        runs += 1;
        copies += outcome.copies;
        for (kind, count) in &outcome.faults {
            *faults.entry(kind.clone()).or_default() += count;
        }
        if !outcome.is_clean() {
            failed.push(seed);
            if !arguments.go_on {
                break;
            }
        }
        seed += 1;
    }
    let counts: Vec<String> = faults
        .iter()
        .map(|(kind, n)| format!("{n} {kind}"))
        .collect();
    println!(
        "{runs} runs, {} with anomalies; faults: {}; {copies} copies of logs; seeds: {failed:?}",
        failed.len(),
        counts.join(", ")
    );
    if arguments.faults.is_empty() && started.elapsed() >= ALL_WITHIN {
        let missing = ALL_KINDS.iter().filter(|kind| !faults.contains_key(**kind));
        let missing: Vec<_> = missing.collect();
        if copies == 0 || !missing.is_empty() {
            bail!(
                "the runs show less than they should: {copies} copies of logs, and none of these faults in all \
                 this time: {missing:?}"
            );
        }
    }
    Ok(ExitCode::from(u8::from(!failed.is_empty())))
}
