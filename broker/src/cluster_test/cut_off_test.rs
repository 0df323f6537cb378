//! Three real brokers whose ways to each other are cut, in one direction or both: whoever leads goes on
//! only as long as a majority can answer it, and whoever comes back disturbs nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use chronik_proto::v1;
use chronik_proto::v1::peers_client::PeersClient;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, Stream, StreamExt, unfold};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tonic::Status;

use super::{BROKERS, Cluster, LIMIT, all_in_sync};
use crate::fake_controller::{FakeController, Serving};
use crate::peers::{ConnectError, Connector, FrameStream, Frames, LinkTiming};

/// From one broker to another.
type Way = (i32, i32);

/// Which ways are cut; bytes on a cut way wait, as they do while a network loses them.
#[derive(Clone)]
pub struct Ways {
    cut: Arc<watch::Sender<BTreeSet<Way>>>,
    brokers: Arc<Mutex<BTreeMap<SocketAddr, i32>>>,
}

impl Default for Ways {
    fn default() -> Self {
        Ways {
            cut: Arc::new(watch::Sender::new(BTreeSet::new())),
            brokers: Arc::default(),
        }
    }
}

impl Ways {
    pub fn add(&self, broker: i32, address: SocketAddr) {
        self.brokers.lock().unwrap().insert(address, broker);
    }

    pub fn connector(&self, from: i32) -> Arc<dyn Connector> {
        Arc::new(CuttableConnector {
            ways: self.clone(),
            from,
        })
    }

    fn cut(&self, ways: &[Way]) {
        self.cut.send_modify(|cut| cut.extend(ways));
    }

    fn heal(&self) {
        self.cut.send_modify(BTreeSet::clear);
    }

    /// `stream` as it arrives over the way.
    fn gate<T: Send + 'static>(
        &self,
        stream: BoxStream<'static, T>,
        way: Way,
    ) -> BoxStream<'static, T> {
        let state = (stream, self.cut.subscribe());
        let gated = unfold(state, move |(mut stream, cut)| async move {
            let item = stream.next().await?;
            until_open(cut.clone(), vec![way]).await;
            Some((item, (stream, cut)))
        });
        gated.boxed()
    }
}

/// Waits until none of the ways is cut.
fn until_open(mut cut: watch::Receiver<BTreeSet<Way>>, ways: Vec<Way>) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        while ways.iter().any(|way| cut.borrow_and_update().contains(way)) {
            if cut.changed().await.is_err() {
                return;
            }
        }
    })
}

/// What goes out over a way that may be cut.
struct Outbound(BoxStream<'static, v1::PeerFrame>);

impl Stream for Outbound {
    type Item = v1::PeerFrame;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<v1::PeerFrame>> {
        self.0.poll_next_unpin(context)
    }
}

struct CuttableConnector {
    ways: Ways,
    from: i32,
}

impl Connector for CuttableConnector {
    fn connect(
        &self,
        address: &str,
        _timing: LinkTiming,
        outbound: FrameStream,
    ) -> BoxFuture<'static, Result<Frames, ConnectError>> {
        let (ways, from, address) = (self.ways.clone(), self.from, address.to_owned());
        Box::pin(async move {
            let to = {
                let socket: SocketAddr = address.parse().expect("an address with a number");
                let known = ways.brokers.lock().unwrap().get(&socket).copied();
                known.unwrap_or_default()
            };
            // Packets of the handshake go both ways.
            until_open(ways.cut.subscribe(), vec![(from, to), (to, from)]).await;
            let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| ConnectError::Address(error.to_string()))?
                .connect()
                .await
                // Brokers only die where a test kills them, and that is not told apart here.
                .map_err(|_| ConnectError::Refused)?;
            let outbound = Outbound(ways.gate(outbound.boxed(), (from, to)));
            let response = PeersClient::new(channel).exchange(outbound).await;
            let inbound =
                response.map_err(|status: Status| ConnectError::Stream(Box::new(status)))?;
            Ok(ways.gate(inbound.into_inner().boxed(), (to, from)))
        })
    }
}

fn both_ways(one: i32, others: &[i32]) -> Vec<Way> {
    others
        .iter()
        .flat_map(|other| [(one, *other), (*other, one)])
        .collect()
}

/// One partition with a record in it, its leader, and the others.
struct Scene {
    cluster: Cluster,
    leader: i32,
    others: Vec<i32>,
}

const GROUP: u64 = 1;

async fn scene(folder: &std::path::Path, serving: &Serving) -> Scene {
    let cluster = Cluster::start(folder, serving);
    serving.controller.create_topic("t", 1, &BROKERS);
    all_in_sync(&serving.controller, "a leader").await;
    let leader = cluster.produce(GROUP, "one").await;
    let others = BROKERS.into_iter().filter(|id| *id != leader).collect();
    Scene {
        cluster,
        leader,
        others,
    }
}

impl Scene {
    /// How the broker answers one produce request with acks=all.
    async fn ask(&self, id: i32, value: &str) -> v1::PartitionError {
        self.cluster.ask_to_produce(id, GROUP, value).await
    }

    fn term(&self, id: i32) -> u64 {
        let replicas = self.cluster.brokers[&id].replicas.all();
        replicas[0].vote().leader_id.term
    }

    fn leads(&self, id: i32) -> bool {
        let replicas = self.cluster.brokers[&id].replicas.all();
        replicas[0].leadership().borrow().is_leader
    }

    async fn wait_until(&self, what: &str, mut holds: impl FnMut() -> bool) -> Duration {
        let begun = Instant::now();
        let reached = async {
            while !holds() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LIMIT, reached)
            .await
            .unwrap_or_else(|_| panic!("{what} not in time"));
        begun.elapsed()
    }

    /// One of the others takes the value.
    async fn produce_elsewhere(&self, value: &str) -> i32 {
        let produced = async {
            loop {
                for id in &self.others {
                    if self.ask(*id, value).await == v1::PartitionError::None {
                        return *id;
                    }
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LIMIT, produced)
            .await
            .expect("nobody else takes the record in time")
    }

    /// Heals the network; nobody is disturbed, everybody has the same.
    async fn heal(mut self, controller: &FakeController, expected: &[&str]) {
        let leader = *BROKERS
            .iter()
            .find(|id| self.leads(**id) && **id != self.leader)
            .unwrap_or(&self.leader);
        let term = self.term(leader);
        self.cluster.ways.heal();
        all_in_sync(controller, "everybody is back").await;
        let others: Vec<i32> = BROKERS.into_iter().filter(|id| *id != leader).collect();
        self.wait_until("everybody follows", || {
            others
                .iter()
                .all(|id| self.term(*id) == term && !self.leads(*id))
        })
        .await;
        assert!(
            self.leads(leader) && self.term(leader) == term,
            "no election"
        );
        assert_eq!(
            self.cluster.read(leader, GROUP, expected.len()).await,
            expected
        );
        for broker in std::mem::take(&mut self.cluster.brokers).into_values() {
            broker.kill();
        }
    }
}

/// The leader leads no more after this: its lease, and some slack for a busy machine.
const STEP_DOWN_BOUND: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_acks_nothing_and_steps_down() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let scene = scene(folder.path(), &serving).await;
    let old = scene.leader;
    scene.cluster.ways.cut(&both_ways(old, &scene.others));
    let begun = Instant::now();
    assert_eq!(scene.ask(old, "lost").await, v1::PartitionError::TimedOut);
    scene.produce_elsewhere("two").await;
    println!(
        "from the cut to the next acked write elsewhere: {:?}",
        begun.elapsed()
    );
    scene
        .wait_until("it steps down", || !scene.leads(old))
        .await;
    println!(
        "from the cut to the end of the old leadership: {:?}",
        begun.elapsed()
    );
    assert!(begun.elapsed() < STEP_DOWN_BOUND);
    assert_eq!(
        scene.ask(old, "lost too").await,
        v1::PartitionError::NotLeader
    );
    // However long it is alone, it starts no election that it cannot win.
    let term = scene.term(old);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(scene.term(old), term);
    scene.heal(&serving.controller, &["one", "two"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hears_nobody_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let scene = scene(folder.path(), &serving).await;
    let old = scene.leader;
    let deaf: Vec<Way> = scene.others.iter().map(|other| (*other, old)).collect();
    scene.cluster.ways.cut(&deaf);
    // What it sends arrives, and may be committed under the next leader: the outcome is unknown.
    let unknown = scene.ask(old, "unknown").await;
    assert_eq!(unknown, v1::PartitionError::TimedOut);
    let next = scene.produce_elsewhere("two").await;
    let now = scene.cluster.read(next, GROUP, 2).await;
    let expected = [["one", "unknown", "two"].as_slice(), &["one", "two"]];
    assert!(
        expected.contains(
            &now.iter()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .as_slice()
        ),
        "{now:?}"
    );
    scene
        .wait_until("it steps down", || !scene.leads(old))
        .await;
    let now: Vec<&str> = now.iter().map(String::as_str).collect();
    scene.heal(&serving.controller, &now).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_nobody_hears_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let scene = scene(folder.path(), &serving).await;
    let old = scene.leader;
    let mute: Vec<Way> = scene.others.iter().map(|other| (old, *other)).collect();
    scene.cluster.ways.cut(&mute);
    let next = scene.produce_elsewhere("two").await;
    scene
        .wait_until("it steps down", || !scene.leads(old))
        .await;
    assert_ne!(scene.ask(old, "lost").await, v1::PartitionError::None);
    assert_eq!(scene.cluster.read(next, GROUP, 2).await, ["one", "two"]);
    scene.heal(&serving.controller, &["one", "two"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_is_cut_off_from_its_leader_alone_disturbs_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let scene = scene(folder.path(), &serving).await;
    let (leader, follower) = (scene.leader, scene.others[0]);
    let term = scene.term(leader);
    scene.cluster.ways.cut(&both_ways(leader, &[follower]));
    // Longer than any lease and any delay of a campaign; the third broker hears the leader.
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < Duration::from_secs(8) {
        let value = format!("more {count}");
        // Time for a slow disk; nothing else may delay it.
        let asked = scene
            .cluster
            .ask_to_produce_within(20_000, leader, GROUP, &value);
        assert_eq!(asked.await, v1::PartitionError::None);
        count += 1;
        sleep(Duration::from_millis(200)).await;
    }
    assert!(
        scene.leads(leader) && scene.term(leader) == term,
        "no election"
    );
    let mut expected = vec!["one".to_owned()];
    expected.extend((0..count).map(|n| format!("more {n}")));
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    scene.heal(&serving.controller, &expected).await;
}
