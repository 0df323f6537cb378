//! One run: a cluster and its clients live through the faults of a seed, everything is healed, the
//! power fails once more, and what is there then is compared with what was promised.

use std::collections::BTreeMap;
use std::time::Duration;

use chronik_broker::replica::Acks;
use chronik_types::id::BrokerId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::faults::Faults;
use crate::host::{Cluster, Host};
use crate::invariants::acked_records_survive::AckedRecordsSurvive;
use crate::invariants::idempotent_once_in_order::IdempotentOnceInOrder;
use crate::invariants::life_after_healing::LifeAfterHealing;
use crate::invariants::one_leader_per_epoch::OneLeaderPerEpoch;
use crate::invariants::reads_are_final::ReadsAreFinal;
use crate::invariants::refused_stays_out::RefusedStaysOut;
use crate::invariants::replicas_agree::ReplicasAgree;
use crate::invariants::stored;
use crate::invariants::watermark_never_falls::WatermarkNeverFalls;
use crate::machine::{self, Simulated};
use crate::network::Network;
use crate::plan::{Plan, Sabotage};
use crate::producer::{Kind, Outcome, Producer};
use crate::reader::Reader;
use crate::requests::Answer;
use crate::trace::{self, event};
use crate::transit::Transit;

/// How long everything may take to work again once it is healed.
const HEALING_LIMIT_MS: u64 = 20_000;

#[derive(Default)]
struct Invariants {
    acked: AckedRecordsSurvive,
    idempotent: IdempotentOnceInOrder,
    leaders: OneLeaderPerEpoch,
    reads: ReadsAreFinal,
    refused: RefusedStaysOut,
    replicas: ReplicasAgree,
    watermarks: WatermarkNeverFalls,
}

/// What a run that went well did.
#[derive(Debug, Clone, Copy)]
#[expect(dead_code, reason = "printed as a whole")]
pub struct Summary {
    pub simulated_ms: u64,
    pub acked: usize,
    pub elections: usize,
    /// From the healing until everything worked.
    pub healing_ms: u64,
}

struct Run {
    simulated: Simulated,
    random: StdRng,
    now_ms: u64,
    cluster: Cluster,
    hosts: BTreeMap<BrokerId, Host>,
    faults: Faults,
    transit: Transit,
    producers: Vec<Producer>,
    readers: Vec<Reader>,
    invariants: Invariants,
    told_revision: u64,
    elections: usize,
}

/// Runs a seed on this thread, which must be new.
pub fn run(simulated: Simulated, seed: u64, sabotage: Sabotage) -> Result<Summary, String> {
    let mut random = StdRng::seed_from_u64(seed);
    let plan = Plan::new(sabotage, &mut random);
    event!("{plan:?}");
    let network = Network::new(
        random.random(),
        plan.brokers.iter().copied(),
        plan.latency_max_ms,
    );
    let hosts = plan
        .brokers
        .iter()
        .map(|id| (*id, Host::new(*id, plan.fsync_max_ms)))
        .collect();
    let mut run = Run {
        simulated,
        now_ms: 0,
        transit: Transit::new(plan.latency_max_ms),
        cluster: Cluster { plan, network },
        hosts,
        faults: Faults::new(),
        producers: Vec::new(),
        readers: Vec::new(),
        invariants: Invariants::default(),
        told_revision: 1,
        elections: 0,
        random,
    };
    run.make_clients();
    run.whole()
}

impl Run {
    fn whole(mut self) -> Result<Summary, String> {
        self.start_all()?;
        while self.now_ms < self.cluster.plan.fault_ms {
            self.step()?;
        }
        let healing_ms = self.heal()?;
        // What was promised survives the loss of all power.
        for host in self.hosts.values_mut() {
            host.lose_power(&self.cluster.network, &mut self.random, 0.0);
        }
        self.start_all()?;
        self.wait_for(|run| run.not_caught_up())?;
        self.invariants.reads.confirm(&self.invariants.replicas)?;
        self.invariants.reads.finish()?;
        self.invariants.acked.finish(&self.invariants.replicas)?;
        Ok(Summary {
            simulated_ms: self.now_ms,
            acked: self.invariants.acked.count(),
            elections: self.elections,
            healing_ms,
        })
    }

    fn make_clients(&mut self) {
        let plan = &self.cluster.plan;
        let random = &mut self.random;
        let mut client = 0;
        for group in &plan.groups {
            for kind in [
                Kind::Idempotent,
                Kind::Plain(Acks::All),
                Kind::Plain(Acks::Leader),
            ] {
                for _ in 0..random.random_range(1..=2) {
                    client += 1;
                    self.producers
                        .push(Producer::new(client, group, kind, plan, random));
                }
            }
            for reads_anywhere in [false, true] {
                client += 1;
                self.readers
                    .push(Reader::new(client, group, reads_anywhere));
            }
        }
    }

    fn start_all(&mut self) -> Result<(), String> {
        let network = self.cluster.network.clone();
        for host in self.hosts.values_mut() {
            network.power_returns(host.id);
            let view = self
                .cluster
                .plan
                .view(&self.faults.fenced, self.faults.view_revision);
            host.start(&self.cluster, view)?;
        }
        Ok(())
    }

    /// Ends the faults; waits until every partition takes writes, then until every write and read
    /// is done. Gives how long it took until writes worked.
    fn heal(&mut self) -> Result<u64, String> {
        self.faults.heal(&self.cluster, &mut self.hosts)?;
        let healed_at_ms = self.now_ms;
        for producer in &mut self.producers {
            producer.has_succeeded = false;
            producer.has_quiet_times = false;
        }
        self.wait_for(|run| {
            let waits = run.producers.iter().filter(|p| !p.has_succeeded);
            waits
                .map(|p| format!("client {} cannot write to group {}", p.client, p.group))
                .collect()
        })?;
        let healing_ms = self.now_ms - healed_at_ms;
        for producer in &mut self.producers {
            producer.is_stopped = true;
        }
        self.wait_for(|run| {
            let waits = run.producers.iter().filter(|p| !p.is_idle());
            waits
                .map(|p| format!("client {} of group {} waits", p.client, p.group))
                .collect()
        })?;
        self.wait_for(|run| run.not_caught_up())?;
        Ok(healing_ms)
    }

    fn wait_for(&mut self, missing: impl Fn(&Run) -> Vec<String>) -> Result<(), String> {
        let life = LifeAfterHealing::new(self.now_ms, HEALING_LIMIT_MS);
        while !life.check(self.now_ms, &missing(self))? {
            self.step()?;
        }
        Ok(())
    }

    /// Replicas and readers that have not all that is committed.
    fn not_caught_up(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for group in &self.cluster.plan.groups {
            let end = self.invariants.replicas.end(group.id);
            for replica in &group.replicas {
                let broker = replica.broker_id;
                let running = self.hosts[&broker].running.as_ref();
                let at = running.and_then(|running| running.checked.get(&group.id).copied());
                if at != Some(end) {
                    missing.push(format!(
                        "group {}: broker {broker} is at {at:?} of {end}",
                        group.id
                    ));
                }
            }
            for reader in self.readers.iter().filter(|r| r.group == group.id) {
                if reader.next != end {
                    missing.push(format!(
                        "group {}: a reader is at {} of {end}",
                        group.id, reader.next
                    ));
                }
            }
        }
        missing
    }

    /// One millisecond of everybody.
    fn step(&mut self) -> Result<(), String> {
        self.now_ms += 1;
        let now_ms = self.now_ms;
        self.simulated.set_time(Duration::from_millis(now_ms));
        trace::set_time(now_ms);
        trace::set_actor(String::new());
        let (hosts, random) = (&mut self.hosts, &mut self.random);
        self.faults.step(now_ms, &self.cluster, hosts, random)?;
        self.tell_view();
        self.cluster.network.step(now_ms);
        self.transit.step(now_ms, &mut self.hosts, &mut self.random);
        self.step_clients()?;
        self.step_hosts()?;
        self.observe()
    }

    fn tell_view(&mut self) {
        if self.told_revision != self.faults.view_revision {
            self.told_revision = self.faults.view_revision;
            let view = self
                .cluster
                .plan
                .view(&self.faults.fenced, self.told_revision);
            for running in self.hosts.values().filter_map(|host| host.running.as_ref()) {
                running.view.send_replace(view.clone());
            }
        }
    }

    fn step_hosts(&mut self) -> Result<(), String> {
        // Who goes first changes from step to step.
        let mut order: Vec<BrokerId> = self.hosts.keys().copied().collect();
        let first = self.random.random_range(0..order.len());
        order.rotate_left(first);
        for id in order {
            let Some(host) = self.hosts.get_mut(&id) else {
                continue;
            };
            if host.frozen_until != 0 && host.frozen_until <= self.now_ms {
                event!("broker {id} goes on");
                host.frozen_until = 0;
                self.cluster.network.set_frozen(id, false);
            }
            trace::set_actor(format!("broker {id}"));
            host.step(self.now_ms, &mut self.random);
            trace::set_actor(String::new());
            if let Some(panic) = machine::take_panic() {
                return Err(format!("broker {id} panicked: {panic}"));
            }
            if host.has_failed() && !host.is_doomed {
                return Err(format!("the storage of broker {id} failed by itself"));
            }
        }
        Ok(())
    }

    fn step_clients(&mut self) -> Result<(), String> {
        let now_ms = self.now_ms;
        for (request, answer) in self.transit.arrived() {
            match answer {
                Answer::Produced(result) => {
                    for producer in &mut self.producers {
                        let outcome =
                            producer.answered(request, result.clone(), &mut self.random)?;
                        let group = producer.group;
                        match outcome {
                            Some(Outcome::Acked(appended, key)) => {
                                let base = appended.base_offset;
                                self.invariants.acked.acked(group, base, key)?;
                            }
                            Some(Outcome::Refused(key, error)) => {
                                let why = error.to_string();
                                self.invariants.refused.refused(group, key, why)?;
                            }
                            None => {}
                        }
                    }
                }
                Answer::Read(result) => {
                    for reader in &mut self.readers {
                        let random = &mut self.random;
                        let result = result.clone();
                        // An answer may be on its way while the process ends.
                        let unreadable_at = self.hosts[&reader.target()].unreadable_at;
                        let unreadable = unreadable_at.is_some_and(|at| at + 1_000 > now_ms);
                        let got = reader.answered(now_ms, request, result, unreadable, random)?;
                        if let Some(got) = got {
                            let group = reader.group;
                            let (batches, limit) = (&got.batches, got.high_watermark);
                            self.invariants.watermarks.served(group, batches, limit)?;
                            self.invariants.reads.read(group, got.from, batches)?;
                        }
                    }
                }
            }
        }
        for producer in &mut self.producers {
            producer.step(now_ms, &mut self.transit, &mut self.random);
        }
        for reader in &mut self.readers {
            reader.step(now_ms, &mut self.transit, &mut self.random);
        }
        Ok(())
    }

    /// Looks at every replica as it is now.
    fn observe(&mut self) -> Result<(), String> {
        let invariants = &mut self.invariants;
        for host in self.hosts.values_mut() {
            let (broker, process) = (host.id, host.process_count);
            let Some(running) = &mut host.running else {
                continue;
            };
            for (group, checked) in &mut running.checked {
                let Some(replica) = running.replicas.get(*group) else {
                    continue;
                };
                let leadership = *replica.leadership().borrow();
                if leadership.is_leader {
                    let epoch = leadership.leader_epoch;
                    if invariants.leaders.leads(*group, epoch, (broker, process))? {
                        event!("group {group}: broker {broker} leads in epoch {epoch}");
                        self.elections += 1;
                    }
                }
                let high_watermark = replica.high_watermark();
                invariants
                    .watermarks
                    .observe(*group, broker, process, high_watermark)?;
                while *checked < high_watermark {
                    let read = replica.log().read(*checked, high_watermark, 1 << 20);
                    let read = match read {
                        // Its disk is about to die.
                        Err(_) if host.is_doomed => break,
                        Err(error) if host.cannot_read && error.is_damage() => break,
                        read => read.map_err(|error| {
                            format!("broker {broker} cannot read group {group}: {error}")
                        })?,
                    };
                    let mut batches = Vec::new();
                    for bytes in &read {
                        batches.extend(stored(bytes)?);
                    }
                    let new = invariants.replicas.committed(*group, broker, &batches)?;
                    for batch in &new {
                        invariants.acked.committed(*group, batch)?;
                        invariants.refused.committed(*group, batch)?;
                        invariants.idempotent.committed(*group, batch)?;
                    }
                    match batches.last() {
                        Some(last) => *checked = last.next_offset,
                        None => {
                            return Err(format!(
                                "broker {broker}: group {group} has nothing at {checked} below \
                                 its high watermark {high_watermark}"
                            ));
                        }
                    }
                }
            }
        }
        if self.now_ms.is_multiple_of(100) {
            invariants.reads.confirm(&invariants.replicas)?;
        }
        Ok(())
    }
}
