//! Carries out a schedule of faults on a fleet, and heals everything at its end.
//!
//! Invariant: every fault that began is noted in the history with whom it hit, and is over when `heal`
//! returns.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use super::fleet::Fleet;
use super::network::{Effect, Rule};
use super::schedule::{Direction, Fault, Scope, Step, Target};
use super::workload::{TOPICS, Workload};
use crate::wait::{measure_over, within};

/// How often the schedule, the processes and the workload are looked at.
const TICK: Duration = Duration::from_millis(20);
/// Between two brokers that are restarted one after the other, at most. Other faults may be in the way.
const TURN_DEADLINE: Duration = Duration::from_secs(10);
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// Until every replica is in sync after healing, those that are filled anew included.
pub(super) const WHOLE_DEADLINE: Duration = Duration::from_secs(90);

/// Topic and partition of a number that counts through all topics.
fn place(mut number: usize) -> Result<(&'static str, usize), String> {
    for (topic, partitions) in TOPICS {
        if number < *partitions {
            return Ok((topic, number));
        }
        number -= partitions;
    }
    Err("there is no such partition".to_owned())
}

pub struct Nemesis<'a> {
    pub fleet: &'a mut Fleet,
    pub workload: &'a mut Workload,
    /// How often each kind of fault began.
    pub counts: BTreeMap<String, usize>,
    /// Faults that last, and when they are to end.
    active: BTreeMap<usize, Instant>,
    /// Time spent on faults that take brokers down one after the other.
    in_turn: Duration,
    /// The broker that lost its disk last, and what it was registered as.
    wiped: Option<(String, u64)>,
}

impl<'a> Nemesis<'a> {
    pub fn new(fleet: &'a mut Fleet, workload: &'a mut Workload) -> Self {
        Self {
            fleet,
            workload,
            counts: BTreeMap::new(),
            active: BTreeMap::new(),
            in_turn: Duration::ZERO,
            wiped: None,
        }
    }

    /// Runs the schedule to its end; `tick` is called all the while.
    pub fn run(&mut self, steps: &[Step], length: Duration, mut tick: impl FnMut(&mut Self)) {
        let started = Instant::now();
        let mut next = 0;
        loop {
            // The schedule's clock stands still while brokers are taken down in turn.
            let now = started.elapsed().saturating_sub(self.in_turn);
            let over = self
                .active
                .iter()
                .filter(|(_, end)| **end <= Instant::now());
            for number in over.map(|(number, _)| *number).collect::<Vec<_>>() {
                self.end(number);
            }
            if let Some(step) = steps.get(next).filter(|step| step.begin <= now) {
                self.begin(next, step);
                next += 1;
                continue;
            }
            if now >= length && next >= steps.len() && self.active.is_empty() {
                return;
            }
            self.fleet.settle();
            tick(self);
            measure_over(TICK);
        }
    }

    /// Ends everything, starts everything but `left_down`, and waits until it is ready. What is not in
    /// time is told.
    pub fn heal(&mut self, left_down: Option<&str>) -> Vec<String> {
        for number in std::mem::take(&mut self.active).into_keys() {
            self.fleet.lift(number);
        }
        self.fleet.network().heal();
        let mut late = Vec::new();
        if left_down.is_some() && self.wiped.is_some() {
            // A broker that is being filled again is no part of any majority yet, and until it has registered
            // anew it passes for what it was.
            self.fleet.settle();
            let is_whole = || self.fleet.is_surely_whole(self.wiped.as_ref());
            late.extend(within(WHOLE_DEADLINE, is_whole).err());
        }
        if let Some(name) = left_down
            && late.is_empty()
        {
            self.workload.note(&format!("{name} stays down"));
            self.fleet.kill(usize::MAX, &[name.to_owned()]);
        }
        self.fleet.settle();
        for name in self.fleet.names("") {
            if Some(name.as_str()) != left_down
                && let Err(why) = self.fleet.wait_until_ready(&name, READY_DEADLINE)
            {
                late.push(format!("{why} after everything was healed"));
            }
        }
        late
    }

    fn begin(&mut self, number: usize, step: &Step) {
        let fault = &step.fault;
        let lasts = step.end.saturating_sub(step.begin);
        let what = format!("fault {number}: {fault:?} for {} ms", lasts.as_millis());
        match self.start(number, fault, lasts) {
            Ok(hit) => {
                *self.counts.entry(fault.kind()).or_default() += 1;
                self.workload.note(&format!("{what} begins: {hit}"));
            }
            Err(why) => {
                self.fleet.lift(number);
                self.workload.note(&format!("{what} does not begin: {why}"));
                return;
            }
        }
        // A fault that begins late, behind one that took its time, still lasts as long.
        self.active.insert(number, Instant::now() + lasts);
    }

    fn end(&mut self, number: usize) {
        self.active.remove(&number);
        self.fleet.lift(number);
        self.fleet.settle();
        self.workload.note(&format!("fault {number} ends"));
    }

    /// Begins a fault, and says whom it hit.
    fn start(&mut self, number: usize, fault: &Fault, lasts: Duration) -> Result<String, String> {
        match fault {
            Fault::Kill(target) => {
                let name = self.standing(target)?;
                self.fleet.kill(number, std::slice::from_ref(&name));
                Ok(name)
            }
            Fault::KillAll(role) => {
                let names = self.fleet.names(role);
                self.fleet.kill(number, &names);
                Ok(names.join(", "))
            }
            Fault::KillInTurn => Ok(self.take_turns(number, lasts, |fleet, name| {
                fleet.kill(number, &[name.to_owned()]);
            })),
            Fault::Roll => Ok(self.take_turns(number, lasts, |fleet, name| {
                // Another fault may have started it a moment ago: before a process has a handler,
                // SIGTERM just ends it. One that never gets ready is stopped all the same.
                let _ = fleet.wait_until_ready(name, TURN_DEADLINE);
                fleet.terminate(number, name);
                fleet.wait_for_end(name);
            })),
            Fault::Pause(target) => {
                let name = self.standing(target)?;
                self.fleet.pause(number, &name);
                Ok(name)
            }
            Fault::StallDisk(target) => {
                let name = self.standing(target)?;
                self.fleet.stall(number, &name)?;
                Ok(name)
            }
            Fault::Move { partition, shift } => self.move_replica(*partition, *shift),
            Fault::Wipe(target) => {
                let name = self.standing(target)?;
                self.fleet.is_surely_whole(self.wiped.as_ref())?;
                let epoch = self.fleet.epoch_of(&name)?;
                self.fleet.wipe(number, &name);
                self.wiped = Some((name.clone(), epoch));
                Ok(name)
            }
            network => {
                let (rules, hit) = self.rules(network)?;
                self.fleet.network().impose(number, rules);
                Ok(hit)
            }
        }
    }

    /// Takes each broker down and starts it again, one after the other.
    fn take_turns(
        &mut self,
        number: usize,
        pause: Duration,
        down: impl Fn(&mut Fleet, &str),
    ) -> String {
        let began = Instant::now();
        // In the middle of other faults an orderly stop, and a start, may take as long as they do.
        for active in std::mem::take(&mut self.active).into_keys() {
            self.end(active);
        }
        let names = self.fleet.names("broker");
        for name in &names {
            down(self.fleet, name);
            self.workload
                .note(&format!("fault {number}: {name} is down"));
            measure_over(pause);
            self.fleet.lift(number);
            self.fleet.settle();
            // Not in time: another fault holds it up, or `heal` will tell.
            let _ = self.fleet.wait_until_ready(name, TURN_DEADLINE);
        }
        self.in_turn += began.elapsed();
        names.join(", ")
    }

    /// Asks for a replica on another broker in the place of one of those that a partition has.
    fn move_replica(&self, partition: usize, shift: usize) -> Result<String, String> {
        let (topic, number) = place(partition)?;
        let rest = self.fleet.quick_rest();
        let mut replicas = rest.partition(topic, number)?.replicas;
        let brokers = i64::try_from(self.fleet.names("broker").len()).unwrap_or(i64::MAX);
        let others = (1..=brokers).filter(|id| !replicas.contains(id));
        let others: Vec<i64> = others.collect();
        if replicas.is_empty() || others.is_empty() {
            return Err(format!("no other broker: {replicas:?}"));
        }
        let leaves = shift % replicas.len();
        replicas[leaves] = others[shift / replicas.len() % others.len()];
        let body = json!({
            "partitions": [{"topic": topic, "partition": number, "replicas": replicas}]
        });
        match rest.ask(Method::POST, "/v1/reassignments", Some(&body)) {
            Some(answer) if answer.status < 300 => Ok(format!("{topic}-{number} to {replicas:?}")),
            Some(answer) => Err(format!("{} {}", answer.status, answer.body)),
            None => Err("no controller answers".to_owned()),
        }
    }

    fn rules(&self, fault: &Fault) -> Result<(Vec<Rule>, String), String> {
        let rule = |from: &str, to: &str, effect| Rule {
            from: from.to_owned(),
            to: to.to_owned(),
            effect,
        };
        let between = |one: &str, other: &str, direction, effect| match direction {
            Direction::Both => vec![rule(one, other, effect), rule(other, one, effect)],
            Direction::Out => vec![rule(one, other, effect)],
            Direction::In => vec![rule(other, one, effect)],
        };
        let around = |name: &str, from, direction, effect| -> Vec<Rule> {
            let others = match from {
                Scope::Everybody => vec!["*".to_owned()],
                Scope::Brokers => self.fleet.names("broker"),
                Scope::Controllers => self.fleet.names("controller"),
                Scope::Gateways => self.fleet.names("gateway"),
            };
            let others = others.iter();
            others
                .flat_map(|other| between(name, other, direction, effect))
                .collect()
        };
        Ok(match fault {
            Fault::Cut {
                target,
                from,
                direction,
            } => {
                let name = self.resolve(target)?;
                (around(&name, *from, *direction, Effect::Cut), name)
            }
            Fault::Reset { target, from } => {
                let name = self.resolve(target)?;
                (around(&name, *from, Direction::Both, Effect::Reset), name)
            }
            Fault::Slow(target, delay) => {
                let name = self.resolve(target)?;
                let effect = Effect::Delay(*delay);
                let rules = around(&name, Scope::Everybody, Direction::Both, effect);
                (rules, name)
            }
            Fault::CutPair {
                one,
                other,
                direction,
            } => (
                between(one, other, *direction, Effect::Cut),
                format!("{one} and {other}"),
            ),
            other => return Err(format!("{other:?} is no fault of the network")),
        })
    }

    /// Who is meant, if it is up.
    fn standing(&self, target: &Target) -> Result<String, String> {
        let name = self.resolve(target)?;
        if self.fleet.is_up(&name) {
            Ok(name)
        } else {
            Err(format!("{name} is down already"))
        }
    }

    fn resolve(&self, target: &Target) -> Result<String, String> {
        match target {
            Target::Named(name) => Ok(name.clone()),
            Target::LeaderOf(number) => {
                let (topic, number) = place(*number)?;
                let partition = self.fleet.quick_rest().partition(topic, number)?;
                let leader = partition.leader.ok_or("the partition has no leader")?;
                Ok(format!("broker-{leader}"))
            }
            Target::LeadingController => {
                let cluster = self.fleet.quick_rest().get("/v1/cluster")?;
                let leader = cluster["controller_leader"].as_u64();
                Ok(format!(
                    "controller-{}",
                    leader.ok_or("no controller leads")?
                ))
            }
        }
    }
}
