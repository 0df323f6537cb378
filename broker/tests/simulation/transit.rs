//! The way between clients and brokers: requests of one client reach a broker in order; answers come
//! back, or not at all if the process ends before.

use std::collections::BTreeMap;

use chronik_types::id::BrokerId;
use rand::Rng;
use rand::rngs::StdRng;

use crate::host::Host;
use crate::requests::{Answer, Ask, Request, Response};
use chronik_types::id::RaftGroupId;

/// What travels, by the time at which it arrives and the order in which it was sent.
pub struct Transit {
    latency_max_ms: u64,
    count: u64,
    now_ms: u64,
    requests: BTreeMap<(u64, u64), (BrokerId, Request)>,
    responses: BTreeMap<(u64, u64), Response>,
    /// When the last request of a client arrives at a broker.
    last: BTreeMap<(usize, BrokerId), u64>,
}

impl Transit {
    pub fn new(latency_max_ms: u64) -> Transit {
        Transit {
            latency_max_ms,
            count: 0,
            now_ms: 0,
            requests: BTreeMap::new(),
            responses: BTreeMap::new(),
            last: BTreeMap::new(),
        }
    }

    /// Sends a request; its number.
    pub fn send(
        &mut self,
        client: usize,
        broker: BrokerId,
        group: RaftGroupId,
        ask: Ask,
        random: &mut StdRng,
    ) -> u64 {
        self.count += 1;
        let id = self.count;
        let last = self.last.entry((client, broker)).or_insert(0);
        let at_ms = (self.now_ms + random.random_range(0..=self.latency_max_ms)).max(*last);
        *last = at_ms;
        let request = Request { id, group, ask };
        self.requests.insert((at_ms, id), (broker, request));
        id
    }

    /// Delivers requests that are due, and takes the answers that brokers have given.
    pub fn step(&mut self, now_ms: u64, hosts: &mut BTreeMap<BrokerId, Host>, random: &mut StdRng) {
        self.now_ms = now_ms;
        while let Some(entry) = self.requests.first_entry()
            && entry.key().0 <= now_ms
        {
            let (broker, request) = entry.remove();
            // Where no process listens it is lost; to a frozen one it comes late.
            if let Some(running) = hosts.get(&broker).and_then(|host| host.running.as_ref()) {
                running.requests.send(request).ok();
            }
        }
        for host in hosts.values_mut() {
            let Some(running) = &host.running else {
                continue;
            };
            let responses = std::mem::take(&mut *running.responses.lock().unwrap());
            for response in responses {
                self.count += 1;
                let at_ms = now_ms + random.random_range(0..=self.latency_max_ms);
                self.responses.insert((at_ms, self.count), response);
            }
        }
    }

    /// The answers that arrive now.
    pub fn arrived(&mut self) -> Vec<(u64, Answer)> {
        let mut arrived = Vec::new();
        while let Some(entry) = self.responses.first_entry()
            && entry.key().0 <= self.now_ms
        {
            let response = entry.remove();
            arrived.push((response.id, response.answer));
        }
        arrived
    }
}
