//! Two transports over loopback, with replicas that are only pretended.

mod request_test;
mod session_test;

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
