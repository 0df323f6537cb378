//! Many partitions, in short: the full size is in `tests/long/scale.rs`.

use std::time::Duration;

use chronik_tests::scale::{Bounds, Plan, run};

#[test]
fn a_thousand_partitions_rest_and_survive() {
    let plan = Plan {
        topics: 1,
        partitions_per_topic: 1_000,
        rest_after_ms: 2_000,
        idle_window: Duration::from_secs(5),
        bounds: Bounds {
            created: Duration::from_secs(20),
            idle_cpu: 0.10,
            memory_kib_per_replica: 96.0,
            all_led: Duration::from_secs(5),
            restarted: Duration::from_secs(20),
        },
    };
    run("scale", &plan);
}
