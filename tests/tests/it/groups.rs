//! Consumer groups: members at different gateways share the partitions, commits survive.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::process::Talking;
use chronik_tests::tools::{franz_go, run_ok};
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(60);

/// A member of a group, and what it has seen so far.
struct Member {
    process: Talking,
    assigned: BTreeSet<i32>,
    /// Partition and offset, as often as they came.
    records: Vec<(i32, i64)>,
}

impl Member {
    fn join(cluster: &Cluster, name: &str, bootstrap: &str, topic: &str) -> Self {
        let arguments = ["-topic", topic, "-group", "readers", "-timeout", "5m"];
        let mut command = franz_go("group", bootstrap, &arguments);
        let process = Talking::spawn(name, &mut command, &cluster.file(&format!("{name}.log")));
        Self {
            process,
            assigned: BTreeSet::new(),
            records: Vec::new(),
        }
    }

    fn take(&mut self, line: &str) {
        let mut words = line.split(' ');
        match words.next() {
            Some("assigned") => {
                let list = words.next().unwrap_or_default();
                self.assigned = list.split(',').filter_map(|id| id.parse().ok()).collect();
            }
            Some("record") => {
                let partition = words.next().and_then(|word| word.parse().ok());
                let offset = words.next().and_then(|word| word.parse().ok());
                let record = partition
                    .zip(offset)
                    .unwrap_or_else(|| panic!("a bad line: {line}"));
                self.records.push(record);
            }
            _ => panic!("a bad line: {line}"),
        }
    }

    fn look(&mut self) {
        for line in self.process.lines_so_far() {
            self.take(&line);
        }
    }

    fn leave(mut self) -> Vec<(i32, i64)> {
        self.look();
        let Self {
            process,
            mut records,
            ..
        } = self;
        for line in process.finish(DEADLINE) {
            let mut words = line.split(' ');
            if words.next() == Some("record") {
                let mut number = || words.next().and_then(|word| word.parse::<i64>().ok());
                let (partition, offset) = number().zip(number()).expect("a record line");
                records.push((i32::try_from(partition).expect("a partition"), offset));
            }
        }
        records
    }
}

fn wait_for_sharing(members: &mut [Member], partitions: i32) {
    wait_for("the members to share all partitions", DEADLINE, || {
        let mut all = BTreeSet::new();
        let mut count = 0;
        for member in members.iter_mut() {
            member.look();
            holds(!member.assigned.is_empty(), "a member has none")?;
            count += member.assigned.len();
            all.extend(member.assigned.iter().copied());
        }
        let expected: BTreeSet<i32> = (0..partitions).collect();
        let seen: Vec<_> = members.iter().map(|member| &member.assigned).collect();
        holds(
            all == expected && count == expected.len(),
            format!("{seen:?}"),
        )
    });
}

fn produce(cluster: &Cluster, topic: &str, partitions: u32, records: usize) {
    let (partitions, records) = (partitions.to_string(), records.to_string());
    let arguments = [
        "-topic",
        topic,
        "-partitions",
        &partitions,
        "-records",
        &records,
    ];
    let output = run_ok(
        &mut franz_go("produce", &cluster.bootstrap(), &arguments),
        "",
        DEADLINE,
    );
    assert!(output.contains("\"unknown\":0"), "{output}");
}

/// How often each record was seen, over all members.
fn counts(records: impl IntoIterator<Item = (i32, i64)>) -> BTreeMap<(i32, i64), usize> {
    let mut counts = BTreeMap::new();
    for record in records {
        *counts.entry(record).or_default() += 1;
    }
    counts
}

#[test]
fn members_at_different_gateways_share_the_partitions_and_resume_after_a_restart() {
    let options = Options {
        gateways: 2,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("groups", options);
    cluster.rest().create_topic("work", 6, 3, json!({}));
    let first = cluster.service("gateway-1").kafka.join(",");
    let second = cluster.service("gateway-2").kafka.join(",");
    assert_ne!(first, second);

    let mut members = vec![
        Member::join(&cluster, "member-1", &first, "work"),
        Member::join(&cluster, "member-2", &second, "work"),
    ];
    wait_for_sharing(&mut members, 6);
    assert!(members.iter().all(|member| member.assigned.len() == 3));
    produce(&cluster, "work", 6, 6000);
    wait_for("every record to be delivered", DEADLINE, || {
        members.iter_mut().for_each(Member::look);
        let seen: usize = members.iter().map(|member| member.records.len()).sum();
        holds(seen >= 6000, format!("{seen} of 6000"))
    });
    let delivered = counts(members.iter().flat_map(|member| member.records.clone()));
    assert_eq!(delivered.len(), 6000);
    assert!(
        delivered.values().all(|count| *count == 1),
        "records were delivered twice"
    );
    for member in &members {
        assert!(
            member
                .records
                .iter()
                .all(|(partition, _)| member.assigned.contains(partition)),
            "a member got records of a partition that is not its own"
        );
    }

    // One leaves: the other takes over all partitions, and nothing committed comes again.
    let leaver = members.remove(0);
    leaver.leave();
    wait_for_sharing(&mut members, 6);
    members.remove(0).leave();

    // All processes die; commits were replicated, so a new member starts where they ended.
    cluster.kill_9_everything();
    cluster.launch();
    produce(&cluster, "work", 6, 600);
    let mut reader = Member::join(&cluster, "member-3", &cluster.bootstrap(), "work");
    wait_for("the new records to be delivered", DEADLINE, || {
        reader.look();
        holds(
            reader.records.len() >= 600,
            format!("{} of 600", reader.records.len()),
        )
    });
    let resumed = counts(reader.leave());
    assert_eq!(resumed.len(), 600);
    assert!(
        resumed.keys().all(|record| !delivered.contains_key(record)),
        "a committed record was delivered again"
    );
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn a_killed_member_is_replaced_after_its_session_timeout() {
    let mut cluster = Cluster::start("group-kill");
    cluster.rest().create_topic("work", 4, 3, json!({}));
    let bootstrap = cluster.bootstrap();
    let mut members = vec![
        Member::join(&cluster, "member-1", &bootstrap, "work"),
        Member::join(&cluster, "member-2", &bootstrap, "work"),
    ];
    wait_for_sharing(&mut members, 4);
    // Dropped: killed, without leaving.
    drop(members.remove(0));
    wait_for_sharing(&mut members, 4);
    members.remove(0).leave();
    cluster.assert_sound();
    cluster.stop();
}

#[test]
fn a_group_survives_the_loss_of_its_coordinator() {
    let mut cluster = Cluster::start("group-coordinator");
    let rest = cluster.rest();
    rest.create_topic("work", 6, 3, json!({}));
    produce(&cluster, "work", 6, 600);
    let mut member = Member::join(&cluster, "member-1", &cluster.bootstrap(), "work");
    wait_for("the first records", DEADLINE, || {
        member.look();
        holds(
            member.records.len() >= 600,
            format!("{} of 600", member.records.len()),
        )
    });
    // Every broker in turn: one of them leads the partition of the group.
    for broker in ["broker-1", "broker-2", "broker-3"] {
        cluster.kill_9(broker);
        cluster.start_service(broker);
        cluster.wait_until_ready(broker, DEADLINE);
        rest.wait_until_healthy("work", DEADLINE);
        rest.wait_until_healthy("__consumer_offsets", DEADLINE);
    }
    produce(&cluster, "work", 6, 600);
    wait_for("the later records", DEADLINE, || {
        member.look();
        let seen = counts(member.records.iter().copied()).len();
        holds(seen >= 1200, format!("{seen} of 1200"))
    });
    member.leave();
    cluster.assert_no_panic();
    cluster.stop();
}
