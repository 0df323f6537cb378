//! What goes wrong, and when: one fault after the other by chance, each undone after a while.

use std::collections::{BTreeMap, BTreeSet};

use chronik_types::id::{BrokerId, RaftGroupId};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::host::{Cluster, DISK_RESERVE_BYTES, Host};
use crate::trace::event;

/// What undoes a fault.
#[derive(Debug, Clone)]
enum Repair {
    Start(BrokerId),
    Heal(BrokerId, BrokerId),
    FastLink(BrokerId, BrokerId),
    FastDisk(BrokerId),
    RoomyDisk(BrokerId),
    ReadableDisk(BrokerId),
    Unfence(BrokerId),
    WholeIsr(RaftGroupId),
}

pub struct Faults {
    next_at_ms: u64,
    repairs: BTreeMap<(u64, u64), Repair>,
    count: u64,
    /// Hosts whose process dies at the given time: by its power, or killed.
    doomed: BTreeMap<BrokerId, (u64, bool)>,
    pub fenced: BTreeSet<BrokerId>,
    /// The view of the cluster changed.
    pub view_revision: u64,
}

impl Faults {
    pub fn new() -> Faults {
        Faults {
            next_at_ms: 500,
            repairs: BTreeMap::new(),
            count: 0,
            doomed: BTreeMap::new(),
            fenced: BTreeSet::new(),
            view_revision: 1,
        }
    }

    /// Undoes what is due, and makes the next fault if it is time for it.
    pub fn step(
        &mut self,
        now_ms: u64,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
        random: &mut StdRng,
    ) -> Result<(), String> {
        self.end_doomed(now_ms, cluster, hosts, random);
        self.end_stopped(now_ms, cluster, hosts, random)?;
        while let Some(entry) = self.repairs.first_entry()
            && entry.key().0 <= now_ms
        {
            let repair = entry.remove();
            self.repair(&repair, cluster, hosts)?;
        }
        if now_ms >= self.next_at_ms && now_ms < cluster.plan.fault_ms {
            let mean = cluster.plan.fault_interval_ms;
            self.next_at_ms = now_ms + random.random_range(mean / 4..mean * 2);
            self.strike(now_ms, cluster, hosts, random)?;
        }
        Ok(())
    }

    /// Ends all faults at once.
    pub fn heal(
        &mut self,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
    ) -> Result<(), String> {
        event!("everything is healed");
        self.repairs.clear();
        self.doomed.clear();
        cluster.network.heal_all();
        if !self.fenced.is_empty() {
            self.fenced.clear();
            self.view_revision += 1;
        }
        for group in &cluster.plan.groups {
            set_isr(group.id, &group.state().isr, hosts);
        }
        for host in hosts.values_mut() {
            if host.is_doomed {
                host.kill(&cluster.network);
            }
            if host.is_asked_to_stop() || host.cannot_read {
                host.kill(&cluster.network);
            }
            host.disk.set_capacity(None);
            host.frozen_until = 0;
            host.disk_stalls_until = 0;
            host.fsync_max_ms = cluster.plan.fsync_max_ms;
            cluster.network.set_frozen(host.id, false);
            self.start(host.id, cluster, host)?;
        }
        Ok(())
    }

    fn start(
        &mut self,
        broker: BrokerId,
        cluster: &Cluster,
        host: &mut Host,
    ) -> Result<(), String> {
        if host.running.is_none() {
            event!("broker {broker} starts");
            cluster.network.power_returns(broker);
            host.start(cluster, cluster.plan.view(&self.fenced, self.view_revision))?;
        }
        Ok(())
    }

    fn later(&mut self, at_ms: u64, repair: Repair) {
        self.count += 1;
        self.repairs.insert((at_ms, self.count), repair);
    }

    fn repair(
        &mut self,
        repair: &Repair,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
    ) -> Result<(), String> {
        event!("repair: {repair:?}");
        match *repair {
            Repair::Start(broker) => {
                if let Some(host) = hosts.get_mut(&broker) {
                    self.start(broker, cluster, host)?;
                }
            }
            Repair::Heal(from, to) => cluster.network.heal(from, to),
            Repair::FastLink(from, to) => cluster.network.set_slow(from, to, 0),
            Repair::FastDisk(broker) => {
                if let Some(host) = hosts.get_mut(&broker) {
                    host.fsync_max_ms = cluster.plan.fsync_max_ms;
                }
            }
            Repair::RoomyDisk(broker) => hosts[&broker].disk.set_capacity(None),
            Repair::ReadableDisk(broker) => {
                // Copies from other replicas, which mend it without that, are not simulated.
                if let Some(host) = hosts.get_mut(&broker).filter(|host| host.cannot_read) {
                    host.kill(&cluster.network);
                    cluster.network.set_frozen(broker, false);
                    self.start(broker, cluster, host)?;
                }
            }
            Repair::WholeIsr(id) => {
                let group = cluster.plan.groups.iter().find(|group| group.id == id);
                if let Some(group) = group {
                    set_isr(id, &group.state().isr, hosts);
                }
            }
            Repair::Unfence(broker) => {
                self.fenced.remove(&broker);
                self.view_revision += 1;
            }
        }
        Ok(())
    }

    /// Processes that were to die in the middle of something, and those that found their disk broken.
    fn end_doomed(
        &mut self,
        now_ms: u64,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
        random: &mut StdRng,
    ) {
        let due: Vec<(BrokerId, bool)> = self
            .doomed
            .iter()
            .filter(|(broker, (at_ms, _))| *at_ms <= now_ms || hosts[*broker].has_failed())
            .map(|(broker, (_, by_power))| (*broker, *by_power))
            .collect();
        for (broker, by_power) in due {
            self.doomed.remove(&broker);
            let host = hosts.get_mut(&broker).unwrap();
            if host.running.is_some() && host.is_doomed {
                end(host, by_power, cluster, random);
                let pause = random.random_range(50..4_000);
                self.later(now_ms + pause, Repair::Start(broker));
            }
        }
    }

    /// Processes that were asked to stop and have done their part.
    fn end_stopped(
        &mut self,
        now_ms: u64,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
        random: &mut StdRng,
    ) -> Result<(), String> {
        for host in hosts.values_mut().filter(|host| host.has_stopped()) {
            if host.is_doomed {
                continue;
            }
            host.stop(&cluster.network)?;
            cluster.network.set_frozen(host.id, false);
            let pause = random.random_range(50..4_000);
            self.later(now_ms + pause, Repair::Start(host.id));
        }
        Ok(())
    }

    fn strike(
        &mut self,
        now_ms: u64,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
        random: &mut StdRng,
    ) -> Result<(), String> {
        let kind = random.random_range(0..19);
        match kind {
            0..=5 | 12..=13 | 15 | 17..=18 => {
                self.strike_machine(kind, now_ms, cluster, hosts, random)
            }
            _ => {
                self.strike_cluster(kind, now_ms, cluster, hosts, random);
                Ok(())
            }
        }
    }

    /// Something happens to one machine, or to all of them.
    fn strike_machine(
        &mut self,
        kind: u32,
        now_ms: u64,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
        random: &mut StdRng,
    ) -> Result<(), String> {
        let one = *cluster.plan.brokers.choose(random).unwrap();
        let span = random.random_range(50..6_000);
        let host = hosts.get_mut(&one).unwrap();
        let runs = host.running.is_some() && !host.is_doomed;
        match kind {
            0 | 1 if runs => {
                let by_power = random.random_bool(0.5);
                end(host, by_power, cluster, random);
                self.later(now_ms + span, Repair::Start(one));
            }
            2 if runs => {
                // In the middle of what its disk is doing.
                let calls = random.random_range(0..12);
                event!("broker {one} dies in {calls} calls of its disk");
                host.disk.fail_power_after(calls);
                host.is_doomed = true;
                self.doomed
                    .insert(one, (now_ms + span, random.random_bool(0.5)));
            }
            3 => self.end_all(now_ms, cluster, hosts, random),
            4 | 5 if runs => {
                event!("broker {one} is paused for {span} ms");
                host.frozen_until = now_ms + span;
                cluster.network.set_frozen(one, true);
            }
            12 => {
                host.fsync_max_ms = random.random_range(50..600);
                event!("the disk of broker {one} takes {} ms", host.fsync_max_ms);
                self.later(now_ms + span, Repair::FastDisk(one));
            }
            13 => {
                event!("the disk of broker {one} stalls for {span} ms");
                host.disk_stalls_until = now_ms + span;
            }
            17 => {
                // Nothing above the reserve, and half of that: no records are taken, the rest has room.
                host.disk
                    .set_capacity(Some(host.disk.used_bytes() + DISK_RESERVE_BYTES / 2));
                event!("the disk of broker {one} is full");
                self.later(now_ms + span, Repair::RoomyDisk(one));
            }
            18 if runs => {
                // A new process has nothing in memory.
                host.kill(&cluster.network);
                cluster.network.set_frozen(one, false);
                self.start(one, cluster, host)?;
                if let Some(path) = host.make_unreadable(random) {
                    event!("broker {one} cannot read {path}");
                    self.later(now_ms + span, Repair::ReadableDisk(one));
                }
            }
            15 => {
                if let Some(running) = host.running.as_ref().filter(|_| runs) {
                    event!("broker {one} is asked to stop");
                    running.stop.cancel();
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Something happens between machines, or to what the controllers say.
    fn strike_cluster(
        &mut self,
        kind: u32,
        now_ms: u64,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
        random: &mut StdRng,
    ) {
        let brokers = &cluster.plan.brokers;
        let one = *brokers.choose(random).unwrap();
        let other = *brokers.choose(random).unwrap();
        let span = random.random_range(50..6_000);
        match kind {
            6 if one != other => {
                event!("cut from {one} to {other}");
                cluster.network.cut(one, other);
                self.later(now_ms + span, Repair::Heal(one, other));
            }
            7 if one != other => self.part(now_ms + span, &[one], &[other], cluster),
            8 | 9 => {
                let rest: Vec<BrokerId> = brokers.iter().copied().filter(|b| *b != one).collect();
                self.part(now_ms + span, &[one], &rest, cluster);
            }
            10 if one != other => {
                event!("connections between {one} and {other} are reset");
                cluster.network.reset(one, other);
            }
            11 if one != other => {
                let extra_ms = random.random_range(20..600);
                event!("{extra_ms} ms more from {one} to {other}");
                cluster.network.set_slow(one, other, extra_ms);
                self.later(now_ms + span, Repair::FastLink(one, other));
            }
            14 => {
                event!("broker {one} is fenced");
                self.fenced.insert(one);
                self.view_revision += 1;
                self.later(now_ms + span, Repair::Unfence(one));
            }
            16 => {
                let group = cluster.plan.groups.choose(random).unwrap();
                let mut isr = group.state().isr;
                isr.truncate(random.random_range(1..=isr.len()));
                event!("the ISR of group {} is {isr:?}", group.id);
                set_isr(group.id, &isr, hosts);
                self.later(now_ms + span, Repair::WholeIsr(group.id));
            }
            _ => {}
        }
    }

    fn part(&mut self, until_ms: u64, some: &[BrokerId], others: &[BrokerId], cluster: &Cluster) {
        event!("no way between {some:?} and {others:?}");
        for one in some {
            for other in others {
                for (from, to) in [(*one, *other), (*other, *one)] {
                    cluster.network.cut(from, to);
                    self.later(until_ms, Repair::Heal(from, to));
                }
            }
        }
    }

    /// The power of the whole cluster fails.
    fn end_all(
        &mut self,
        now_ms: u64,
        cluster: &Cluster,
        hosts: &mut BTreeMap<BrokerId, Host>,
        random: &mut StdRng,
    ) {
        for host in hosts.values_mut() {
            if host.running.is_some() {
                end(host, true, cluster, random);
            }
            let pause = random.random_range(50..1_000);
            self.later(now_ms + pause, Repair::Start(host.id));
        }
    }
}

fn set_isr(group: RaftGroupId, isr: &[BrokerId], hosts: &BTreeMap<BrokerId, Host>) {
    for running in hosts.values().filter_map(|host| host.running.as_ref()) {
        if let Some(state) = running.states.get(&group) {
            state.send_modify(|state| state.isr = isr.to_vec());
        }
    }
}

fn end(host: &mut Host, by_power: bool, cluster: &Cluster, random: &mut StdRng) {
    if by_power {
        let kept = *[0.0, 0.5, 1.0].choose(random).unwrap();
        host.lose_power(&cluster.network, random, kept);
    } else {
        host.kill(&cluster.network);
    }
    cluster.network.set_frozen(host.id, false);
}
