//! Many partitions, the short form: what `long/scale.rs` does with 10,000, on a scale that every
//! change can afford.

use std::time::Duration;

use chronik_tests::figures::Allowance;
use chronik_tests::scale::{Goals, Plan, run};

#[test]
fn hundreds_of_partitions_rest_fail_over_and_restart() {
    run(
        "scale-300",
        &Plan {
            topics: 6,
            partitions_per_topic: 50,
            rest_after_ms: 2000,
            idle_window: Duration::from_secs(10),
            allowance: Allowance::NONE,
            goals: Goals {
                created: Duration::from_secs(20),
                idle_cpu: 0.10,
                // Few replicas share what a broker holds anyway.
                memory_kib_per_replica: 256.0,
                in_use: Duration::from_secs(1),
                all_led: Duration::from_secs(3),
                restarted: Duration::from_secs(30),
            },
        },
    );
}
