//! The network between the services of a checked cluster: every gRPC connection goes through a
//! relay in this process, which can cut, reset or delay each direction between two services.
//!
//! It needs no privileges and no kernel modules. Who connects is found out by the kernel's socket
//! table: the process that owns the other end. What it is not: below TCP. A cut shows to both ends as
//! silence, as with dropped packets, but a new connection is accepted and then silent; nothing is
//! lost or reordered inside a connection, which TCP would hide as well.
//!
//! Invariants: bytes of one direction of a connection arrive in order or not at all; what waits
//! behind a cut is bounded; a service that dies closes its connections at once, as the kernel would,
//! unless they are cut.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::wait::within;

/// Read at once, and chunks that may wait per direction of a connection.
const CHUNK_SIZE: usize = 64 * 1024;
const CHUNKS_MAX: usize = 32;
/// How long a connection's owner is looked for: the kernel's table is read in pieces, and while it changes a line may
/// be missed.
const OWNER_WITHIN: Duration = Duration::from_secs(1);

/// What happens to bytes from one service to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing arrives; what was sent arrives when the cut is over.
    Cut,
    /// Connections are closed, and new ones as soon as they are made.
    Reset,
    /// Everything arrives so much later.
    Delay(Duration),
}

/// One direction. `*` stands for every service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub from: String,
    pub to: String,
    pub effect: Effect,
}

impl Rule {
    fn is_about(&self, from: &str, to: &str) -> bool {
        let one = |pattern: &str, name: &str| pattern == "*" || pattern == name;
        one(&self.from, from) && one(&self.to, to)
    }
}

/// Rules in force, by the fault that made them.
type Rules = Arc<BTreeMap<usize, Vec<Rule>>>;

fn effects<'a>(rules: &'a Rules, from: &'a str, to: &'a str) -> impl Iterator<Item = Effect> + 'a {
    let all = rules.values().flatten();
    all.filter(move |rule| rule.is_about(from, to))
        .map(|rule| rule.effect)
}

fn is_cut(rules: &Rules, from: &str, to: &str) -> bool {
    effects(rules, from, to).any(|effect| effect == Effect::Cut)
}

fn is_reset(rules: &Rules, a: &str, b: &str) -> bool {
    effects(rules, a, b)
        .chain(effects(rules, b, a))
        .any(|effect| effect == Effect::Reset)
}

fn delay(rules: &Rules, from: &str, to: &str) -> Duration {
    effects(rules, from, to)
        .filter_map(|effect| match effect {
            Effect::Delay(delay) => Some(delay),
            Effect::Cut | Effect::Reset => None,
        })
        .sum()
}

/// Which process is which service.
pub type Owners = Arc<Mutex<BTreeMap<u32, String>>>;

/// The relays of a cluster. They end with it.
pub struct Network {
    runtime: tokio::runtime::Runtime,
    rules: watch::Sender<Rules>,
    owners: Owners,
}

impl Network {
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("relay")
            .enable_all()
            .build()
            .expect("a runtime without options starts");
        Self {
            runtime,
            rules: watch::Sender::new(Rules::default()),
            owners: Owners::default(),
        }
    }

    pub fn owners(&self) -> &Owners {
        &self.owners
    }

    /// Relays what comes in at `listener` to the service `name` at `target`.
    pub fn relay(&self, name: &str, listener: std::net::TcpListener, target: SocketAddr) {
        listener
            .set_nonblocking(true)
            .expect("a listener can be made non-blocking");
        let _inside = self.runtime.enter();
        let listener = TcpListener::from_std(listener).expect("a non-blocking listener");
        let relay = Relay {
            name: name.to_owned(),
            target,
            rules: self.rules.subscribe(),
            owners: self.owners.clone(),
        };
        self.runtime.spawn(relay.accept(listener));
    }

    /// Puts a fault's rules in force.
    pub fn impose(&self, fault: usize, rules: Vec<Rule>) {
        self.change(|all| {
            all.insert(fault, rules);
        });
    }

    /// Ends a fault's rules.
    pub fn lift(&self, fault: usize) {
        self.change(|all| {
            all.remove(&fault);
        });
    }

    pub fn heal(&self) {
        self.change(BTreeMap::clear);
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<usize, Vec<Rule>>)) {
        self.rules.send_modify(|rules| change(Arc::make_mut(rules)));
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Clone)]
struct Relay {
    name: String,
    target: SocketAddr,
    rules: watch::Receiver<Rules>,
    owners: Owners,
}

impl Relay {
    async fn accept(self, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((client, address)) => {
                    tokio::spawn(self.clone().connection(client, address));
                }
                // Out of file descriptors, say: others may free some.
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }

    async fn connection(mut self, client: TcpStream, address: SocketAddr) {
        // Most connections are to who is down; nobody needs to know whose they are.
        let Ok(server) = TcpStream::connect(self.target).await else {
            return abort(&client);
        };
        let Ok(here) = client.local_addr() else {
            return abort(&client);
        };
        let Some(source) = self.source(address, here).await else {
            eprintln!("relay to {}: nobody is known who connects", self.name);
            return abort(&client);
        };
        let reset = |rules: &Rules| is_reset(rules, &source, &self.name);
        if reset(&self.rules.borrow()) {
            return abort(&client);
        }
        // Nagle's algorithm would add delays that nobody asked for.
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        // Both ends see a close at once when this returns, as when a process dies.
        abort(&client);
        abort(&server);
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        let there = self.direction(&source, &self.name);
        let back = self.direction(&self.name, &source);
        tokio::select! {
            () = there.run(client_read, server_write) => {}
            () = back.run(server_read, client_write) => {}
            _ = self.rules.wait_for(reset) => {}
        }
    }

    /// Who connects from an address. A connection of nobody we know could not be cut from anybody:
    /// there is none, but that of a process that has just died.
    async fn source(&self, there: SocketAddr, here: SocketAddr) -> Option<String> {
        let owners = self.owners.clone();
        let find = move || owner_of(socket_inode(there, here)?, &owners);
        let search = move || within(OWNER_WITHIN, || find().ok_or(()));
        let found = tokio::task::spawn_blocking(search).await;
        found.ok()?.ok()
    }

    fn direction(&self, from: &str, to: &str) -> Direction {
        Direction {
            from: from.to_owned(),
            to: to.to_owned(),
            rules: self.rules.clone(),
        }
    }
}

/// Makes the close of a connection a reset.
fn abort(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

/// One direction of a connection.
struct Direction {
    from: String,
    to: String,
    rules: watch::Receiver<Rules>,
}

impl Direction {
    /// Ends when the end of the stream, or an error, has arrived.
    async fn run(self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let (sender, mut chunks) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS_MAX);
        let read = async {
            let mut buffer = vec![0; CHUNK_SIZE];
            loop {
                // An empty chunk is the end; it waits its turn like the others.
                let count = from.read(&mut buffer).await.unwrap_or(0);
                let due = Instant::now() + delay(&self.rules.borrow(), &self.from, &self.to);
                let sent = sender.send((due, buffer[..count].to_vec())).await;
                if count == 0 || sent.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        let mut rules = self.rules.clone();
        let write = async {
            while let Some((due, chunk)) = chunks.recv().await {
                tokio::time::sleep_until(due).await;
                let open = |rules: &Rules| !is_cut(rules, &self.from, &self.to);
                if rules.wait_for(open).await.is_err() || chunk.is_empty() {
                    return;
                }
                if to.write_all(&chunk).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = read => {}
            () = write => {}
        }
    }
}

/// The service whose process has the socket.
fn owner_of(inode: u64, owners: &Owners) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    let candidates = owners
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let has_it = |pid: &u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd"));
        files.into_iter().flatten().flatten().any(|file| {
            std::fs::read_link(file.path()).is_ok_and(|link| link.as_os_str() == wanted.as_str())
        })
    };
    let (_, name) = candidates.into_iter().find(|(pid, _)| has_it(pid))?;
    Some(name)
}

/// The inode of the socket from `there` to `here`, by the kernel's table. The same local address may have
/// other connections, and closed ones, which are nobody's.
fn socket_inode(there: SocketAddr, here: SocketAddr) -> Option<u64> {
    let (there, here) = (in_table(there)?, in_table(here)?);
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let found = fields.next() == Some(&there) && fields.next() == Some(&here);
        let inode: u64 = found.then(|| fields.nth(6)?.parse().ok()).flatten()?;
        (inode != 0).then_some(inode)
    })
}

/// An address as the kernel's table has it.
fn in_table(address: SocketAddr) -> Option<String> {
    let SocketAddr::V4(address) = address else {
        return None;
    };
    let ip = u32::from_le_bytes(address.ip().octets());
    Some(format!("{ip:08X}:{:04X}", address.port()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    /// A relay named "server" to an echo server, and a connection of this process, "client".
    fn echo() -> (Network, std::net::TcpStream) {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in server.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut reader = stream.try_clone().unwrap();
                    let _ = std::io::copy(&mut reader, &mut &stream);
                });
            }
        });
        let network = Network::new();
        let entry = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = entry.local_addr().unwrap();
        let own = (std::process::id(), "client".to_owned());
        network.owners().lock().unwrap().extend([own]);
        network.relay("server", entry, target);
        let stream = std::net::TcpStream::connect(address).unwrap();
        (network, stream)
    }

    fn rule(from: &str, to: &str, effect: Effect) -> Vec<Rule> {
        vec![Rule {
            from: from.to_owned(),
            to: to.to_owned(),
            effect,
        }]
    }

    /// Whether what is said comes back within a time.
    fn answers(stream: &mut std::net::TcpStream, within: Duration) -> bool {
        stream.set_read_timeout(Some(within)).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).is_ok()
    }

    const LONG: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(200);

    #[test]
    fn a_cut_of_either_direction_holds_bytes_back_until_it_is_lifted() {
        for (from, to) in [("client", "server"), ("server", "client"), ("*", "server")] {
            let (network, mut stream) = echo();
            assert!(answers(&mut stream, LONG));
            network.impose(1, rule(from, to, Effect::Cut));
            assert!(!answers(&mut stream, SHORT), "{from} to {to}");
            network.lift(1);
            stream.set_read_timeout(Some(LONG)).unwrap();
            stream.read_exact(&mut [0]).unwrap();
            assert!(answers(&mut stream, LONG));
        }
    }

    #[test]
    fn a_port_that_has_closed_connections_is_known_all_the_same() {
        let (_network, stream) = echo();
        let address = stream.peer_addr().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
        let connect = |to: SocketAddr| {
            let connecting = async {
                let socket = tokio::net::TcpSocket::new_v4().unwrap();
                socket.set_reuseaddr(true).unwrap();
                socket.bind(*port.as_ref().unwrap()).unwrap();
                socket.connect(to).await.unwrap().into_std().unwrap()
            };
            let stream = runtime.block_on(connecting);
            stream.set_nonblocking(false).unwrap();
            stream
        };
        // Who closes first leaves a line in the kernel's table for a minute.
        for _ in 0..8 {
            let other = TcpListener::bind("127.0.0.1:0").unwrap();
            let closed = connect(other.local_addr().unwrap());
            let (mut accepted, _) = other.accept().unwrap();
            drop(closed);
            assert_eq!(accepted.read(&mut [0]).unwrap(), 0);
        }
        assert!(answers(&mut connect(address), LONG));
    }

    #[test]
    fn a_rule_about_others_changes_nothing() {
        let (network, mut stream) = echo();
        network.impose(1, rule("client", "another", Effect::Cut));
        network.impose(2, rule("another", "server", Effect::Reset));
        assert!(answers(&mut stream, LONG));
    }

    #[test]
    fn a_reset_closes_and_refuses_connections() {
        let (network, mut stream) = echo();
        assert!(answers(&mut stream, LONG));
        let address = stream.peer_addr().unwrap();
        network.impose(1, rule("server", "client", Effect::Reset));
        stream.set_read_timeout(Some(LONG)).unwrap();
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
        let mut again = std::net::TcpStream::connect(address).unwrap();
        again.set_read_timeout(Some(LONG)).unwrap();
        assert!(!matches!(again.read(&mut [0]), Ok(1..)));
        network.heal();
        assert!(answers(
            &mut std::net::TcpStream::connect(address).unwrap(),
            LONG
        ));
    }

    #[test]
    fn a_delay_delays() {
        let (network, mut stream) = echo();
        assert!(answers(&mut stream, LONG));
        network.impose(1, rule("client", "server", Effect::Delay(SHORT)));
        let began = std::time::Instant::now();
        assert!(answers(&mut stream, LONG));
        assert!(began.elapsed() >= SHORT);
    }
}
