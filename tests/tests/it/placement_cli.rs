//! An operator places replicas by the command line alone: a limit on what copies take, a move with its progress,
//! preferred leaders, a drain, and the balance after a broker was added.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use chronik_tests::bin_dir;
use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::figures::report;
use chronik_tests::numbered::{read, write};
use chronik_tests::tools::run_ok;
use chronik_tests::wait::{holds, wait_for};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Records of 1 KiB; more than Raft keeps of them.
const RECORDS: u64 = 60 * 1024;
/// Of what Raft keeps, all of it.
const KEPT: u64 = 10 * 1024;
const LIMIT_BYTES_PER_SECOND: u64 = 12_000_000;

struct Operator {
    urls: String,
}

impl Operator {
    fn of(cluster: &Cluster) -> Self {
        let urls = cluster.rest_addresses().iter();
        let urls: Vec<String> = urls.map(|address| format!("http://{address}")).collect();
        Self {
            urls: urls.join(","),
        }
    }

    /// Runs `chronik`; it must succeed.
    fn chronik(&self, line: &str) -> Value {
        let mut command = Command::new(bin_dir().join("chronik"));
        command
            .args(line.split(' '))
            .args(["--output", "json"])
            .env("CHRONIK_REST_URL", &self.urls);
        let output = run_ok(&mut command, "", DEADLINE);
        match output.trim() {
            "" => Value::Null,
            text => serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}")),
        }
    }
}

/// What broker 4 has of the copy that it takes, and of how many bytes.
fn copied(reassignments: &Value) -> Option<(u64, u64)> {
    let replicas = reassignments["reassignments"][0]["progress"]["replicas"].as_array()?;
    let new = replicas.iter().find(|replica| replica["broker_id"] == 4)?;
    let copy = &new["copy"];
    Some((
        copy["copied_bytes"].as_u64()?,
        copy["total_bytes"].as_u64()?,
    ))
}

#[test]
fn an_operator_moves_drains_and_balances_by_the_command_line() {
    let keeps_little = [
        ("RAFT_KEEP_BYTES", "16777216"),
        ("RETENTION_CHECK_INTERVAL_MS", "200"),
    ];
    let setting =
        |(name, value): (&str, &str)| (format!("CHRONIK_BROKER_LOG__{name}"), value.to_owned());
    let options = Options {
        brokers: 4,
        environment: keeps_little.map(setting).to_vec(),
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("placement", options);
    let rest = cluster.rest();
    let operator = Operator::of(&cluster);

    // A replica goes to a broker that has nothing of 60 MiB, while its leader has forgotten most of them.
    let body = json!({
        "name": "placed", "assignments": [[1, 2, 3]], "timeout_ms": 60_000,
        "configs": {"min.insync.replicas": "2", "segment.bytes": "8388608"},
    });
    rest.create_topic_in_the_end(&body, DEADLINE);
    rest.wait_until_healthy("placed", DEADLINE);
    for part in 0..6 {
        write(&cluster, "placed", part * RECORDS / 6, RECORDS / 6);
    }
    operator.chronik(&format!(
        "cluster set --reassignment-bytes-per-second {LIMIT_BYTES_PER_SECOND} --leader-balance-enable false"
    ));
    let settings = operator.chronik("cluster settings");
    assert_eq!(
        settings["reassignment_bytes_per_second"], LIMIT_BYTES_PER_SECOND,
        "{settings}"
    );
    let began = Instant::now();
    operator.chronik("partition reassign placed:0=2,3,4");
    let mut seen = BTreeSet::new();
    wait_for("the move to be done", DEADLINE, || {
        let reassignments = operator.chronik("partition reassignments");
        seen.extend(copied(&reassignments));
        let left = reassignments["reassignments"].as_array().map(Vec::len);
        holds(left == Some(0), reassignments.to_string())
    });
    let took = began.elapsed();
    let is_part = |(copied, total): &(u64, u64)| *total > 30 * MIB && (1..*total).contains(copied);
    assert!(
        seen.iter().filter(|copy| is_part(copy)).count() >= 2,
        "its progress was told, more than once: {seen:?}"
    );
    assert_eq!(
        rest.partition("placed", 0).expect("REST answers").replicas,
        [2, 3, 4]
    );
    let metric = |name: &str| {
        let name = format!("chronik_broker_{name}_total");
        cluster.metric("broker-4", &name).expect("broker 4 answers")
    };
    assert!(metric("copies_installed") >= 1.0, "it took a copy");
    let copied = metric("copied_bytes");
    report(&format!(
        "a replica of {:.0} MiB was moved in {:.1} s, {:.0} MiB of it by a copy at no more than {:.0} MB/s",
        (RECORDS * 1024 / MIB) as f64,
        took.as_secs_f64(),
        copied / MIB as f64,
        LIMIT_BYTES_PER_SECOND as f64 / 1e6
    ));
    assert!(copied > 30.0 * MIB as f64, "{copied} bytes");
    // Each of few streams may be a piece ahead.
    let allowed = took.as_secs_f64() * LIMIT_BYTES_PER_SECOND as f64 + 4.0 * MIB as f64;
    assert!(copied <= allowed, "{copied} bytes in {took:?}");

    // Nobody but the operator hands leadership over.
    let leader = wait_for("one of the new replicas to lead", DEADLINE, || {
        let leader = rest.partition("placed", 0)?.leader;
        leader
            .filter(|leader| [2, 3, 4].contains(leader))
            .ok_or_else(|| format!("{leader:?}"))
    });
    let mut order: Vec<i64> = [2, 3, 4].into_iter().filter(|id| *id != leader).collect();
    order.push(leader);
    let names: Vec<String> = order.iter().map(i64::to_string).collect();
    operator.chronik(&format!("partition reassign placed:0={}", names.join(",")));
    wait_for("the new order", DEADLINE, || {
        let partition = rest.partition("placed", 0)?;
        holds(partition.replicas == order, format!("{partition:?}"))
    });
    let other = operator.chronik("partition list --state not-preferred-leader");
    assert_eq!(other["partitions"][0]["topic"], "placed", "{other}");
    operator.chronik("partition elect-leaders --all");
    let led_by_first = rest.partition("placed", 0).expect("REST answers");
    assert_eq!(led_by_first.leader, Some(order[0]), "{led_by_first:?}");

    // What Raft still has may come without a copy, and the limit holds for it too.
    let kept = json!({
        "name": "kept", "assignments": [[1, 2]], "timeout_ms": 60_000,
        "configs": {"min.insync.replicas": "1"},
    });
    rest.create_topic_in_the_end(&kept, DEADLINE);
    rest.wait_until_healthy("kept", DEADLINE);
    write(&cluster, "kept", 0, KEPT);
    let limit = LIMIT_BYTES_PER_SECOND / 4;
    operator.chronik(&format!(
        "cluster set --reassignment-bytes-per-second {limit}"
    ));
    let before = metric("copied_bytes");
    let began = Instant::now();
    operator.chronik("partition reassign kept:0=2,4");
    wait_for("the move to be done", DEADLINE, || {
        let replicas = rest.partition("kept", 0)?.replicas;
        holds(replicas == [2, 4], format!("{replicas:?}"))
    });
    let took = began.elapsed().as_secs_f64();
    report(&format!(
        "{} MiB came in {took:.1} s at no more than {:.0} MB/s, {:.0} MiB of it by a copy",
        KEPT * 1024 / MIB,
        limit as f64 / 1e6,
        (metric("copied_bytes") - before) / MIB as f64
    ));
    // A piece may be ahead, and a new replica votes a little before it has all.
    let least = (KEPT * 1024).saturating_sub(2 * MIB) as f64 / limit as f64;
    assert!(took >= least, "{took} s, at least {least} s were expected");
    operator.chronik(&format!(
        "cluster set --reassignment-bytes-per-second {LIMIT_BYTES_PER_SECOND}"
    ));

    operator.chronik(&format!("broker drain {}", order[0]));
    wait_for("the drain to be done", DEADLINE, || {
        let status = operator.chronik(&format!("broker drain-status {}", order[0]));
        holds(status["done"] == true, status.to_string())
    });
    let drained = rest.partition("placed", 0).expect("REST answers");
    assert_ne!(drained.leader, Some(order[0]), "{drained:?}");
    operator.chronik(&format!("broker undrain {}", order[0]));

    // A broker without its share gets it.
    let assignments: Vec<[i64; 3]> = vec![[1, 2, 3]; 8];
    let body = json!({"name": "uneven", "assignments": assignments, "timeout_ms": 60_000});
    rest.create_topic_in_the_end(&body, DEADLINE);
    let planned = operator.chronik("cluster rebalance --dry-run");
    let moves = planned["moves"].as_array().map_or(0, Vec::len);
    assert!(moves >= 5 && planned["executed"] == false, "{planned}");
    let on_4 = || -> Result<usize, String> {
        let partitions = rest.partitions("uneven")?;
        Ok(partitions
            .iter()
            .filter(|p| p.replicas.contains(&4))
            .count())
    };
    assert_eq!(on_4(), Ok(0), "it was only shown");
    let done = operator.chronik("cluster rebalance --execute");
    assert_eq!(done["executed"], true, "{done}");
    wait_for("broker 4 to have its share", DEADLINE, || {
        let left = operator.chronik("partition reassignments");
        let left = left["reassignments"].as_array().map(Vec::len);
        holds(
            left == Some(0) && on_4()? >= 5,
            format!("{left:?}, {:?}", on_4()),
        )
    });
    let again = operator.chronik("cluster rebalance --dry-run");
    assert_eq!(again["moves"], json!([]), "{again}");
    rest.wait_until_healthy("placed", DEADLINE);
    assert_eq!(read(&cluster, "placed"), (0..RECORDS).collect::<Vec<_>>());
    cluster.assert_no_panic();
    cluster.stop();
}
