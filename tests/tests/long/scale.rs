//! 10,000 partitions with three replicas each on three brokers: what the design promises.

use std::time::Duration;

use chronik_tests::scale::{Bounds, Plan, run};

fn plan(topics: u32, partitions_per_topic: u32) -> Plan {
    Plan {
        topics,
        partitions_per_topic,
        rest_after_ms: 10_000,
        idle_window: Duration::from_secs(20),
        bounds: Bounds {
            created: Duration::from_secs(60),
            idle_cpu: 0.10,
            memory_kib_per_replica: 64.0,
            all_led: Duration::from_secs(3),
            restarted: Duration::from_secs(30),
        },
    }
}

#[test]
fn ten_thousand_partitions_of_one_topic() {
    run("scale-one", &plan(1, 10_000));
}

#[test]
fn ten_thousand_partitions_of_a_hundred_topics() {
    run("scale-hundred", &plan(100, 100));
}
