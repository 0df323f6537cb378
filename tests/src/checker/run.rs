//! One run of the checker: start a cluster and clients, do harm, heal, read everything back, judge.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::fleet::{Fleet, Shape};
use super::judge::{Verdict, judge};
use super::nemesis::{Nemesis, WHOLE_DEADLINE};
use super::schedule::{Extent, Family, Step, plan};
use super::workload::{Load, TOPICS, Workload};
use crate::agreement::controllers_agree;
use crate::turn::Turn;
use crate::wait::within;
use crate::wire::Random;

const START_DEADLINE: Duration = Duration::from_secs(60);
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Until controllers that were behind have caught up.
const AGREE_DEADLINE: Duration = Duration::from_secs(60);
/// What follows the faults takes less.
const AFTER_FAULTS: Duration = Duration::from_secs(900);

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    pub seed: u64,
    /// How long faults go on.
    pub length: Duration,
    pub families: Vec<Family>,
    pub shape: Shape,
    pub producers: usize,
    pub rate: usize,
    /// How long clients may take to make progress after everything was healed.
    pub bound: Duration,
    /// Keep all files, also of a clean run.
    pub keep: bool,
}

impl Options {
    pub fn new(seed: u64, length: Duration) -> Self {
        Self {
            seed,
            length,
            families: super::schedule::ALL_FAMILIES.to_vec(),
            shape: Shape::default(),
            producers: 2,
            rate: 60,
            bound: Duration::from_secs(60),
            keep: false,
        }
    }
}

/// `CHRONIK_CHECKER_SEED`, or a new one.
pub fn seed_from_environment() -> u64 {
    match std::env::var("CHRONIK_CHECKER_SEED") {
        Ok(text) => text.parse().expect("CHRONIK_CHECKER_SEED is a number"),
        Err(_) => new_seed(),
    }
}

/// A seed that no run had before, short enough to be typed.
pub fn new_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = since.unwrap_or_default().as_nanos();
    Random(u64::try_from(nanos % u128::from(u64::MAX)).unwrap_or(1)).below(1_000_000_000)
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    pub seed: u64,
    pub verdict: Verdict,
    /// Processes that ended by themselves, panicked, would not stop or were not ready in time.
    pub crashes: Vec<String>,
    pub faults: BTreeMap<String, usize>,
    /// Replicas that took segment files from others.
    pub copies: usize,
    /// From the end of the faults until every producer was acknowledged in every partition.
    pub recovered_in: Duration,
    pub took: Duration,
    /// History, logs and data; removed where all is well.
    pub folder: PathBuf,
}

impl Outcome {
    pub fn is_clean(&self) -> bool {
        self.verdict.is_clean() && self.crashes.is_empty()
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let faults: Vec<String> = self
            .faults
            .iter()
            .map(|(name, n)| format!("{n} {name}"))
            .collect();
        writeln!(
            f,
            "seed {}, {:.0} s: faults: {}; {} copies of logs; all clients served again {:.1} s after the last",
            self.seed,
            self.took.as_secs_f64(),
            faults.join(", "),
            self.copies,
            self.recovered_in.as_secs_f64()
        )?;
        write!(f, "{}", self.verdict)?;
        for crash in &self.crashes {
            writeln!(f, "CRASH {crash}")?;
        }
        if !self.is_clean() {
            writeln!(f, "history, logs and data: {}", self.folder.display())?;
        }
        Ok(())
    }
}

/// Runs the checker once. `say` is told of progress.
pub fn run(options: &Options, say: &dyn Fn(&str)) -> Outcome {
    let _turn = Turn::shared();
    let began = Instant::now();
    let folder = tempfile::Builder::new()
        .prefix("chronik-checker-")
        .tempdir()
        .expect("the temporary folder is writable")
        .keep();
    let seed = options.seed;
    say(&format!("seed {seed}, files in {}", folder.display()));
    let mut fleet = Fleet::start(&folder, &options.shape);
    create_topics(&fleet);
    let mut workload = Workload::start(&fleet, &load(options));
    // Faults begin when all clients are served.
    workload.command("warm");
    let steps = schedule(options);
    let (faults, recovered_in, mut crashes) =
        harm_and_heal(options, &steps, &mut fleet, &mut workload, say);
    let history = workload.finish().expect("the history can be read");
    crashes.extend(fleet.crashes());
    let copies = fleet.copies();
    drop(fleet);
    let outcome = Outcome {
        seed,
        verdict: judge(&history),
        crashes,
        faults,
        copies,
        recovered_in,
        took: began.elapsed(),
        folder,
    };
    if outcome.is_clean() && !options.keep {
        let _ = std::fs::remove_dir_all(&outcome.folder);
    }
    outcome
}

/// The brokers are ready, but on a busy machine one may have missed its heartbeats since.
fn create_topics(fleet: &Fleet) {
    let rest = fleet.rest();
    for (topic, partitions) in TOPICS {
        let body = json!({
            "name": topic, "partition_count": partitions, "replication_factor": 3,
            "configs": {"min.insync.replicas": "2", "segment.bytes": "1048576"}, "timeout_ms": 60_000,
        });
        rest.create_topic_in_the_end(&body, START_DEADLINE);
        rest.wait_until_healthy(topic, START_DEADLINE);
    }
}

fn load(options: &Options) -> Load {
    Load {
        seed: options.seed,
        producers: options.producers,
        rate: options.rate,
        members: 3,
        bound: options.bound,
        timeout: options.length + AFTER_FAULTS,
    }
}

fn schedule(options: &Options) -> Vec<Step> {
    let extent = Extent {
        controllers: options.shape.controllers,
        brokers: options.shape.brokers,
        gateways: options.shape.gateways,
        partitions: TOPICS.iter().map(|(_, partitions)| partitions).sum(),
    };
    plan(options.seed, options.length, extent, &options.families)
}

fn harm_and_heal(
    options: &Options,
    steps: &[Step],
    fleet: &mut Fleet,
    workload: &mut Workload,
    say: &dyn Fn(&str),
) -> (BTreeMap<String, usize>, Duration, Vec<String>) {
    let mut nemesis = Nemesis::new(fleet, workload);
    let started = Instant::now();
    let mut told = Instant::now();
    nemesis.run(steps, options.length, |nemesis| {
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = Instant::now();
            let faults: usize = nemesis.counts.values().sum();
            say(&format!(
                "{:.0} of {} s, {faults} faults, {}",
                started.elapsed().as_secs_f64(),
                options.length.as_secs(),
                nemesis.workload.progress()
            ));
        }
    });
    // One in three runs ends with a minority down: a majority has to do.
    let mut random = Random(options.seed ^ 0x5eed);
    let brokers = nemesis.fleet.names("broker");
    let left_down = (random.below(3) == 0)
        .then(|| brokers[usize::try_from(random.below(brokers.len() as u64)).unwrap_or(0)].clone());
    let mut late = nemesis.heal(left_down.as_deref());
    let counts = std::mem::take(&mut nemesis.counts);
    let recovered_in = workload.command("healed");
    say(&format!(
        "healed: all clients served after {:.1} s",
        recovered_in.as_secs_f64()
    ));
    workload.command("finish");
    workload.command("readback after the faults");
    late.extend(read_back_from_fewer(fleet, workload, say));
    (counts, recovered_in, late)
}

/// Everything has to be there whichever broker is missing, and after a start from nothing.
fn read_back_from_fewer(
    fleet: &mut Fleet,
    workload: &mut Workload,
    say: &dyn Fn(&str),
) -> Vec<String> {
    let (mut late, mut incomplete) = (Vec::new(), Vec::new());
    let mut ready = |fleet: &mut Fleet, name: &str| {
        if let Err(why) = fleet.wait_until_ready(name, Duration::from_secs(60)) {
            late.push(why);
        }
    };
    fleet.lift(usize::MAX);
    fleet.settle();
    for name in fleet.names("broker") {
        ready(fleet, &name);
    }
    let mut whole = |fleet: &mut Fleet| {
        incomplete.extend(within(WHOLE_DEADLINE, || fleet.is_whole()).err());
    };
    for name in fleet.names("broker") {
        // What is missing in one broker alone must be in the others.
        whole(fleet);
        fleet.kill(usize::MAX, std::slice::from_ref(&name));
        workload.command(&format!("readback without {name}"));
        fleet.lift(usize::MAX);
        fleet.settle();
        ready(fleet, &name);
    }
    let all = fleet.names("");
    fleet.kill(usize::MAX, &all);
    fleet.lift(usize::MAX);
    fleet.settle();
    for name in &all {
        ready(fleet, name);
    }
    workload.command("readback after a start of everything");
    whole(fleet);
    late.extend(incomplete);
    late.extend(controllers_agree(fleet.rest_addresses(), AGREE_DEADLINE).err());
    say("read back whole, without each broker, and after kill -9 of everything");
    late
}
