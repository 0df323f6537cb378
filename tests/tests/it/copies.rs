//! Replicas that were away for longer than Raft remembers get segment files, from all that have them.

use std::time::{Duration, Instant};

use chronik_tests::cluster::{BROKERS, Cluster};
use chronik_tests::figures::report;
use chronik_tests::log_files;
use chronik_tests::numbered::{read, write};
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const RECORDS: u64 = 150 * 1024;
/// Raft keeps little, and is looked at often enough to forget the rest while it is written.
const FORGETS_SOON: [(&str, &str); 2] = [
    ("RAFT_KEEP_BYTES", "16777216"),
    ("RETENTION_CHECK_INTERVAL_MS", "200"),
];

/// Much more than Raft keeps.
fn write_many(cluster: &Cluster, topic: &str, first: u64) {
    for part in 0..10 {
        write(cluster, topic, first + part * RECORDS / 10, RECORDS / 10);
    }
}

/// `name=value` of the last line of a broker's log that has both `message` and `name`.
fn last_field(cluster: &Cluster, broker: &str, message: &str, name: &str) -> Option<f64> {
    let log = cluster.log(broker);
    let line = log.lines().rfind(|line| line.contains(message))?;
    let value = line.split_once(&format!("{name}="))?.1;
    value.split_whitespace().next()?.parse().ok()
}

#[test]
fn a_replica_that_was_away_for_longer_than_raft_remembers_gets_the_files() {
    const MESSAGE: &str = "the copy of the leader's log is in force";
    let mut cluster = Cluster::with_log_settings("catch-up", &FORGETS_SOON);
    let rest = cluster.rest();
    let configs = json!({"segment.bytes": "67108864", "min.insync.replicas": "2"});
    rest.create_topic("away", 1, 3, configs);
    rest.wait_until_healthy("away", DEADLINE);
    write(&cluster, "away", 0, 1024);
    let leader = rest.partition("away", 0).unwrap().leader.unwrap();
    let follower = BROKERS[usize::from(leader == 1)];
    let mut next = 1024;
    let mut copied = None;
    // Raft forgets a moment after it may: on a busy machine once more is written than it keeps.
    for _ in 0..4 {
        cluster.kill_9(follower);
        write_many(&cluster, "away", next);
        next += RECORDS;
        let began = Instant::now();
        cluster.start_service(follower);
        rest.wait_until_healthy("away", DEADLINE);
        let seconds = began.elapsed().as_secs_f64();
        let speed = last_field(&cluster, follower, MESSAGE, "mib_per_second");
        copied = speed.map(|speed| (speed, seconds));
        if copied.is_some() {
            break;
        }
    }
    let (speed, seconds) = copied.expect("it took a copy instead of following Raft");
    report(&format!(
        "a replica back after {} MiB: copied at {speed:.0} MiB/s, in sync {seconds:.1} s after its start",
        RECORDS / 1024
    ));
    // Writes go on at it: it is a full replica.
    write(&cluster, "away", next, 1024);
    let end = next + 1024;
    cluster.kill_9(&format!("broker-{leader}"));
    assert_eq!(read(&cluster, "away"), (0..end).collect::<Vec<_>>());
    cluster.start_service(&format!("broker-{leader}"));
    rest.wait_until_healthy("away", DEADLINE);
    cluster.assert_no_panic();
    cluster.stop();
    let contents = BROKERS.map(|broker| {
        let folders = log_files::folders(&cluster, broker);
        assert_eq!(folders.len(), 1, "{folders:?}");
        log_files::content(&cluster, broker)
    });
    assert!(
        contents[0].len() as u64 > RECORDS * 1000,
        "{}",
        contents[0].len()
    );
    assert!(contents[0] == contents[1] && contents[1] == contents[2]);
}

const SEGMENT: u64 = 8 * MIB;
const TOPIC: &str = "copied";

/// A cluster with a partition of which one replica has got half of a copy, which goes on slowly.
struct HalfCopied {
    cluster: Cluster,
    leader: &'static str,
    /// Who takes the copy.
    away: &'static str,
    other: &'static str,
    /// Records from 0 up to here were written.
    next: u64,
    /// Bytes that have come when it was last looked.
    came: u64,
    /// Bytes that it had itself.
    own: u64,
}

impl HalfCopied {
    fn start(name: &str) -> Self {
        let rate = ("COPY_BYTES_PER_SECOND", "15000000");
        let settings = [FORGETS_SOON.as_slice(), &[rate]].concat();
        let mut cluster = Cluster::with_log_settings(name, &settings);
        let rest = cluster.rest();
        let configs = json!({"segment.bytes": SEGMENT.to_string(), "min.insync.replicas": "2"});
        rest.create_topic(TOPIC, 1, 3, configs);
        rest.wait_until_healthy(TOPIC, DEADLINE);
        write(&cluster, TOPIC, 0, 1024);
        // Until the preferred one leads, leadership may yet move.
        let leader = wait_for("the preferred leader", DEADLINE, || {
            let partition = rest.partition(TOPIC, 0)?;
            let preferred = partition.replicas.first().copied();
            holds(partition.leader == preferred, format!("{partition:?}"))?;
            partition.leader.ok_or_else(|| "no replica".to_owned())
        });
        let is_leader = |name: &&str| *name == format!("broker-{leader}");
        let (leaders, followers): (Vec<_>, Vec<_>) = BROKERS.into_iter().partition(is_leader);
        let (leader, away, other) = (leaders[0], followers[0], followers[1]);
        let mut next = 1024;
        // Raft forgets a moment after it may: on a busy machine once more is written than it keeps.
        for _ in 0..4 {
            cluster.kill_9(away);
            let own = log_files::content(&cluster, away).len() as u64;
            write_many(&cluster, TOPIC, next);
            next += RECORDS;
            cluster.start_service(away);
            let came = wait_for("half of a copy, or the replica", DEADLINE, || {
                let bytes = moved(&cluster, away, "")?;
                let is_half = bytes > RECORDS * 1024 / 2;
                match rest.partition(TOPIC, 0)?.isr.len() {
                    // It followed Raft, or the copy was over between two looks.
                    3 => Ok(0),
                    _ => holds(is_half, format!("{bytes} bytes")).map(|()| bytes),
                }
            });
            if came > 0 {
                return HalfCopied {
                    cluster,
                    leader,
                    away,
                    other,
                    next,
                    came,
                    own,
                };
            }
        }
        panic!("no copy was caught half-way");
    }
}

/// Bytes of copies that a broker has taken, or, with `_served`, given since its start.
fn moved(cluster: &Cluster, broker: &str, what: &str) -> Result<u64, String> {
    let metric = format!("chronik_broker_copied_bytes{what}_total");
    cluster.metric(broker, &metric).map(|bytes| bytes as u64)
}

#[test]
fn a_copy_takes_from_all_and_goes_on_when_its_leader_dies() {
    let HalfCopied {
        mut cluster,
        leader,
        away,
        other,
        next,
        came,
        own,
    } = HalfCopied::start("copy-on");
    let rest = cluster.rest();
    for broker in [leader, other] {
        let served = moved(&cluster, broker, "_served").unwrap();
        assert!(served >= SEGMENT, "{broker} gave {served} bytes");
    }
    cluster.kill_9(leader);
    wait_for("the other two to have it all", DEADLINE, || {
        let partition = rest.partition(TOPIC, 0)?;
        let has_leader = |id: &i64| leader == format!("broker-{id}");
        let is_whole = partition.isr.len() == 2 && !partition.isr.iter().any(has_leader);
        holds(is_whole, format!("{partition:?}"))
    });
    let broken_off = cluster.metric(away, "chronik_broker_copies_failed_total");
    assert!(
        broken_off.unwrap() >= 1.0,
        "the copy did not need its leader"
    );
    let copied = moved(&cluster, away, "").unwrap();
    let size = log_files::content(&cluster, other).len() as u64;
    report(&format!(
        "a copy of {} MiB lost its leader after {} MiB: {} MiB were copied in all",
        size / MIB,
        came / MIB,
        copied / MIB
    ));
    // The last segment of the first leader's description may end elsewhere in the other's, and what was on
    // its way comes again.
    let missed = size - own;
    assert!(copied < missed + 3 * SEGMENT, "{copied} bytes for {missed}");
    cluster.start_service(leader);
    rest.wait_until_healthy(TOPIC, DEADLINE);
    cluster.kill_9(other);
    assert_eq!(read(&cluster, TOPIC), (0..next).collect::<Vec<_>>());
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_copy_goes_on_after_its_broker_was_killed_and_after_it_was_stopped() {
    let HalfCopied {
        mut cluster,
        away,
        other,
        next,
        came,
        own,
        ..
    } = HalfCopied::start("copy-restart");
    let rest = cluster.rest();
    cluster.kill_9(away);
    cluster.start_service(away);
    let after_kill = wait_for("more of the copy", DEADLINE, || {
        let bytes = moved(&cluster, away, "")?;
        holds(bytes > 2 * SEGMENT, format!("{bytes} bytes")).map(|()| bytes)
    });
    cluster.stop_service(away);
    cluster.start_service(away);
    rest.wait_until_healthy(TOPIC, DEADLINE);
    let after_stop = moved(&cluster, away, "").unwrap();
    let size = log_files::content(&cluster, other).len() as u64;
    report(&format!(
        "a copy of {} MiB was killed after {} MiB and stopped after {} MiB more: the rest had {} MiB",
        size / MIB,
        came / MIB,
        after_kill / MIB,
        after_stop / MIB
    ));
    assert!(after_stop > 0, "the copy was over before the stop");
    // What was on its way comes again.
    let (copied, missed) = (came + after_kill + after_stop, size - own);
    assert!(copied < missed + 3 * SEGMENT, "{copied} bytes for {missed}");
    cluster.kill_9(other);
    assert_eq!(read(&cluster, TOPIC), (0..next).collect::<Vec<_>>());
    cluster.assert_no_panic();
    cluster.stop();
    let contents = [away, other].map(|broker| log_files::content(&cluster, broker));
    assert!(contents[0] == contents[1]);
}
