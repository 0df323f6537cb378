//! Two transports over loopback, with replicas that are only pretended.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use openraft::errors::RPCError;
use openraft::network::{NetSnapshot, NetStreamAppend, NetVote, RPCOption, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::vote::RaftLeaderId;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use uuid::Uuid;

use super::endpoint::{AppendRequests, AppendResults};
use super::link::{LINK_BYTES_MAX, SESSION_APPENDS_MAX, SESSION_BYTES_MAX};
use super::*;
use crate::replica::codec::log_id;
use crate::replica::raft_config::{
    Batches, Entry, EntryData, EntryPayload, LeaderId, LogId, TypeConfig, Vote,
};
use crate::throttle::Throttle;

/// What pretended replicas have.
const HAS_UP_TO: u64 = 50;
const LIMIT: Duration = Duration::from_secs(20);
const ONE: BrokerId = BrokerId(1);
const TWO: BrokerId = BrokerId(2);

fn replica(broker: BrokerId) -> ReplicaId {
    ReplicaId {
        broker_id: broker,
        incarnation: 7,
    }
}

fn vote(term: u64, broker: BrokerId) -> Vote {
    Vote {
        leader_id: LeaderId::new(term, replica(broker)),
        committed: true,
    }
}

/// Answers every append with a match; `turns` limits how many it may answer.
struct FakeReplica {
    id: ReplicaId,
    turns: Arc<Semaphore>,
    received: Arc<Mutex<Vec<u64>>>,
    vote: Vote,
    /// Stops with an error instead of answering this log index.
    fails_at: Option<u64>,
    /// Whether the others of its group are voters.
    others_vote: Arc<AtomicBool>,
}

impl FakeReplica {
    fn new(id: ReplicaId) -> FakeReplica {
        FakeReplica {
            id,
            turns: Arc::new(Semaphore::new(1_000_000)),
            received: Arc::default(),
            vote: vote(3, ONE),
            fails_at: None,
            others_vote: Arc::new(AtomicBool::new(true)),
        }
    }
}

fn last(request: &AppendEntriesRequest<TypeConfig>) -> Option<LogId> {
    request
        .entries
        .last()
        .map(|entry| entry.log_id)
        .or(request.prev_log_id)
}

impl RaftEndpoint for FakeReplica {
    fn replica_id(&self) -> ReplicaId {
        self.id
    }

    fn append_stream(&self, requests: AppendRequests) -> AppendResults {
        let (turns, received, fails_at) =
            (self.turns.clone(), self.received.clone(), self.fails_at);
        let results = requests.then(move |request| {
            let (turns, received) = (turns.clone(), received.clone());
            async move {
                turns.acquire().await.unwrap().forget();
                let last = last(&request);
                let index = last.map_or(0, |id| id.index);
                if fails_at == Some(index) {
                    return Err(Stopped("as the test wants".to_owned()));
                }
                received.lock().unwrap().push(index);
                Ok(Ok(last))
            }
        });
        Box::pin(results)
    }

    fn heartbeat(
        &self,
        request: AppendEntriesRequest<TypeConfig>,
    ) -> BoxFuture<'static, Result<StreamAppendResult<TypeConfig>, Stopped>> {
        let conflict = request.prev_log_id.is_some_and(|id| id.index > 100);
        Box::pin(async move {
            Ok(match request.prev_log_id {
                Some(id) if conflict => Err(StreamAppendError::Conflict(id)),
                id => Ok(id),
            })
        })
    }

    fn vote(
        &self,
        request: VoteRequest<TypeConfig>,
        pre_vote: bool,
    ) -> BoxFuture<'static, Result<VoteResponse<TypeConfig>, Stopped>> {
        let longer = Some(log_id(3, 50));
        // As one whose Raft was opened a moment ago: its lease has just begun.
        let granted = request.last_log_id >= longer && (pre_vote || request.leadership_transfer);
        Box::pin(async move { Ok(VoteResponse::new(request.vote, longer, granted)) })
    }

    fn transfer_leader(
        &self,
        _: TransferLeaderRequest<TypeConfig>,
    ) -> BoxFuture<'static, Result<TransferLeaderResponse<TypeConfig>, Stopped>> {
        Box::pin(async { Ok(Ok(())) })
    }

    fn greet(self: Arc<Self>, _: Peers, _: ReplicaId) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }

    fn current_vote(&self) -> Vote {
        self.vote
    }

    fn has_entry(&self, last_log_id: &LogId) -> bool {
        last_log_id.index <= HAS_UP_TO
    }

    fn is_voter(&self, _replica: ReplicaId) -> bool {
        self.others_vote.load(Ordering::Relaxed)
    }

    fn is_leader(&self) -> bool {
        false
    }
}

#[derive(Default)]
struct FakeGroups(Mutex<HashMap<RaftGroupId, Arc<FakeReplica>>>);

impl FakeGroups {
    fn add(&self, group: u64, replica: FakeReplica) -> Arc<FakeReplica> {
        let replica = Arc::new(replica);
        self.0
            .lock()
            .unwrap()
            .insert(RaftGroupId(group), replica.clone());
        replica
    }
}

impl RaftGroups for FakeGroups {
    fn endpoint(&self, group: RaftGroupId) -> Option<Arc<dyn RaftEndpoint>> {
        let replica = self.0.lock().unwrap().get(&group).cloned();
        replica.map(|replica| replica as Arc<dyn RaftEndpoint>)
    }
}

struct Node {
    peers: Peers,
    nudged: mpsc::Receiver<Nudge>,
    behind: mpsc::Receiver<Behind>,
    groups: Arc<FakeGroups>,
    address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn node(broker_id: BrokerId, address: Option<SocketAddr>) -> Node {
    let address = address.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let groups = Arc::new(FakeGroups::default());
    let stop = CancellationToken::new();
    let (behind_sender, behind) = mpsc::channel(16);
    let (peers, nudged) = Peers::new(PeersOptions {
        broker_id,
        incarnation: Uuid::new_v4(),
        timing: LinkTiming::default(),
        groups: groups.clone(),
        behind: behind_sender,
        replication_seconds: crate::metrics::seconds_histogram(),
        // Next to nothing, for those that do not vote.
        fill_throttle: Throttle::of(NonZeroU64::new(100)),
        is_disk_stuck: watch::channel(false).1,
        stop: stop.clone(),
    });
    let router = Server::builder().add_service(peers.service());
    let stopped = stop.clone();
    tokio::spawn(async move {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tokio::select! {
            () = stopped.cancelled() => {}
            served = router.serve_with_incoming(incoming) => served.unwrap(),
        }
    });
    Node {
        peers,
        nudged,
        behind,
        groups,
        address,
        stop,
    }
}

impl Node {
    fn dial(&self, broker: BrokerId, address: SocketAddr) {
        self.peers
            .set_addresses(&BTreeMap::from([(broker, address.to_string())]));
    }

    async fn wait_for(&self, broker: BrokerId, state: LinkState) -> LinkStatus {
        let mut links = self.peers.links();
        let reached = links.wait_for(|table| table.status(broker).state == state);
        timeout(LIMIT, reached)
            .await
            .expect("the link changes in time")
            .unwrap()
            .status(broker)
    }

    async fn client(&self, group: u64, to: ReplicaId) -> ReplicaClient {
        let from = replica(self.peers.broker_id());
        self.peers
            .network(RaftGroupId(group), from)
            .new_client(to, &())
            .await
    }
}

/// Node one connected to node two.
async fn pair() -> (Node, Node) {
    let (one, two) = (node(ONE, None).await, node(TWO, None).await);
    one.dial(TWO, two.address);
    one.wait_for(TWO, LinkState::Up).await;
    (one, two)
}

fn append(index: u64, size: usize) -> AppendEntriesRequest<TypeConfig> {
    let batches = Batches::stamped(vec![7; size].into(), None);
    AppendEntriesRequest {
        vote: vote(3, ONE),
        prev_log_id: index.checked_sub(1).map(|index| log_id(3, index)),
        entries: vec![Entry {
            log_id: log_id(3, index),
            payload: EntryPayload::Normal(EntryData::Batches(batches)),
        }],
        leader_commit: None,
    }
}

type Output<'a> = BoxStream<'a, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>;

async fn session<'a>(
    client: &'a mut ReplicaClient,
) -> (
    mpsc::UnboundedSender<AppendEntriesRequest<TypeConfig>>,
    Output<'a>,
) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let input = UnboundedReceiverStream::new(receiver);
    let output = client
        .stream_append(input, RPCOption::new(LIMIT))
        .await
        .unwrap();
    (sender, output)
}

async fn next(output: &mut Output<'_>) -> Result<Option<u64>, String> {
    match timeout(LIMIT, output.next())
        .await
        .expect("an answer in time")
    {
        Some(Ok(Ok(matched))) => Ok(matched.map(|id| id.index)),
        Some(Ok(Err(error))) => Err(error.to_string()),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("ended".to_owned()),
    }
}

#[tokio::test]
async fn appends_are_answered_in_their_order() {
    let (one, two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    for index in 0..500 {
        input.send(append(index, 3_000)).unwrap();
    }
    for index in 0..500 {
        assert_eq!(next(&mut output).await, Ok(Some(index)));
    }
    drop(input);
    assert_eq!(next(&mut output).await, Err("ended".to_owned()));
}

#[tokio::test]
async fn a_replica_that_does_not_run_there_ends_the_session() {
    let (one, two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let stranger = ReplicaId {
        incarnation: 8,
        ..replica(TWO)
    };
    for (group, to) in [(6, replica(TWO)), (5, stranger)] {
        let mut client = one.client(group, to).await;
        let (input, mut output) = session(&mut client).await;
        input.send(append(0, 10)).unwrap();
        let error = next(&mut output).await.unwrap_err();
        assert!(error.contains("does not run"), "{error}");
    }
}

#[tokio::test]
async fn a_replica_that_stops_ends_the_session() {
    let (one, two) = pair().await;
    two.groups.add(
        5,
        FakeReplica {
            fails_at: Some(1),
            ..FakeReplica::new(replica(TWO))
        },
    );
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    input.send(append(0, 10)).unwrap();
    input.send(append(1, 10)).unwrap();
    assert_eq!(next(&mut output).await, Ok(Some(0)));
    let error = next(&mut output).await.unwrap_err();
    assert!(error.contains("as the test wants"), "{error}");
}

#[tokio::test]
async fn a_dead_peer_fails_nothing_before_there_is_something_to_send() {
    let (one, two) = (node(ONE, None).await, node(TWO, None).await);
    let address = two.address;
    drop(two);
    one.dial(TWO, address);
    one.wait_for(TWO, LinkState::Refused).await;
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    assert!(futures::poll!(output.next()).is_pending());
    input.send(append(0, 10)).unwrap();
    let error = next(&mut output).await.unwrap_err();
    assert!(error.contains("not connected"), "{error}");
}

#[tokio::test]
async fn a_broken_connection_ends_its_sessions_and_a_new_one_takes_over() {
    let (one, two) = pair().await;
    let replica_two = two.groups.add(5, FakeReplica::new(replica(TWO)));
    replica_two.turns.forget_permits(1_000_000);
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    input.send(append(0, 10)).unwrap();
    assert!(futures::poll!(output.next()).is_pending());
    let before = one.wait_for(TWO, LinkState::Up).await;

    let address = two.address;
    drop(two);
    let error = next(&mut output).await.unwrap_err();
    assert!(error.contains("broke"), "{error}");
    drop(output);
    one.wait_for(TWO, LinkState::Refused).await;

    let two = node(TWO, Some(address)).await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let after = one.wait_for(TWO, LinkState::Up).await;
    assert_ne!(before.incarnation, after.incarnation);
    let (input, mut output) = session(&mut client).await;
    input.send(append(0, 10)).unwrap();
    assert_eq!(next(&mut output).await, Ok(Some(0)));
}

#[tokio::test]
async fn a_slow_group_is_held_back_and_holds_up_no_other() {
    let (one, two) = pair().await;
    let slow = two.groups.add(5, FakeReplica::new(replica(TWO)));
    slow.turns.forget_permits(1_000_000);
    two.groups.add(6, FakeReplica::new(replica(TWO)));
    let (mut slow_client, mut quick_client) = (
        one.client(5, replica(TWO)).await,
        one.client(6, replica(TWO)).await,
    );

    let taken = Arc::new(Mutex::new(0));
    let counter = taken.clone();
    let endless = futures::stream::iter(0..).map(move |index| {
        *counter.lock().unwrap() += 1;
        append(index, 10)
    });
    let mut slow_output = slow_client
        .stream_append(endless, RPCOption::new(LIMIT))
        .await
        .unwrap();
    let (input, mut quick_output) = session(&mut quick_client).await;
    for index in 0..200 {
        input.send(append(index, 50_000)).unwrap();
        assert!(futures::poll!(slow_output.next()).is_pending());
        assert_eq!(next(&mut quick_output).await, Ok(Some(index)));
    }
    // The window, and the one that waits for room in it.
    assert_eq!(*taken.lock().unwrap(), SESSION_APPENDS_MAX + 1);
    slow.turns.add_permits(1);
    assert_eq!(next(&mut slow_output).await, Ok(Some(0)));
}

#[tokio::test]
async fn a_replica_that_begins_to_vote_is_held_back_no_more() {
    let (one, two) = pair().await;
    let leader = one.groups.add(5, FakeReplica::new(replica(ONE)));
    leader.others_vote.store(false, Ordering::Relaxed);
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    for index in 0..2 {
        input.send(append(index, 100_000)).unwrap();
    }
    assert_eq!(next(&mut output).await, Ok(Some(0)));
    // A quarter of an hour's worth has passed.
    let early = timeout(Duration::from_millis(300), output.next()).await;
    assert!(early.is_err(), "the limit holds");
    leader.others_vote.store(true, Ordering::Relaxed);
    assert_eq!(next(&mut output).await, Ok(Some(1)));
}

#[tokio::test]
async fn what_holds_no_records_passes_a_budget_that_is_used_up() {
    const MIB: usize = 1 << 20;
    let (one, two) = pair().await;
    let mut clients = Vec::new();
    // More than enough.
    for group in 1..=2 * LINK_BYTES_MAX / SESSION_BYTES_MAX {
        // As while its disk is full.
        let full = two.groups.add(group as u64, FakeReplica::new(replica(TWO)));
        full.turns.forget_permits(1_000_000);
        clients.push(one.client(group as u64, replica(TWO)).await);
    }
    let mut held = Vec::new();
    for client in &mut clients {
        let appends = futures::stream::iter(0..).map(|index| append(index, MIB));
        let output = client.stream_append(appends, RPCOption::new(LIMIT)).await;
        held.push(output.unwrap());
    }
    for output in &mut held {
        assert!(futures::poll!(output.next()).is_pending());
    }
    two.groups.add(1_000, FakeReplica::new(replica(TWO)));
    let mut client = one.client(1_000, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    let mut blank = append(0, 0);
    blank.entries[0].payload = EntryPayload::Blank;
    input.send(blank).unwrap();
    assert_eq!(next(&mut output).await, Ok(Some(0)));
    input.send(append(1, MIB)).unwrap();
    let early = timeout(Duration::from_millis(300), output.next()).await;
    assert!(early.is_err(), "the budget is used up");
    drop(held);
    assert_eq!(next(&mut output).await, Ok(Some(1)));
}

#[tokio::test]
async fn a_heartbeat_takes_one_request_and_ends() {
    let (one, two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut network = one.peers.network(RaftGroupId(5), replica(ONE));
    let mut client = network.new_heartbeat_client(replica(TWO), &()).await;
    for (index, good) in [(40, true), (400, false)] {
        let request = AppendEntriesRequest::<TypeConfig> {
            prev_log_id: Some(log_id(3, index)),
            entries: Vec::new(),
            ..append(1, 0)
        };
        let input = futures::stream::iter(vec![request; 3]);
        let mut output = client
            .stream_append(input, RPCOption::new(LIMIT))
            .await
            .unwrap();
        let first = timeout(LIMIT, output.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(first.is_ok(), good);
        assert!(timeout(LIMIT, output.next()).await.unwrap().is_none());
    }
    assert_eq!(
        two.peers.heard().leader(RaftGroupId(5)).unwrap().broker,
        ONE
    );
}

#[tokio::test]
async fn votes_are_counted_and_a_longer_log_is_nudged() {
    let (one, mut two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut client = one.client(5, replica(TWO)).await;
    let option = || RPCOption::new(LIMIT);
    let mut request = VoteRequest::<TypeConfig>::new(vote(4, ONE), Some(log_id(3, 60)));
    assert!(
        client
            .vote(request.clone(), option())
            .await
            .unwrap()
            .vote_granted
    );
    assert!(
        client
            .pre_vote(request.clone(), option())
            .await
            .unwrap()
            .vote_granted
    );
    assert!(two.nudged.try_recv().is_err());

    request.last_log_id = Some(log_id(3, 10));
    // It may be the only one to try: whoever only asks first must not be in vain for ever either.
    let asked = client.pre_vote(request.clone(), option()).await.unwrap();
    assert!(!asked.vote_granted);
    let nudge = |term| {
        let group = RaftGroupId(5);
        Some(Nudge { group, term })
    };
    assert_eq!(two.nudged.recv().await, nudge(3), "4 is only asked for");
    assert!(!client.vote(request, option()).await.unwrap().vote_granted);
    assert_eq!(two.nudged.recv().await, nudge(4));

    let mut client = one.client(99, replica(TWO)).await;
    let request = VoteRequest::<TypeConfig>::new(vote(4, ONE), None);
    assert!(client.vote(request, option()).await.is_err());
}

#[tokio::test]
async fn a_replica_that_lacks_what_a_log_begins_after_is_named() {
    let (one, mut two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut client = one.client(5, replica(TWO)).await;
    let mut ask = async |index| {
        let snapshot = crate::replica::raft_config::PartitionSnapshot {
            meta: crate::replica::raft_config::SnapshotMeta {
                last_log_id: Some(log_id(3, index)),
                last_membership: Default::default(),
            },
            snapshot: bytes::Bytes::new(),
        };
        let never = std::future::pending();
        let leader = vote(3, ONE);
        client
            .full_snapshot(leader, snapshot, never, RPCOption::new(LIMIT))
            .await
    };
    assert_eq!(ask(HAS_UP_TO).await.unwrap().vote, vote(3, ONE));
    assert!(two.behind.try_recv().is_err());
    assert!(ask(HAS_UP_TO + 1).await.is_err());
    let behind = Behind {
        group: RaftGroupId(5),
        leader: replica(ONE),
        vote: vote(3, ONE),
    };
    assert_eq!(two.behind.recv().await, Some(behind));
}

#[tokio::test]
async fn a_resting_leader_whose_broker_is_connected_is_not_voted_out() {
    let (one, two) = pair().await;
    // Node two follows a leader on broker 3, which has spoken and is connected.
    let three = BrokerId(3);
    let follower = FakeReplica {
        vote: vote(3, three),
        ..FakeReplica::new(replica(TWO))
    };
    let follower = two.groups.add(5, follower);
    let node_three = node(three, None).await;
    two.dial(three, node_three.address);
    let status = two.wait_for(three, LinkState::Up).await;
    let mut client = one.client(5, replica(TWO)).await;
    let request = VoteRequest::<TypeConfig>::new(vote(4, ONE), Some(log_id(3, 60)));
    let granted = client
        .pre_vote(request.clone(), RPCOption::new(LIMIT))
        .await
        .unwrap();
    assert!(granted.vote_granted, "it has not spoken yet");

    two.peers.heard().record(
        RaftGroupId(5),
        &*follower,
        three,
        status.incarnation.unwrap(),
    );
    let refused = client
        .pre_vote(request.clone(), RPCOption::new(LIMIT))
        .await
        .unwrap();
    assert!(!refused.vote_granted);

    drop(node_three);
    two.wait_for(three, LinkState::Refused).await;
    let granted = client
        .pre_vote(request, RPCOption::new(LIMIT))
        .await
        .unwrap();
    assert!(granted.vote_granted);
}

#[tokio::test]
async fn another_broker_at_the_address_is_not_taken_for_the_peer() {
    let (one, two) = (node(ONE, None).await, node(TWO, None).await);
    one.dial(BrokerId(9), two.address);
    let status = one.wait_for(BrokerId(9), LinkState::Unreachable).await;
    assert_eq!(status.incarnation, None);
}
