//! Files of a log that rot, are cut or vanish under a running cluster: no wrong byte is served, and the
//! files come back from the other replicas by themselves.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::ledger::Production;
use chronik_tests::log_files::{content, files};
use chronik_tests::numbered::write;
use chronik_tests::tools::{kcat, run_ok};
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const PRODUCE_DEADLINE: Duration = Duration::from_secs(300);
const DAMAGED: &str = "chronik_broker_logs_damaged";
const REBUILDS: &str = "chronik_broker_rebuilds_total";
const REBUILDS_FAILED: &str = "chronik_broker_rebuilds_failed_total";

/// Rot is looked for all the time, and little is read from memory.
fn cluster(name: &str, options: Options) -> Cluster {
    let settings = [
        ("SCRUB_INTERVAL_MS", "500"),
        ("SCRUB_BYTES_PER_SECOND", "67108864"),
        ("MEMORY_MAX_BYTES", "16777216"),
    ];
    let environment = settings
        .map(|(name, value)| (format!("CHRONIK_BROKER_STORAGE__{name}"), value.to_owned()))
        .to_vec();
    Cluster::start_with(
        name,
        Options {
            environment,
            ..options
        },
    )
}

fn flip(path: &Path) {
    let file = std::fs::File::options().read(true).write(true).open(path);
    let file = file.expect("the file is opened");
    let middle = file.metadata().expect("the file has a size").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle)
        .expect("the byte is read");
    file.write_all_at(&[byte[0] ^ 16], middle)
        .expect("the byte is written");
}

fn cut(path: &Path) {
    let file = std::fs::File::options().write(true).open(path);
    let file = file.expect("the file is opened");
    let size = file.metadata().expect("the file has a size").len();
    file.set_len(size / 3).expect("the file is cut");
}

fn wait_until_sealed(cluster: &Cluster, broker: &str, count: usize) {
    wait_for(&format!("{broker} to write segments"), DEADLINE, || {
        let files = files(cluster, broker, "log");
        holds(files.len() > count, format!("{} files", files.len()))
    });
}

/// Waits until other files are there instead of these, and nothing is known to be damaged any more.
fn wait_until_rebuilt(cluster: &Cluster, broker: &str, gone: &[PathBuf]) {
    wait_for(&format!("{broker} to be rebuilt"), DEADLINE, || {
        let left: Vec<_> = gone.iter().filter(|path| path.exists()).collect();
        holds(left.is_empty(), format!("{left:?} are as they were"))?;
        let (damaged, rebuilds) = (
            cluster.metric(broker, DAMAGED)?,
            cluster.metric(broker, REBUILDS)?,
        );
        let is_done = damaged == 0.0 && rebuilds >= 1.0;
        holds(is_done, format!("{damaged} damaged, {rebuilds} rebuilds"))
    });
}

fn leader(cluster: &Cluster, topic: &str) -> String {
    wait_for("a leader", DEADLINE, || {
        let partition = cluster.rest().partition(topic, 0)?;
        let leader = partition.leader.ok_or_else(|| "none".to_owned())?;
        Ok::<_, String>(format!("broker-{leader}"))
    })
}

#[test]
fn damaged_files_of_a_follower_and_of_a_leader_come_back_while_records_are_written() {
    const RECORDS: u64 = 60_000;
    let mut cluster = cluster("damage", Options::default());
    let rest = cluster.rest();
    let configs = json!({"segment.bytes": "1048576", "min.insync.replicas": "2"});
    rest.create_topic("rot", 1, 3, configs);
    rest.wait_until_healthy("rot", DEADLINE);
    let records = RECORDS.to_string();
    let production = Production::start(
        &cluster,
        "rot",
        &[
            "-partitions",
            "1",
            "-records",
            &records,
            "-size",
            "1000",
            "-rate",
            "3000",
            "-timeout",
            "280s",
        ],
    );
    production.wait_until_acked(RECORDS / 4, PRODUCE_DEADLINE);
    let first = leader(&cluster, "rot");
    let brokers = ["broker-1", "broker-2", "broker-3"];
    let follower = brokers.into_iter().find(|broker| *broker != first);
    let follower = follower.expect("three brokers");
    wait_until_sealed(&cluster, follower, 8);
    let rotten = files(&cluster, follower, "log")[2].clone();
    flip(&rotten);
    wait_until_rebuilt(&cluster, follower, std::slice::from_ref(&rotten));
    let name = rotten.to_string_lossy().into_owned();
    let log = cluster.log(follower);
    let told = log
        .lines()
        .any(|line| line.contains("a log is damaged") && line.contains(&name));
    assert!(told, "{follower} names the file");

    wait_until_sealed(&cluster, &first, 8);
    let damaged = {
        let logs = files(&cluster, &first, "log");
        flip(&logs[1]);
        cut(&logs[4]);
        vec![logs[1].clone(), logs[4].clone()]
    };
    wait_until_rebuilt(&cluster, &first, &damaged);
    let second = leader(&cluster, "rot");
    assert_ne!(second, first, "a sound replica leads");
    let log = cluster.log(&first);
    assert!(log.contains("hands a partition over since its log here is damaged"));

    let produced = production.finish(PRODUCE_DEADLINE);
    produced.assert_all_acked(RECORDS);
    produced.verify(&cluster);

    // Nobody is there to see it: found at the next start, of a replica each.
    cluster.stop();
    let (missing, short) = (
        files(&cluster, "broker-1", "log")[5].clone(),
        files(&cluster, "broker-2", "raft")[3].clone(),
    );
    std::fs::remove_file(&missing).expect("the file is removed");
    cut(&short);
    cluster.launch();
    wait_until_rebuilt(&cluster, "broker-1", &[missing]);
    wait_until_rebuilt(&cluster, "broker-2", &[short]);
    cluster.rest().wait_until_healthy("rot", DEADLINE);
    produced.verify(&cluster);
    cluster.assert_no_panic();
    cluster.stop();
    let contents = brokers.map(|broker| content(&cluster, broker));
    assert!(contents[0].len() as u64 > RECORDS * 1000);
    assert!(contents[0] == contents[1] && contents[1] == contents[2]);
}

#[test]
fn without_another_replica_damage_stays_told_and_the_rest_of_the_log_goes_on() {
    let options = Options {
        controllers: 1,
        brokers: 1,
        ..Options::default()
    };
    let mut cluster = cluster("damage-alone", options);
    let configs = json!({"segment.bytes": "1048576"});
    cluster.rest().create_topic("alone", 1, 1, configs);
    cluster.rest().wait_until_healthy("alone", DEADLINE);
    write(&cluster, "alone", 0, 6 * 1024);
    wait_until_sealed(&cluster, "broker-1", 3);
    cluster.stop();
    let short = files(&cluster, "broker-1", "log")[1].clone();
    cut(&short);
    cluster.launch();
    wait_for("rebuilds to fail", DEADLINE, || {
        let failed = cluster.metric("broker-1", REBUILDS_FAILED)?;
        holds(failed >= 2.0, format!("{failed} failed"))
    });
    assert_eq!(cluster.metric("broker-1", DAMAGED), Ok(1.0));
    assert_eq!(cluster.metric("broker-1", REBUILDS), Ok(0.0));
    let log = cluster.log("broker-1");
    assert!(log.contains("stays damaged for now") && log.contains("no other replica in sync"));
    write(&cluster, "alone", 6 * 1024, 10);
    let bootstrap = cluster.bootstrap();
    let newest = |from: &str| {
        let mut consume = kcat(&[
            "-C", "-q", "-e", "-b", &bootstrap, "-t", "alone", "-p", "0", "-o", from,
        ]);
        run_ok(&mut consume, "", DEADLINE)
    };
    assert_eq!(newest("-10").lines().count(), 10);
    cluster.assert_no_panic();
    cluster.stop();
}
