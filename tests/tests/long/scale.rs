//! 10,000 partitions with three replicas each on three brokers, on one machine, within bounds of time,
//! processor and memory.

use std::time::Duration;

use chronik_tests::figures::Allowance;
use chronik_tests::scale::{Goals, Plan, run};

#[test]
fn ten_thousand_partitions_rest_fail_over_and_restart() {
    run(
        "scale-10000",
        &Plan {
            topics: 100,
            partitions_per_topic: 100,
            rest_after_ms: 5000,
            idle_window: Duration::from_secs(20),
            allowance: Allowance::of_this_run(),
            goals: Goals {
                created: Duration::from_secs(60),
                idle_cpu: 0.10,
                memory_kib_per_replica: 64.0,
                in_use: Duration::from_secs(1),
                all_led: Duration::from_secs(3),
                restarted: Duration::from_secs(30),
            },
        },
    );
}
