//! What many partitions cost, measured on a cluster of real processes: creation, rest, the death of a
//! broker, and the restart of all.
//!
//! Invariant: a step is over when what it promises is seen from outside (REST, metrics, clients),
//! never because time has passed.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::cluster::{BROKERS, Cluster, Options};
use crate::figures::{Allowance, cpu_time, memory_mib, report};
use crate::probe::{self, Ack};
use crate::rest::{Partition, Rest};
use crate::tools::{franz_go, run_ok};
use crate::wait::{holds, measure_over, wait_for};

/// How large, and how long each step may take.
#[derive(Debug, Clone)]
pub struct Plan {
    pub topics: u32,
    pub partitions_per_topic: u32,
    /// How long after its last use a replica rests.
    pub rest_after_ms: u64,
    pub idle_window: Duration,
    pub goals: Goals,
    pub allowance: Allowance,
}

/// What each step shall not exceed.
#[derive(Debug, Clone)]
pub struct Goals {
    pub created: Duration,
    /// Share of one core that the three brokers use together.
    pub idle_cpu: f64,
    pub memory_kib_per_replica: f64,
    /// The longest that a write waits to a partition that a broker leads which is killed with -9.
    pub in_use: Duration,
    /// Until all partitions of a killed broker have leaders.
    pub all_led: Duration,
    /// From the start of the processes until every partition is led.
    pub restarted: Duration,
}

const DEADLINE: Duration = Duration::from_secs(300);

/// Runs all steps, prints their figures, and holds them against their goals.
pub fn run(name: &str, plan: &Plan) {
    let options = Options {
        controllers: 1,
        alone: true,
        environment: vec![(
            "CHRONIK_BROKER_REPLICATION__REST_AFTER_MS".to_owned(),
            plan.rest_after_ms.to_string(),
        )],
        ..Options::default()
    };
    let mut cluster = Cluster::start_with(name, options);
    let run = Run::new(name, plan, &cluster);
    run.create();
    run.rest(&cluster);
    run.kill_one(&mut cluster);
    run.restart_all(
        &mut cluster,
        "kill -9 of everything",
        Cluster::kill_9_everything,
    );
    run.restart_all(&mut cluster, "an orderly stop", Cluster::stop);
    cluster.assert_no_panic();
    cluster.stop();
}

struct Run<'a> {
    plan: &'a Plan,
    name: String,
    topics: Vec<String>,
    rest: Rest,
    /// Memory of the brokers before there was any partition.
    empty_mib: f64,
}

impl<'a> Run<'a> {
    fn new(name: &str, plan: &'a Plan, cluster: &Cluster) -> Self {
        Self {
            plan,
            name: name.to_owned(),
            topics: (0..plan.topics).map(|n| format!("{name}-{n}")).collect(),
            rest: cluster.rest(),
            empty_mib: brokers_mib(cluster),
        }
    }

    fn say(&self, line: &str) {
        report(&format!("{}: {line}", self.name));
    }

    fn hold(&self, what: &str, is: f64, goal: f64) {
        let what = format!("{}: {what}", self.name);
        self.plan.allowance.hold(&what, is, goal);
    }

    fn partition_count(&self) -> u32 {
        self.plan.topics * self.plan.partitions_per_topic
    }

    fn partitions(&self, rest: &Rest) -> Result<Vec<Partition>, String> {
        let mut all = Vec::new();
        for topic in &self.topics {
            all.extend(rest.partitions(topic)?);
        }
        holds(
            all.len() == self.partition_count() as usize,
            format!("{} partitions", all.len()),
        )?;
        Ok(all)
    }

    /// Every partition has a leader, none of them `dead`.
    fn wait_until_led(&self, rest: &Rest, dead: Option<i64>) -> Vec<Partition> {
        wait_for("every partition to be led", DEADLINE, || {
            let all = self.partitions(rest)?;
            let leaderless = |p: &&Partition| p.leader.is_none() || p.leader == dead;
            let count = all.iter().filter(leaderless).count();
            holds(count == 0, format!("{count} have no leader"))?;
            Ok::<_, String>(all)
        })
    }

    fn wait_until_healthy(&self, rest: &Rest) {
        wait_for("every partition to be in sync", DEADLINE, || {
            let all = self.partitions(rest)?;
            let count = all.iter().filter(|p| !p.is_healthy()).count();
            holds(count == 0, format!("{count} are not in sync"))
        });
    }

    /// Writes to the first and the last partition of some topics, through the gateway.
    fn write(&self, cluster: &Cluster, count: usize) -> Duration {
        let began = Instant::now();
        let step = (self.topics.len() / count.max(1)).max(1);
        for topic in self.topics.iter().step_by(step) {
            let arguments = ["-topic", topic, "-count", "1"];
            run_ok(
                &mut franz_go("probe", &cluster.bootstrap(), &arguments),
                "",
                DEADLINE,
            );
        }
        began.elapsed()
    }

    fn create(&self) {
        let began = Instant::now();
        for topic in &self.topics {
            let partitions = self.plan.partitions_per_topic;
            self.rest.create_topic(topic, partitions, 3, json!({}));
        }
        self.wait_until_led(&self.rest, None);
        let led = began.elapsed();
        self.wait_until_healthy(&self.rest);
        self.say(&format!(
            "{} topics of {} partitions, 3 replicas each: all led after {:.1} s, all in sync after {:.1} s",
            self.plan.topics,
            self.plan.partitions_per_topic,
            led.as_secs_f64(),
            began.elapsed().as_secs_f64()
        ));
        self.hold(
            "seconds until all new partitions are led",
            led.as_secs_f64(),
            self.plan.goals.created.as_secs_f64(),
        );
    }

    fn rest(&self, cluster: &Cluster) {
        self.write(cluster, 1);
        let replicas = f64::from(self.partition_count()) * 3.0;
        let loaded = brokers_mib(cluster);
        let open = wait_for("replicas to rest", DEADLINE, || {
            let open: f64 = metric_of_brokers(cluster, "chronik_broker_replicas_open")?;
            holds(open * 100.0 <= replicas, format!("{open} are open"))?;
            Ok::<_, String>(open)
        });
        let pids: Vec<u32> = BROKERS
            .iter()
            .map(|b| cluster.service(b).process.pid)
            .collect();
        let used = |pids: &[u32]| pids.iter().map(|pid| cpu_time(*pid)).sum::<Duration>();
        let before = used(&pids);
        measure_over(self.plan.idle_window);
        let share = (used(&pids) - before).as_secs_f64() / self.plan.idle_window.as_secs_f64();
        let resting = brokers_mib(cluster);
        let per_replica = (resting - self.empty_mib) * 1024.0 / replicas;
        self.say(&format!(
            "at rest: brokers use {:.1} % of one core; {open} of {replicas} replicas are open; memory of the brokers \
             {resting:.0} MiB ({:.0} before the partitions, {loaded:.0} before replicas rested): {per_replica:.1} KiB per replica",
            share * 100.0,
            self.empty_mib,
        ));
        let goals = &self.plan.goals;
        self.hold("share of one core at rest", share, goals.idle_cpu);
        // The same on every machine.
        Allowance::NONE.hold("KiB per replica", per_replica, goals.memory_kib_per_replica);
    }

    fn kill_one(&self, cluster: &mut Cluster) {
        // Until leaders are spread again, a broker may lead less than its share.
        let share = self.partition_count() as usize / 4;
        let led = |all: &[Partition]| all.iter().filter(|p| p.leader == Some(1)).count();
        let before = wait_for("leaders to be spread", DEADLINE, || {
            let all = self.partitions(&self.rest)?;
            holds(led(&all) >= share, format!("broker 1 leads {}", led(&all)))?;
            Ok::<_, String>(all)
        });
        let led = led(&before);
        let others: f64 = leads(cluster, &BROKERS[1..]).expect("both others answer");
        let used = self.topics.iter().find(|topic| {
            let first = self.rest.partition(topic, 0);
            first.is_ok_and(|partition| partition.leader == Some(1))
        });
        let used = used.expect("a topic whose first partition broker 1 leads");
        let probe = probe::start(cluster, used, 1);
        let killed = probe::now();
        let began = Instant::now();
        cluster.kill_9(BROKERS[0]);
        let dead = probe::now();
        // As brokers know it; REST shows it when the controllers do.
        let wanted = f64::from(self.partition_count());
        let mut first = None;
        wait_for("the others to lead all partitions", DEADLINE, || {
            let now = leads(cluster, &BROKERS[1..])?;
            if now > others {
                first.get_or_insert(began.elapsed());
            }
            holds(now >= wanted, format!("they lead {now}"))
        });
        let all = began.elapsed();
        self.wait_until_led(&self.rest, Some(1));
        let mut in_use = Duration::ZERO;
        // Until one has begun when the broker was dead: the longest may be one that was under way.
        probe.wait_for_line("a write after the kill", DEADLINE, |line| {
            let ack = Ack::parse(line)?;
            if ack.ended >= killed {
                in_use = in_use.max(ack.took());
            }
            (ack.began >= dead).then_some(())
        });
        probe.finish(DEADLINE);
        self.say(&format!(
            "kill -9 of a broker that led {led}: the partition in use waited for {:.2} s; first seen led elsewhere after {:.2} s, \
             all after {:.2} s, known to the controllers after {:.2} s",
            in_use.as_secs_f64(),
            first.unwrap_or(all).as_secs_f64(),
            all.as_secs_f64(),
            began.elapsed().as_secs_f64()
        ));
        self.hold(
            "seconds that a write waits at most",
            in_use.as_secs_f64(),
            self.plan.goals.in_use.as_secs_f64(),
        );
        self.hold(
            "seconds until all partitions of a dead broker are led",
            all.as_secs_f64(),
            self.plan.goals.all_led.as_secs_f64(),
        );
        cluster.start_service(BROKERS[0]);
        let began = Instant::now();
        cluster.wait_until_ready(BROKERS[0], DEADLINE);
        self.wait_until_healthy(&self.rest);
        self.say(&format!(
            "the killed broker is back in all ISRs after {:.1} s",
            began.elapsed().as_secs_f64()
        ));
    }

    fn restart_all(&self, cluster: &mut Cluster, after: &str, stop: fn(&mut Cluster)) {
        // It waits for them, which is not to be measured.
        cluster.assert_controllers_agree();
        let began = Instant::now();
        stop(cluster);
        let stopped = began.elapsed();
        let began = Instant::now();
        cluster.launch();
        let rest = cluster.rest();
        let write = self.write(cluster, 1);
        let first = began.elapsed();
        self.wait_until_led(&rest, None);
        // The image may know leaders of before; brokers know who leads now.
        let wanted = f64::from(self.partition_count());
        wait_for("brokers to lead all partitions", DEADLINE, || {
            let now = leads(cluster, &BROKERS)?;
            holds(now >= wanted, format!("they lead {now}"))
        });
        let all = began.elapsed();
        self.wait_until_healthy(&rest);
        self.say(&format!(
            "restart after {after} ({:.1} s): first write after {:.1} s (it took {:.1} s), all led after {:.1} s, all in sync after {:.1} s",
            stopped.as_secs_f64(),
            first.as_secs_f64(),
            write.as_secs_f64(),
            all.as_secs_f64(),
            began.elapsed().as_secs_f64()
        ));
        self.hold(
            "seconds until all partitions are led after a restart",
            all.as_secs_f64(),
            self.plan.goals.restarted.as_secs_f64(),
        );
    }
}

fn brokers_mib(cluster: &Cluster) -> f64 {
    let memory = |broker: &&str| memory_mib(cluster.service(broker).process.pid);
    BROKERS.iter().map(memory).sum()
}

fn leads(cluster: &Cluster, brokers: &[&str]) -> Result<f64, String> {
    let metric = |broker: &&str| cluster.metric(broker, "chronik_broker_partitions_led");
    brokers.iter().map(metric).sum()
}

fn metric_of_brokers(cluster: &Cluster, name: &str) -> Result<f64, String> {
    let metric = |broker: &&str| cluster.metric(broker, name);
    BROKERS.iter().map(metric).sum()
}
