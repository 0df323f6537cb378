//! Raft's transport between brokers: one stream per ordered pair of brokers carries the messages of
//! all the partitions that they share.
//!
//! Invariant: the number of connections and timers grows with the number of peers, never with the
//! number of partitions. A slow or dead peer holds up nothing but what is meant for it.

pub mod campaign;
mod codec;
mod connector;
mod dial;
mod endpoint;
mod heard;
mod link;
pub mod membership;
mod network;
mod queue;
mod server;
pub mod stand;
mod state;

#[cfg(test)]
mod transport_test;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chronik_proto::MESSAGE_SIZE_MAX;
use chronik_proto::v1::peers_server::PeersServer;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::replica::raft_config::Vote;
use crate::replica::{OpenError, Replica, ReplicaOptions};
use crate::throttle::{Throttle, Ticket};

pub use codec::Route;
pub use connector::{ConnectError, Connector, Frames, GrpcConnector};
pub use dial::LinkTiming;
pub use endpoint::{RaftEndpoint, RaftGroups, Stopped};
pub use heard::{Heard, HeardLeader};
pub use link::{Link, LinkError};
pub use network::{GroupNetwork, ReplicaClient};
pub use queue::FrameStream;
pub use server::PeersService;
pub use state::{LinkState, LinkStatus, LinkTable};

/// A candidate with a shorter log tried to take over a group: the replica here is to go ahead of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nudge {
    pub group: RaftGroupId,
    /// The last that the candidate has taken, as far as its request tells.
    pub term: u64,
}

/// Nudges that wait, at most.
const NUDGES_MAX: usize = 65_536;

/// A replica of this broker that does not have the log where its leader's begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behind {
    pub group: RaftGroupId,
    pub leader: ReplicaId,
    /// The leader's.
    pub vote: Vote,
}
/// Brokers that are told apart.
const PEERS_MAX: usize = 10_000;

/// What the transport is made of.
pub struct PeersOptions {
    pub broker_id: BrokerId,
    /// This process.
    pub incarnation: Uuid,
    pub timing: LinkTiming,
    pub groups: Arc<dyn RaftGroups>,
    /// Hears of replicas here that need a copy of their leader's log.
    pub behind: mpsc::Sender<Behind>,
    /// From giving entries to the link to a follower to its answer that they are on its disk.
    pub replication_seconds: Histogram,
    /// What is sent by Raft to replicas that do not vote yet.
    pub fill_throttle: Throttle,
    /// Whether the disk of this broker does not take its log (`disk_watch`).
    pub is_disk_stuck: watch::Receiver<bool>,
    pub stop: CancellationToken,
}

struct Inner {
    options: PeersOptions,
    connector: Arc<dyn Connector>,
    links: Mutex<HashMap<BrokerId, PeerLink>>,
    table: watch::Sender<LinkTable>,
    heard: Heard,
    /// Followers that are being spoken to because they missed a leader.
    greeting: Mutex<HashSet<Route>>,
    nudges: mpsc::Sender<Nudge>,
    tasks: TaskTracker,
    /// When the links began to ping.
    beat: Instant,
}

struct PeerLink {
    link: Arc<Link>,
    /// Where the peer is being dialled, while it is wanted.
    dialling: Option<(String, CancellationToken)>,
}

/// Cheap to clone; all clones are the same transport.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

impl Peers {
    /// The transport, and whom it nudges.
    pub fn new(options: PeersOptions) -> (Peers, mpsc::Receiver<Nudge>) {
        Peers::with_connector(options, Arc::new(GrpcConnector))
    }

    /// As `new`, over connections of another kind. `accept` is their other end.
    pub fn with_connector(
        options: PeersOptions,
        connector: Arc<dyn Connector>,
    ) -> (Peers, mpsc::Receiver<Nudge>) {
        let (nudges, nudged) = mpsc::channel(NUDGES_MAX);
        let inner = Inner {
            options,
            connector,
            links: Mutex::default(),
            table: watch::Sender::new(LinkTable::default()),
            heard: Heard::default(),
            greeting: Mutex::default(),
            nudges,
            tasks: TaskTracker::new(),
            beat: Instant::now(),
        };
        (
            Peers {
                inner: Arc::new(inner),
            },
            nudged,
        )
    }

    /// The gRPC service for other brokers.
    pub fn service(&self) -> PeersServer<PeersService> {
        PeersServer::new(PeersService {
            peers: self.clone(),
        })
        .max_decoding_message_size(MESSAGE_SIZE_MAX)
        .max_encoding_message_size(MESSAGE_SIZE_MAX)
    }

    /// Serves a connection that a peer has made, until it ends: `inbound` is what the peer sends,
    /// the result is what goes back to it.
    pub fn accept(&self, inbound: Frames) -> FrameStream {
        server::accept(self, inbound)
    }

    /// The network of one replica that runs here.
    pub fn network(&self, group: RaftGroupId, replica: ReplicaId) -> GroupNetwork {
        GroupNetwork::new(self.clone(), group, replica)
    }

    /// A replica of this network, at rest. Not generic, so that Raft over it is compiled with this crate,
    /// and not once more with each program that opens replicas.
    pub fn open_replica(options: ReplicaOptions<GroupNetwork>) -> Result<Arc<Replica>, OpenError> {
        Replica::open_at_rest(options)
    }

    /// Connects to exactly these peers, at these addresses; safe to call with the same again.
    pub fn set_addresses(&self, wanted: &BTreeMap<BrokerId, String>) {
        let mut links = self.lock();
        for (broker, peer) in links.iter_mut() {
            if let Some((address, stop)) = &peer.dialling
                && wanted.get(broker) != Some(address)
            {
                stop.cancel();
                peer.dialling = None;
            }
        }
        for (broker, address) in wanted {
            if *broker == self.broker_id() {
                continue;
            }
            let table = &self.inner.table;
            let peer = links
                .entry(*broker)
                .or_insert_with(|| PeerLink::new(*broker, table));
            if peer.dialling.is_none() {
                let stop = self.stop_token().child_token();
                peer.dialling = Some((address.clone(), stop.clone()));
                let ends = dial::Ends {
                    from: self.broker_id(),
                    incarnation: self.incarnation(),
                    beat: self.inner.beat,
                    to: *broker,
                };
                let timing = self.inner.options.timing;
                let (link, connector) = (peer.link.clone(), self.inner.connector.clone());
                let address = address.clone();
                let is_stuck = self.inner.options.is_disk_stuck.clone();
                let dial = dial::dial(link, connector, address, ends, timing, is_stuck, stop);
                self.inner.tasks.spawn(dial);
            }
        }
    }

    /// States of all links, whole on every change.
    pub fn links(&self) -> watch::Receiver<LinkTable> {
        self.inner.table.subscribe()
    }

    /// Leaders that have spoken to this process.
    pub fn heard(&self) -> &Heard {
        &self.inner.heard
    }

    /// How long nothing more is to go to a replica by Raft, at least; None: it may. One that does not vote yet
    /// waits until what it got last is paid for.
    fn fill_wait(&self, route: Route, last: Ticket) -> Option<Duration> {
        let wait = self.inner.options.fill_throttle.wait(last)?;
        (!self.is_voter(route)).then_some(wait)
    }

    /// Takes account of records that were sent to a replica by Raft.
    fn charge_fill(&self, route: Route, bytes: usize) -> Ticket {
        let throttle = &self.inner.options.fill_throttle;
        match throttle.rate().is_some() && !self.is_voter(route) {
            true => throttle.charge(bytes),
            false => Ticket::default(),
        }
    }

    /// Also where the replica here, which says so, is gone.
    fn is_voter(&self, route: Route) -> bool {
        let endpoint = self.groups().endpoint(route.group);
        endpoint.is_none_or(|endpoint| endpoint.is_voter(route.to))
    }

    /// Waits for all tasks of the transport, which end when its token is cancelled.
    pub async fn stopped(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// The link to a peer; made if it is new, dialled only once it is wanted.
    fn link(&self, broker: BrokerId) -> Arc<Link> {
        let table = &self.inner.table;
        let mut links = self.lock();
        links
            .entry(broker)
            .or_insert_with(|| PeerLink::new(broker, table))
            .link
            .clone()
    }

    /// The link to a peer that connects; None: there are too many to be true.
    fn known_link(&self, broker: BrokerId) -> Option<Arc<Link>> {
        let links = self.lock();
        let fits = links.contains_key(&broker) || links.len() < PEERS_MAX;
        drop(links);
        fits.then(|| self.link(broker))
    }

    /// Whether this broker has tried to reach that one for a while, and gets no answer.
    fn does_not_reach(&self, broker: BrokerId) -> bool {
        let link = self.lock().get(&broker).map(|peer| peer.link.clone());
        let limit = self.inner.options.timing.silence.saturating_mul(2);
        link.is_some_and(|link| link.unanswered_for() > limit)
    }

    /// Whether that broker's messages are of no use here: this one cannot answer them, or cannot write what
    /// they say.
    fn is_deaf_to(&self, broker: BrokerId) -> bool {
        self.does_not_reach(broker) || *self.inner.options.is_disk_stuck.borrow()
    }

    /// Whether this broker knows a living leader of the group, other than the candidate's broker.
    fn leader_is_alive(&self, route: Route, endpoint: &dyn RaftEndpoint) -> bool {
        if endpoint.is_leader() {
            return true;
        }
        let vote = endpoint.current_vote();
        let leader = vote.leader_id.voted_for;
        if !vote.committed || leader.broker_id == route.from.broker_id {
            return false;
        }
        let Some(heard) = self.inner.heard.leader(route.group) else {
            return false;
        };
        let status = self.inner.table.borrow().status(leader.broker_id);
        heard.term == vote.leader_id.term
            && heard.broker == leader.broker_id
            && status.speaks_as() == Some(heard.incarnation)
    }

    /// The leader speaks to a follower that misses it; once at a time, however often that asks.
    fn greet(&self, route: Route, leader: Arc<dyn RaftEndpoint>) {
        let peers = self.clone();
        if !self.greeting().insert(route) {
            return;
        }
        self.tasks().spawn(async move {
            leader.greet(peers.clone(), route.from).await;
            peers.greeting().remove(&route);
        });
    }

    fn greeting(&self) -> MutexGuard<'_, HashSet<Route>> {
        let greeting = self.inner.greeting.lock();
        greeting.unwrap_or_else(PoisonError::into_inner)
    }

    /// A full queue means that the driver has as much to do already; its own retries follow.
    fn nudge(&self, nudge: Nudge) {
        let _ = self.inner.nudges.try_send(nudge);
    }

    /// A full queue means that there is enough to fetch already; leaders ask again.
    fn behind(&self, behind: Behind) {
        let _ = self.inner.options.behind.try_send(behind);
    }

    fn replication_seconds(&self) -> &Histogram {
        &self.inner.options.replication_seconds
    }

    fn groups(&self) -> &dyn RaftGroups {
        &*self.inner.options.groups
    }

    fn broker_id(&self) -> BrokerId {
        self.inner.options.broker_id
    }

    fn incarnation(&self) -> Uuid {
        self.inner.options.incarnation
    }

    fn silence(&self) -> Duration {
        self.inner.options.timing.silence
    }

    fn stop_token(&self) -> &CancellationToken {
        &self.inner.options.stop
    }

    fn tasks(&self) -> &TaskTracker {
        &self.inner.tasks
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<BrokerId, PeerLink>> {
        self.inner
            .links
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl PeerLink {
    fn new(broker: BrokerId, table: &watch::Sender<LinkTable>) -> Self {
        Self {
            link: Link::new(broker, table.clone()),
            dialling: None,
        }
    }
}
