//! The predecessor's worst results, as tests of this system: acknowledged records that were never
//! stored, replicas that held nothing, a dead node that stayed leader. (Members of one group that
//! each got every record: see `groups`.)

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::ledger::produce;
use chronik_tests::tools::{kcat, run_ok};
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(60);

/// A1, A2: 40,000 unique records of 1 KB, far more than one buffer, on the smallest cluster.
#[test]
fn a_single_broker_keeps_every_record_it_acknowledged() {
    let options = Options {
        controllers: 1,
        brokers: 1,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("single", options);
    let rest = cluster.rest();
    for acks in ["1", "all"] {
        let topic = format!("acks-{acks}");
        rest.create_topic(&topic, 1, 1, json!({}));
        let arguments = [
            "-partitions",
            "1",
            "-records",
            "40000",
            "-size",
            "1024",
            "-acks",
            acks,
        ];
        let produced = produce(&cluster, &topic, &arguments, DEADLINE);
        produced.assert_all_acked(40_000);
        produced.verify(&cluster);
    }
    // And they are on the disk, not only in memory.
    cluster.kill_9_everything();
    cluster.launch();
    for acks in ["1", "all"] {
        let topic = format!("acks-{acks}");
        let ledger = cluster.file(&format!("{topic}.ledger"));
        chronik_tests::ledger::verify(&cluster.bootstrap(), &topic, &ledger);
    }
    cluster.assert_no_panic();
    cluster.stop();
}

/// Payloads "<prefix><number>;" anywhere in the files of a folder.
fn payloads_on_disk(folder: &Path, prefix: &str) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        // Files come and go while a broker works.
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(bytes) = std::fs::read(&path) {
                collect(&bytes, prefix.as_bytes(), &mut found);
            }
        }
    }
    found
}

fn collect(bytes: &[u8], prefix: &[u8], found: &mut BTreeSet<u32>) {
    let mut rest = bytes;
    while let Some(at) = rest
        .windows(prefix.len())
        .position(|window| window == prefix)
    {
        rest = &rest[at + prefix.len()..];
        let digits = &rest[..rest.len().min(6)];
        if let Some(number) = std::str::from_utf8(digits)
            .ok()
            .and_then(|text| text.parse().ok())
        {
            found.insert(number);
        }
    }
}

/// B1, B2, B3: whatever acks says, every replica gets every record.
#[test]
fn every_replica_holds_every_record_on_its_disk() {
    let mut cluster = Cluster::start("replicas");
    let rest = cluster.rest();
    let bootstrap = cluster.bootstrap();
    for acks in ["all", "1", "0"] {
        let topic = format!("copies-{acks}");
        rest.create_topic(&topic, 1, 3, json!({"min.insync.replicas": "2"}));
        rest.wait_until_healthy(&topic, DEADLINE);
        let prefix = format!("<{topic}>");
        let input: String = (0..500)
            .map(|number| format!("{prefix}{number:06};\n"))
            .collect();
        let setting = format!("acks={acks}");
        let mut command = kcat(&[
            "-P", "-b", &bootstrap, "-t", &topic, "-p", "0", "-X", &setting,
        ]);
        run_ok(&mut command, &input, DEADLINE);
        for broker in 1..=3 {
            let folder = cluster.data_dir().join(format!("broker-{broker}"));
            wait_for(
                &format!("acks={acks} on the disk of broker {broker}"),
                DEADLINE,
                || {
                    let found = payloads_on_disk(&folder, &prefix).len();
                    holds(found == 500, format!("{found} of 500"))
                },
            );
        }
    }
    cluster.assert_sound();
    cluster.stop();
}

/// B4: metadata names a leader that lives, and all that was acknowledged is readable.
#[test]
fn a_dead_broker_leads_nothing_and_takes_nothing_with_it() {
    let mut cluster = Cluster::start("dead-leader");
    let rest = cluster.rest();
    let bootstrap = cluster.bootstrap();
    rest.create_topic("kept", 1, 3, json!({"min.insync.replicas": "2"}));
    rest.wait_until_healthy("kept", DEADLINE);
    let produced = produce(
        &cluster,
        "kept",
        &["-partitions", "1", "-records", "501"],
        DEADLINE,
    );
    produced.assert_all_acked(501);
    let dead = rest
        .partition("kept", 0)
        .expect("REST answers")
        .leader
        .expect("a leader");
    cluster.kill_9(&format!("broker-{dead}"));
    let seen = wait_for(
        "a new leader and an ISR without the dead broker",
        DEADLINE,
        || {
            let partition = rest.partition("kept", 0)?;
            let moved = partition.leader.is_some_and(|leader| leader != dead);
            holds(
                moved && !partition.isr.contains(&dead),
                format!("{partition:?}"),
            )?;
            Ok::<_, String>(partition)
        },
    );
    // Kafka clients are told the same.
    wait_for("kcat to see the same leader", DEADLINE, || {
        let list = run_ok(
            &mut kcat(&["-L", "-J", "-b", &bootstrap, "-t", "kept"]),
            "",
            DEADLINE,
        );
        let list: serde_json::Value =
            serde_json::from_str(&list).map_err(|error| error.to_string())?;
        let leader = list["topics"][0]["partitions"][0]["leader"].as_i64();
        holds(
            leader == seen.leader,
            format!("{leader:?} instead of {:?}", seen.leader),
        )
    });
    produced.verify(&cluster);
    let mut more = kcat(&[
        "-P", "-b", &bootstrap, "-t", "kept", "-p", "0", "-X", "acks=all",
    ]);
    run_ok(&mut more, "one more\n", DEADLINE);
    cluster.assert_no_panic();
    cluster.stop();
}
