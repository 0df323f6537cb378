//! The short form of the consistency checker: half a minute of faults, then the judge.
//!
//! `CHRONIK_CHECKER_SEED` repeats the schedule of a run that was printed. The long form is
//! `make check-consistency`.

use std::time::Duration;

use chronik_tests::checker::run::{Options, run, seed_from_environment};
use chronik_tests::figures::report;

#[test]
fn clients_see_a_consistent_log_whatever_fails() {
    let options = Options::new(seed_from_environment(), Duration::from_secs(25));
    let outcome = run(&options, &|line| report(&format!("checker: {line}")));
    report(&format!("checker: {outcome}"));
    assert!(
        outcome.is_clean(),
        "repeat with CHRONIK_CHECKER_SEED={}: {outcome}",
        outcome.seed
    );
    // A run that did next to nothing would prove next to nothing.
    let faults: usize = outcome.faults.values().sum();
    assert!(faults >= 2 && outcome.verdict.acked >= 500, "{outcome}");
}
