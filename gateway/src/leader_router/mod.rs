//! From a partition to the broker that leads it: one produce and one fetch stream per broker, and
//! what is known about leaders beyond the image.
//!
//! Invariant: knowledge about a leader never goes back to a lower leader epoch.

mod ask;
mod stream;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use arc_swap::ArcSwap;
use chronik_proto::v1;
use chronik_proto::v1::data_client::DataClient;
use chronik_proto::v1::groups_client::GroupsClient;
use chronik_telemetry::rpc::carrying;
use chronik_types::cluster_image::{Broker, ClusterImage, Partition};
use chronik_types::id::BrokerId;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tracing::warn;
use uuid::Uuid;

pub use ask::{LeaderAnswer, Question, ask_leaders};
pub use stream::{Answer, Link};

use crate::metadata_cache::MetadataCache;
use crate::metrics::Metrics;
use crate::rpc_channel::{self, TracedChannel};
use stream::{Requests, Traffic};

/// Fetch requests are small; this many bytes of them at once is plenty.
const FETCH_REQUEST_BYTES_MAX: usize = 16 * 1024 * 1024;

pub struct ProduceTraffic;

impl Traffic for ProduceTraffic {
    type Request = v1::ProduceRequest;
    type Answer = v1::ProduceResponse;
    const NAME: &'static str = "produce";

    fn open(
        channel: Channel,
        requests: Requests<Self>,
    ) -> BoxFuture<'static, Result<Streaming<v1::ProduceResponse>, Status>> {
        async move { Ok(data_client(channel).produce(requests).await?.into_inner()) }.boxed()
    }

    fn request_id(answer: &v1::ProduceResponse) -> u64 {
        answer.request_id
    }

    fn finish(_: u64) -> Option<v1::ProduceRequest> {
        None
    }
}

pub struct FetchTraffic;

impl Traffic for FetchTraffic {
    type Request = v1::FetchRequest;
    type Answer = v1::FetchResponse;
    const NAME: &'static str = "fetch";

    fn open(
        channel: Channel,
        requests: Requests<Self>,
    ) -> BoxFuture<'static, Result<Streaming<v1::FetchResponse>, Status>> {
        async move { Ok(data_client(channel).fetch(requests).await?.into_inner()) }.boxed()
    }

    fn request_id(answer: &v1::FetchResponse) -> u64 {
        answer.request_id
    }

    fn finish(request_id: u64) -> Option<v1::FetchRequest> {
        let kind = v1::fetch_request::Kind::Finish(v1::FetchFinish {});
        Some(v1::FetchRequest {
            request_id,
            kind: Some(kind),
        })
    }
}

/// All connections to one incarnation of one broker. Closed when dropped.
pub struct BrokerLink {
    pub broker_id: BrokerId,
    pub produce: Link<ProduceTraffic>,
    pub fetch: Link<FetchTraffic>,
    /// For calls that neither stream carries, on a connection of their own, so that they do not
    /// wait behind megabytes of records.
    unary: Channel,
    address: String,
    incarnation_id: Uuid,
    _stop: DropGuard,
}

impl BrokerLink {
    pub fn data(&self) -> DataClient<TracedChannel> {
        data_client(self.unary.clone())
    }

    pub fn groups(&self) -> GroupsClient<TracedChannel> {
        GroupsClient::new(carrying(self.unary.clone()))
            .max_decoding_message_size(chronik_proto::MESSAGE_SIZE_MAX)
            .max_encoding_message_size(chronik_proto::MESSAGE_SIZE_MAX)
    }

    pub fn is_usable(&self) -> bool {
        self.produce.is_usable()
    }

    fn start(
        broker: &Broker,
        produce_bytes_max: usize,
        metrics: &Arc<Metrics>,
    ) -> Result<BrokerLink, tonic::transport::Error> {
        let stop = CancellationToken::new();
        let channel = || Ok(rpc_channel::endpoint(&broker.rpc_address)?.connect_lazy());
        let id = broker.broker_id;
        let (produce, fetch) = (channel()?, channel()?);
        Ok(BrokerLink {
            broker_id: id,
            produce: Link::start(
                id.0,
                produce,
                produce_bytes_max,
                metrics.clone(),
                stop.child_token(),
            ),
            fetch: Link::start(
                id.0,
                fetch,
                FETCH_REQUEST_BYTES_MAX,
                metrics.clone(),
                stop.child_token(),
            ),
            unary: channel()?,
            address: broker.rpc_address.clone(),
            incarnation_id: broker.incarnation_id,
            _stop: stop.drop_guard(),
        })
    }
}

/// Who leads a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderHint {
    pub broker_id: BrokerId,
    pub leader_epoch: i32,
}

type Links = BTreeMap<BrokerId, Arc<BrokerLink>>;

/// Finds leaders and holds the links to brokers.
pub struct LeaderRouter {
    links: ArcSwap<Links>,
    /// By Raft group: leaders that brokers told of and the image does not know yet.
    hints: RwLock<HashMap<u64, LeaderHint>>,
    produce_bytes_max: usize,
    metrics: Arc<Metrics>,
    /// Which replica is tried next where the leader cannot be reached.
    probe: AtomicUsize,
}

impl LeaderRouter {
    /// `produce_bytes_max`: bytes of produce requests on their way to one broker.
    pub fn new(produce_bytes_max: usize, metrics: Arc<Metrics>) -> Self {
        Self {
            links: ArcSwap::default(),
            hints: RwLock::default(),
            produce_bytes_max,
            metrics,
            probe: AtomicUsize::new(0),
        }
    }

    /// Opens links to the brokers of the image and closes the others. Runs inside a runtime.
    pub fn follow(&self, image: &ClusterImage) {
        let before = self.links.load_full();
        let mut links = Links::new();
        for broker in image.brokers.values() {
            let kept = before.get(&broker.broker_id).filter(|link| {
                link.address == broker.rpc_address && link.incarnation_id == broker.incarnation_id
            });
            if let Some(link) = kept {
                links.insert(broker.broker_id, link.clone());
                continue;
            }
            match BrokerLink::start(broker, self.produce_bytes_max, &self.metrics) {
                Ok(link) => {
                    links.insert(broker.broker_id, Arc::new(link));
                }
                Err(error) => {
                    warn!(broker_id = broker.broker_id.0, %error, "broker address is not usable");
                }
            }
        }
        self.links.store(Arc::new(links));
        self.forget_known_hints(image);
    }

    /// Keeps following the cache until `stop`.
    pub async fn follow_cache(self: Arc<Self>, cache: Arc<MetadataCache>, stop: CancellationToken) {
        let mut changed = cache.subscribe();
        loop {
            changed.mark_unchanged();
            self.follow(&cache.load().image);
            tokio::select! {
                _ = changed.changed() => {}
                () = stop.cancelled() => break,
            }
        }
        self.links.store(Arc::default());
    }

    pub fn link(&self, broker_id: BrokerId) -> Option<Arc<BrokerLink>> {
        self.links.load().get(&broker_id).cloned()
    }

    /// The leader as the image or a later hint has it.
    pub fn leader(&self, partition: &Partition) -> Option<LeaderHint> {
        let known = partition.leader.map(|broker_id| LeaderHint {
            broker_id,
            leader_epoch: partition.leader_epoch.0,
        });
        let hint = self.read_hints().get(&partition.raft_group_id.0).copied();
        match (known, hint) {
            (_, Some(hint)) if hint.leader_epoch > partition.leader_epoch.0 => Some(hint),
            (None, Some(hint)) if hint.leader_epoch >= partition.leader_epoch.0 => Some(hint),
            (known, _) => known,
        }
    }

    /// Where to send a request for a partition: to its leader, or, where that cannot be reached,
    /// to some other replica, which knows the new leader or is it.
    pub fn target(&self, partition: &Partition) -> Option<Arc<BrokerLink>> {
        let leader = self.leader(partition)?;
        let links = self.links.load();
        let link = links.get(&leader.broker_id).cloned();
        if link.as_ref().is_some_and(|link| link.is_usable()) {
            return link;
        }
        let others: Vec<&Arc<BrokerLink>> = partition
            .replicas
            .iter()
            .filter(|replica| replica.broker_id != leader.broker_id)
            .filter_map(|replica| links.get(&replica.broker_id))
            .filter(|link| link.is_usable())
            .collect();
        if others.is_empty() {
            return link;
        }
        let turn = self.probe.fetch_add(1, Ordering::Relaxed) % others.len();
        Some(others[turn].clone())
    }

    /// All replicas' links, the leader's first.
    pub fn candidates(&self, partition: &Partition) -> Vec<Arc<BrokerLink>> {
        let links = self.links.load();
        let leader = self.leader(partition).map(|leader| leader.broker_id);
        let others = partition
            .replicas
            .iter()
            .map(|r| r.broker_id)
            .filter(|id| Some(*id) != leader);
        leader
            .into_iter()
            .chain(others)
            .filter_map(|id| links.get(&id).cloned())
            .collect()
    }

    /// Remembers what a broker said about a leader.
    pub fn note_leader(&self, raft_group_id: u64, leader: &v1::Leader) {
        let hint = LeaderHint {
            broker_id: BrokerId(leader.broker_id),
            leader_epoch: leader.leader_epoch,
        };
        if self
            .read_hints()
            .get(&raft_group_id)
            .is_some_and(|known| known.leader_epoch >= hint.leader_epoch)
        {
            return;
        }
        let mut hints = self.hints.write().unwrap_or_else(PoisonError::into_inner);
        let known = hints.entry(raft_group_id).or_insert(hint);
        if hint.leader_epoch > known.leader_epoch {
            *known = hint;
        }
    }

    fn read_hints(&self) -> std::sync::RwLockReadGuard<'_, HashMap<u64, LeaderHint>> {
        self.hints.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the hints that the image has caught up with, and those of deleted partitions.
    fn forget_known_hints(&self, image: &ClusterImage) {
        if self.read_hints().is_empty() {
            return;
        }
        let epochs: HashMap<u64, i32> = image
            .topics
            .values()
            .flat_map(|topic| &topic.partitions)
            .map(|partition| {
                // Without a leader in the image, a hint of the same epoch is still news.
                let epoch = partition.leader_epoch.0;
                let known = if partition.leader.is_some() {
                    epoch
                } else {
                    epoch.saturating_sub(1)
                };
                (partition.raft_group_id.0, known)
            })
            .collect();
        let mut hints = self.hints.write().unwrap_or_else(PoisonError::into_inner);
        hints.retain(|group, hint| {
            epochs
                .get(group)
                .is_some_and(|known| hint.leader_epoch > *known)
        });
    }
}

fn data_client(channel: Channel) -> DataClient<TracedChannel> {
    DataClient::new(carrying(channel))
        .max_decoding_message_size(chronik_proto::MESSAGE_SIZE_MAX)
        .max_encoding_message_size(chronik_proto::MESSAGE_SIZE_MAX)
}

#[cfg(test)]
mod tests {
    use chronik_types::epoch::{LeaderEpoch, PartitionEpoch};
    use chronik_types::id::{PartitionIndex, RaftGroupId};
    use prometheus_client::registry::Registry;

    use super::*;

    fn router() -> LeaderRouter {
        LeaderRouter::new(1 << 20, Metrics::new(&mut Registry::default()))
    }

    fn partition(leader: Option<i32>, leader_epoch: i32) -> Partition {
        Partition {
            partition: PartitionIndex(0),
            raft_group_id: RaftGroupId(7),
            replicas: Vec::new(),
            isr: Vec::new(),
            leader: leader.map(BrokerId),
            leader_epoch: LeaderEpoch(leader_epoch),
            partition_epoch: PartitionEpoch(0),
            ..Partition::default()
        }
    }

    fn hint(broker_id: i32, leader_epoch: i32) -> v1::Leader {
        v1::Leader {
            broker_id,
            leader_epoch,
        }
    }

    #[test]
    fn only_a_higher_leader_epoch_replaces_what_is_known() {
        let router = router();
        let leader = |p: &Partition| router.leader(p).map(|l| (l.broker_id.0, l.leader_epoch));
        assert_eq!(leader(&partition(Some(1), 3)), Some((1, 3)));
        router.note_leader(7, &hint(2, 4));
        router.note_leader(7, &hint(3, 2));
        assert_eq!(leader(&partition(Some(1), 3)), Some((2, 4)));
        assert_eq!(leader(&partition(Some(1), 5)), Some((1, 5)));
        assert_eq!(leader(&partition(None, 4)), Some((2, 4)));
    }
}
