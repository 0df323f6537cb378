//! The consistency checker finds what it is there to find: brokers that break one promise each, built
//! with the feature `sabotage` (`scripts/test-all.sh`), are caught within minutes.

use std::time::{Duration, Instant};

use chronik_tests::checker::judge::Kind;
use chronik_tests::checker::run::{Options, Outcome, run, seed_from_environment};
use chronik_tests::checker::schedule::Family;
use chronik_tests::figures::report;

/// How long the checker may take to catch one.
const BOUND: Duration = Duration::from_secs(300);
/// Faults per run. Several short runs find more than one long one.
const RUN: Duration = Duration::from_secs(30);

/// Runs until an anomaly of these kinds is found. A crash or a stuck client would not do: it must be
/// the broken promise that is seen.
fn is_caught(sabotage: &str, kinds: &[Kind]) {
    let began = Instant::now();
    let mut seed = seed_from_environment();
    loop {
        let outcome = run(&broken(seed, sabotage), &|_| {});
        let found: Vec<Kind> = kinds
            .iter()
            .copied()
            .filter(|kind| outcome.verdict.counts.contains_key(kind))
            .collect();
        if !found.is_empty() {
            tell(sabotage, &found, &outcome, began.elapsed());
            let _ = std::fs::remove_dir_all(&outcome.folder);
            assert!(began.elapsed() < BOUND, "{sabotage} was caught too late");
            return;
        }
        assert!(
            began.elapsed() < BOUND,
            "{sabotage} was not caught within {BOUND:?}: {outcome}"
        );
        let _ = std::fs::remove_dir_all(&outcome.folder);
        seed += 1;
    }
}

fn broken(seed: u64, sabotage: &str) -> Options {
    let mut options = Options::new(seed, RUN);
    options.families = vec![Family::Kill, Family::Network];
    options.shape = options.shape.sabotaged(sabotage);
    // Nothing moves here, and fewer brokers are read back from sooner.
    options.shape.brokers = 3;
    // What is broken may well be stuck at the end; that is no reason to wait for long.
    options.bound = Duration::from_secs(20);
    options
}

fn tell(sabotage: &str, found: &[Kind], outcome: &Outcome, took: Duration) {
    let example = outcome
        .verdict
        .anomalies
        .iter()
        .find(|anomaly| found.contains(&anomaly.kind))
        .map(|anomaly| anomaly.what.clone());
    report(&format!(
        "checker: {sabotage} caught after {:.0} s (seed {}): {found:?}, such as: {}",
        took.as_secs_f64(),
        outcome.seed,
        example.unwrap_or_default()
    ));
}

#[test]
fn acks_before_the_commit_are_caught() {
    is_caught("ack-before-commit", &[Kind::Lost, Kind::InconsistentOffset]);
}

#[test]
fn producer_sequences_that_are_not_checked_are_caught() {
    is_caught("forget-sequences", &[Kind::Duplicated]);
}

#[test]
fn reads_above_the_high_watermark_are_caught() {
    is_caught(
        "read-uncommitted",
        &[
            Kind::InconsistentOffset,
            Kind::NonMonotonicRead,
            Kind::Refused,
        ],
    );
}
