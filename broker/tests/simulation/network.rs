//! The network between simulated brokers: connections whose frames take time, stop at a cut, and
//! come in order or not at all.
//!
//! Invariant: as TCP does, a connection delivers a prefix of what was sent, in order. A reset or an
//! end is seen by a process only if its machine got the packet.

mod ends;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;

use chronik_broker::peers::{ConnectError, Connector};
use chronik_proto::v1::PeerFrame;
use chronik_types::id::BrokerId;
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub use ends::End;
use ends::{Caller, HangUp, Port};

/// Bytes under way in one direction before the sender has to wait.
const WINDOW_BYTES: usize = 1 << 20;
/// Until a lost packet is sent again.
const RETRANSMIT_MAX_MS: u64 = 1_000;
const SYN_RETRY_MS: u64 = 1_000;

type Received = Result<PeerFrame, Status>;

/// Clones are the same network.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Inner>>);

struct Inner {
    now_ms: u64,
    random: StdRng,
    latency_max_ms: u64,
    machines: BTreeMap<BrokerId, Machine>,
    /// One way.
    cuts: BTreeSet<(BrokerId, BrokerId)>,
    /// Added to each packet's way, per direction.
    slow: BTreeMap<(BrokerId, BrokerId), u64>,
    calls: Vec<Call>,
    connections: BTreeMap<u64, Connection>,
    connection_count: u64,
}

#[derive(Default)]
struct Machine {
    is_on: bool,
    /// The process gets no turn; its machine goes on.
    is_frozen: bool,
    /// Where the process takes connections; none: they are refused.
    listener: Option<mpsc::UnboundedSender<End>>,
}

struct Call {
    from: BrokerId,
    to: BrokerId,
    at_ms: u64,
    reply: oneshot::Sender<Result<End, ConnectError>>,
}

/// Sides: 0 called, 1 was called.
struct Connection {
    sides: [Side; 2],
}

struct Side {
    broker: BrokerId,
    /// None: the process has let go of it.
    inbound: Option<mpsc::UnboundedSender<Received>>,
    /// The process's own end is of no use any more.
    broken: CancellationToken,
    /// On its way to this side.
    travelling: VecDeque<(u64, Packet)>,
    travelling_bytes: usize,
    is_held_up: bool,
    /// The other side's writer, which waits for room.
    writer: Option<Waker>,
    /// Its machine lost its power, and so forgot the connection without a word.
    is_forgotten: bool,
}

enum Packet {
    Frame(Vec<u8>),
    Reset,
}

impl Network {
    pub fn new(seed: u64, brokers: impl Iterator<Item = BrokerId>, latency_max_ms: u64) -> Network {
        let machine = |broker| {
            let machine = Machine {
                is_on: true,
                ..Machine::default()
            };
            (broker, machine)
        };
        Network(Arc::new(Mutex::new(Inner {
            now_ms: 0,
            random: StdRng::seed_from_u64(seed),
            latency_max_ms,
            machines: brokers.map(machine).collect(),
            cuts: BTreeSet::new(),
            slow: BTreeMap::new(),
            calls: Vec::new(),
            connections: BTreeMap::new(),
            connection_count: 0,
        })))
    }

    /// What `from` uses to call others; an address is a broker's number.
    pub fn connector(&self, from: BrokerId) -> Arc<dyn Connector> {
        Arc::new(Caller {
            network: self.clone(),
            from,
        })
    }

    /// From now on the broker's process takes connections.
    pub fn listen(&self, broker: BrokerId) -> mpsc::UnboundedReceiver<End> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.lock().machine(broker).listener = Some(sender);
        receiver
    }

    /// The broker's process ends; its machine refuses connections. Those it had are reset when the
    /// process's ends are dropped.
    pub fn process_ends(&self, broker: BrokerId) {
        self.lock().machine(broker).listener = None;
    }

    pub fn power_fails(&self, broker: BrokerId) {
        let mut inner = self.lock();
        let machine = inner.machine(broker);
        machine.is_on = false;
        machine.listener = None;
        for side in inner.sides_of(broker) {
            side.is_forgotten = true;
            side.travelling.clear();
        }
    }

    /// A machine that is on again answers packets of connections that it does not know by a reset.
    pub fn power_returns(&self, broker: BrokerId) {
        let mut inner = self.lock();
        inner.machine(broker).is_on = true;
        let ids: Vec<u64> = inner.connections.keys().copied().collect();
        for id in ids {
            for side in 0..2 {
                let is_forgotten = inner.connections.get(&id).is_some_and(|connection| {
                    connection.sides[side].broker == broker && connection.sides[side].is_forgotten
                });
                if is_forgotten {
                    inner.send(id, 1 - side, Packet::Reset);
                }
            }
        }
    }

    pub fn set_frozen(&self, broker: BrokerId, is_frozen: bool) {
        self.lock().machine(broker).is_frozen = is_frozen;
    }

    pub fn cut(&self, from: BrokerId, to: BrokerId) {
        self.lock().cuts.insert((from, to));
    }

    pub fn heal(&self, from: BrokerId, to: BrokerId) {
        self.lock().cuts.remove(&(from, to));
    }

    pub fn set_slow(&self, from: BrokerId, to: BrokerId, extra_ms: u64) {
        self.lock().slow.insert((from, to), extra_ms);
    }

    pub fn heal_all(&self) {
        let mut inner = self.lock();
        inner.cuts.clear();
        inner.slow.clear();
    }

    /// Resets every connection between two brokers; what is under way is lost.
    pub fn reset(&self, one: BrokerId, other: BrokerId) {
        let mut inner = self.lock();
        let between = |connection: &Connection| {
            let [a, b] = &connection.sides;
            (a.broker, b.broker) == (one, other) || (b.broker, a.broker) == (one, other)
        };
        let ids: Vec<u64> = inner
            .connections
            .iter()
            .filter(|(_, connection)| between(connection))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            for side in 0..2 {
                if let Some(connection) = inner.connections.get_mut(&id) {
                    connection.sides[side].travelling.clear();
                    connection.sides[side].travelling_bytes = 0;
                }
                inner.send(id, side, Packet::Reset);
            }
        }
    }

    /// Delivers all that is due.
    pub fn step(&self, now_ms: u64) {
        let mut inner = self.lock();
        inner.now_ms = now_ms;
        let mut unused = Vec::new();
        inner.answer_calls(self, &mut unused);
        let ids: Vec<u64> = inner.connections.keys().copied().collect();
        let mut wakers = Vec::new();
        for id in ids {
            for side in 0..2 {
                inner.deliver(id, side, &mut wakers);
            }
        }
        inner
            .connections
            .retain(|_, connection| connection.sides.iter().any(|side| side.inbound.is_some()));
        drop(inner);
        drop(unused);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }
}

impl Inner {
    fn machine(&mut self, broker: BrokerId) -> &mut Machine {
        self.machines.get_mut(&broker).unwrap()
    }

    fn sides_of(&mut self, broker: BrokerId) -> impl Iterator<Item = &mut Side> {
        let sides = self.connections.values_mut().flat_map(|c| &mut c.sides);
        sides.filter(move |side| side.broker == broker)
    }

    fn is_cut(&self, from: BrokerId, to: BrokerId) -> bool {
        self.cuts.contains(&(from, to))
    }

    fn latency_ms(&mut self, from: BrokerId, to: BrokerId) -> u64 {
        let slow = self.slow.get(&(from, to)).copied().unwrap_or(0);
        1 + slow + self.random.random_range(0..=self.latency_max_ms)
    }

    /// `unused` gets the ends that nobody took: they hang up when they are dropped, which takes the
    /// lock.
    fn answer_calls(&mut self, network: &Network, unused: &mut Vec<End>) {
        for mut call in std::mem::take(&mut self.calls) {
            let (from, to) = (call.from, call.to);
            if call.reply.is_closed() {
                continue;
            }
            if call.at_ms > self.now_ms {
                self.calls.push(call);
                continue;
            }
            let is_lost = self.is_cut(from, to) || self.is_cut(to, from);
            let machine = self.machine(to);
            if is_lost || !machine.is_on || machine.is_frozen {
                call.at_ms += SYN_RETRY_MS;
                self.calls.push(call);
                continue;
            }
            let Some(listener) = machine.listener.clone() else {
                call.reply.send(Err(ConnectError::Refused)).ok();
                continue;
            };
            let [caller, called] = self.connect(network, from, to);
            let outcome = match listener.send(called) {
                Ok(()) => Ok(caller),
                Err(unsent) => {
                    unused.extend([unsent.0, caller]);
                    Err(ConnectError::Refused)
                }
            };
            if let Err(Ok(end)) = call.reply.send(outcome) {
                unused.push(end);
            }
        }
    }

    fn connect(&mut self, network: &Network, from: BrokerId, to: BrokerId) -> [End; 2] {
        self.connection_count += 1;
        let id = self.connection_count;
        let mut ends = Vec::new();
        let sides = [from, to].map(|broker| {
            let (sender, inbound) = mpsc::unbounded_channel();
            let broken = CancellationToken::new();
            let port = Port {
                network: network.clone(),
                connection: id,
                side: ends.len(),
                broken: broken.clone(),
            };
            ends.push(End {
                hang_up: HangUp(port.clone()),
                port,
                inbound,
            });
            Side {
                broker,
                inbound: Some(sender),
                broken,
                travelling: VecDeque::new(),
                travelling_bytes: 0,
                is_held_up: false,
                writer: None,
                is_forgotten: false,
            }
        });
        self.connections.insert(id, Connection { sides });
        let called = ends.pop().unwrap();
        [ends.pop().unwrap(), called]
    }

    /// Puts a packet on its way to `side`.
    fn send(&mut self, id: u64, side: usize, packet: Packet) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let (from, to) = (
            connection.sides[1 - side].broker,
            connection.sides[side].broker,
        );
        let at_ms = self.now_ms + self.latency_ms(from, to);
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let side = &mut connection.sides[side];
        // Nothing overtakes what was sent before it.
        let at_ms = side
            .travelling
            .back()
            .map_or(at_ms, |last| last.0.max(at_ms));
        if let Packet::Frame(bytes) = &packet {
            side.travelling_bytes += bytes.len();
        }
        side.travelling.push_back((at_ms, packet));
    }

    fn deliver(&mut self, id: u64, side: usize, wakers: &mut Vec<Waker>) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let (from, to) = (
            connection.sides[1 - side].broker,
            connection.sides[side].broker,
        );
        let is_cut = self.is_cut(from, to);
        let machine = &self.machines[&to];
        let (is_on, is_frozen, now) = (machine.is_on, machine.is_frozen, self.now_ms);
        let retransmit = self.random.random_range(1..=RETRANSMIT_MAX_MS);
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let side = &mut connection.sides[side];
        if is_cut {
            side.is_held_up |= !side.travelling.is_empty();
            return;
        }
        if std::mem::take(&mut side.is_held_up)
            && let Some(first) = side.travelling.front_mut()
        {
            first.0 = first.0.max(now + retransmit);
        }
        if !is_on || side.is_forgotten {
            side.travelling.clear();
            return;
        }
        while !is_frozen
            && side.travelling.front().is_some_and(|first| first.0 <= now)
            && let Some((_, packet)) = side.travelling.pop_front()
        {
            match packet {
                Packet::Frame(bytes) => {
                    side.travelling_bytes = side.travelling_bytes.saturating_sub(bytes.len());
                    wakers.extend(side.writer.take());
                    let frame = PeerFrame::decode(&bytes[..]).unwrap();
                    if let Some(inbound) = &side.inbound {
                        inbound.send(Ok(frame)).ok();
                    }
                }
                Packet::Reset => {
                    if let Some(inbound) = side.inbound.take() {
                        inbound.send(Err(Status::unavailable("reset"))).ok();
                    }
                    side.broken.cancel();
                    side.travelling.clear();
                }
            }
        }
    }
}
