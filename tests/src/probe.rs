//! The probe of failovers: writes one record after the other with acks=all, and tells when each began and was
//! acknowledged, by the wall clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cluster::Cluster;
use crate::process::Talking;
use crate::tools::franz_go;

const DEADLINE: Duration = Duration::from_secs(60);

/// An acknowledged write; wall clock in nanoseconds since the Unix epoch.
#[derive(Debug, Clone, Copy)]
pub struct Ack {
    pub partition: usize,
    pub began: u128,
    pub ended: u128,
}

impl Ack {
    /// Of a line of the probe; `None`: it is of something else.
    pub fn parse(line: &str) -> Option<Ack> {
        let mut words = line.strip_prefix("ack ")?.split(' ');
        let partition = words.next()?.parse().ok()?;
        let _sequence = words.next()?;
        let began = words.next()?.parse().ok()?;
        let ended = words.next()?.parse().ok()?;
        Some(Ack {
            partition,
            began,
            ended,
        })
    }

    pub fn took(&self) -> Duration {
        Duration::from_nanos(u64::try_from(self.ended - self.began).expect("it ended later"))
    }
}

/// The wall clock, as in `Ack`.
pub fn now() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("the clock is after 1970").as_nanos()
}

/// A probe of the topic's first partitions that has had an answer.
pub fn start(cluster: &Cluster, topic: &str, partitions: usize) -> Talking {
    let count = partitions.to_string();
    let arguments = ["-topic", topic, "-partitions", &count, "-timeout", "10m"];
    let mut command = franz_go("probe", &cluster.bootstrap(), &arguments);
    let log = cluster.file(&format!("probe-{topic}.log"));
    let probe = Talking::spawn(&format!("probe-{topic}"), &mut command, &log);
    probe.wait_for_line("a first ack", DEADLINE, Ack::parse);
    probe
}

/// How long the writes took that began within the window, in milliseconds, sorted.
pub fn latencies(lines: &[String], window: std::ops::Range<u128>) -> Vec<f64> {
    let acks = lines.iter().filter_map(|line| Ack::parse(line));
    let acks = acks.filter(|ack| window.contains(&ack.began));
    let mut found: Vec<f64> = acks.map(|ack| ack.took().as_secs_f64() * 1e3).collect();
    found.sort_unstable_by(f64::total_cmp);
    found
}

/// Of at least 300 writes.
pub fn p99(sorted: &[f64]) -> f64 {
    assert!(sorted.len() >= 300, "only {} writes", sorted.len());
    sorted[sorted.len() * 99 / 100]
}
