//! Coordinators over a real replica: Raft, the WAL and a folder on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use chronik_storage::{RealDisk, Storage, StorageConfig};
use chronik_types::cluster_image::{ClusterImage, Partition, Topic};
use chronik_types::epoch::{LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::config::GroupConfig;
use super::coordinator::{Commit, Coordinator, Membership};
use super::replica_log::{CONSUMER_OFFSETS_TOPIC, ConsumerGroups};
use super::state::{GroupError, Join, Sync};
use crate::peers::{LinkTiming, Peers, PeersOptions};
use crate::replica::raft_config::{RaftTiming, raft_config};
use crate::replica::{LogConfig, PartitionState, Replica, ReplicaOptions, Upkeep};
use crate::replicas::Replicas;
use crate::test_wait::{until, within};
use crate::throttle::Throttle;

const OFFSETS: RaftGroupId = RaftGroupId(3);
const ORDERS: RaftGroupId = RaftGroupId(4);
const ME: ReplicaId = ReplicaId {
    broker_id: BrokerId(1),
    incarnation: 1,
};

fn topic(name: &str, id: u128, group: RaftGroupId) -> Arc<Topic> {
    let partition = Partition {
        partition: PartitionIndex(0),
        raft_group_id: group,
        replicas: vec![ME],
        isr: vec![ME.broker_id],
        leader: None,
        leader_epoch: LeaderEpoch(0),
        partition_epoch: PartitionEpoch(0),
        ..Partition::default()
    };
    Arc::new(Topic {
        topic_id: TopicId(Uuid::from_u128(id)),
        name: name.into(),
        configs: BTreeMap::new(),
        partitions: vec![partition],
    })
}

fn image() -> ClusterImage {
    let mut image = ClusterImage {
        revision: 1,
        ..ClusterImage::default()
    };
    image.put_topic(topic(CONSUMER_OFFSETS_TOPIC, 1, OFFSETS));
    image.put_topic(topic("orders", 2, ORDERS));
    image
}

/// A broker with one replica of each topic, and no peer.
struct Broker {
    groups: ConsumerGroups,
    image: Arc<ArcSwap<ClusterImage>>,
    replicas: Replicas,
    storage: Storage,
    states: Vec<watch::Sender<PartitionState>>,
}

impl Broker {
    async fn start(dir: &Path) -> Broker {
        let config = StorageConfig {
            dir: dir.to_owned(),
            // However full the machine's disk is.
            reserve_bytes: Some(0),
            ..StorageConfig::default()
        };
        let storage = Storage::open(config, Arc::new(RealDisk)).unwrap();
        let replicas = Replicas::new();
        let (peers, _nudges) = Peers::new(PeersOptions {
            broker_id: ME.broker_id,
            incarnation: Uuid::new_v4(),
            timing: LinkTiming::default(),
            groups: Arc::new(replicas.downgrade()),
            behind: tokio::sync::mpsc::channel(1).0,
            replication_seconds: crate::metrics::seconds_histogram(),
            fill_throttle: Throttle::of(None),
            is_disk_stuck: watch::channel(false).1,
            stop: CancellationToken::new(),
        });
        let image = Arc::new(ArcSwap::from_pointee(image()));
        let config = GroupConfig {
            initial_rebalance_delay_ms: 0,
            ..GroupConfig::default()
        };
        let stop = CancellationToken::new();
        let groups = ConsumerGroups::new(replicas.clone(), image.clone(), config, stop);
        let mut broker = Broker {
            groups,
            image,
            replicas,
            storage,
            states: Vec::new(),
        };
        for group in [OFFSETS, ORDERS] {
            broker.open(&peers, group).await;
        }
        broker.groups.refresh();
        broker
    }

    async fn open(&mut self, peers: &Peers, group: RaftGroupId) {
        let (state, seen) = watch::channel(PartitionState {
            isr: vec![ME.broker_id],
            min_insync_replicas: 1,
            max_message_bytes: 1_048_588,
            log_append_time: false,
            log: LogConfig {
                segment_bytes: 1 << 30,
                ..LogConfig::default()
            },
        });
        self.states.push(state);
        let replica = Replica::open(ReplicaOptions {
            replica_id: ME,
            log: self.storage.open_log(group).unwrap(),
            network: peers.network(group, ME),
            raft_config: raft_config(RaftTiming::default()),
            state: seen,
            upkeep: Upkeep::default(),
        })
        .await
        .unwrap();
        replica.initialize(BTreeSet::from([ME])).await.unwrap();
        self.replicas.insert(group, replica);
    }

    /// The coordinator, once the replica leads and the log is read.
    async fn coordinator(&self) -> Arc<Coordinator> {
        let replica = self.replicas.get(OFFSETS).unwrap();
        let mut leadership = replica.leadership();
        let coordinator = self.groups.coordinators().get(OFFSETS).unwrap();
        within(async {
            loop {
                replica.campaign(false).await.unwrap();
                let ready = leadership.wait_for(|l| l.ready);
                if tokio::time::timeout(Duration::from_millis(500), ready)
                    .await
                    .is_ok()
                {
                    break;
                }
            }
        })
        .await;
        until("it coordinates", || coordinator.is_leading()).await;
        coordinator
    }

    async fn stop(self) {
        within(self.groups.shutdown()).await;
        for (group, replica) in self.replicas.all() {
            within(replica.shutdown()).await;
            self.replicas.remove(group);
        }
        self.storage.close().unwrap();
    }
}

fn commit(topic: &str, offset: i64) -> Commit {
    Commit {
        topic: topic.to_owned(),
        topic_id: Uuid::from_u128(2),
        partition: 0,
        offset,
        leader_epoch: 1,
        metadata: String::new(),
    }
}

fn outside() -> Membership {
    Membership {
        generation: -1,
        ..Membership::default()
    }
}

#[tokio::test]
async fn groups_and_offsets_survive_a_restart_of_the_broker() {
    let dir = tempfile::tempdir().unwrap();
    let broker = Broker::start(dir.path()).await;
    // Only the offsets topic has coordinators.
    assert!(broker.groups.coordinators().get(ORDERS).is_none());
    let coordinator = broker.coordinator().await;
    let join = Join {
        member_id: String::new(),
        new_member_id: "a".to_owned(),
        group_instance_id: None,
        client_id: "client".to_owned(),
        client_host: "/127.0.0.1".to_owned(),
        session_timeout: Duration::from_secs(30),
        rebalance_timeout: Duration::from_secs(30),
        protocol_type: "consumer".to_owned(),
        protocols: vec![("range".to_owned(), Bytes::new())],
        require_known_member_id: false,
        supports_skip_assignment: false,
    };
    let joined = within(coordinator.join("g", join)).await.unwrap();
    let sync = Sync {
        generation: joined.generation,
        member_id: "a".to_owned(),
        assignments: vec![("a".to_owned(), Bytes::from_static(b"p0"))],
        ..Sync::default()
    };
    let synced = within(coordinator.sync("g", sync)).await.unwrap();
    assert_eq!(&synced.assignment[..], b"p0");
    let who = Membership {
        generation: joined.generation,
        member_id: "a".to_owned(),
        group_instance_id: None,
    };
    for offset in 0..50 {
        let commits = vec![commit("orders", offset)];
        let outcomes = within(coordinator.commit("g", &who, commits, None))
            .await
            .unwrap();
        assert_eq!(outcomes, vec![Ok(())]);
    }
    let before = (
        coordinator.describe("g"),
        coordinator.fetch_offsets("g", None),
    );
    broker.stop().await;
    assert_eq!(
        coordinator.heartbeat("g", &who),
        Err(GroupError::NotCoordinator)
    );

    let broker = Broker::start(dir.path()).await;
    let coordinator = broker.coordinator().await;
    assert_eq!(
        (
            coordinator.describe("g"),
            coordinator.fetch_offsets("g", None)
        ),
        before
    );
    assert_eq!(coordinator.heartbeat("g", &who), Ok(()));
    broker.stop().await;
}

#[tokio::test]
async fn coordinators_follow_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let broker = Broker::start(dir.path()).await;
    let coordinator = broker.coordinator().await;
    let commits = vec![
        commit("orders", 1),
        Commit {
            topic_id: Uuid::nil(),
            ..commit("kept", 2)
        },
    ];
    within(coordinator.commit("g", &outside(), commits, None))
        .await
        .unwrap();

    // A deleted topic takes its offsets with it.
    let mut without_orders = image();
    without_orders.remove_topic(TopicId(Uuid::from_u128(2)));
    broker.image.store(Arc::new(without_orders));
    broker.groups.refresh();
    until("its offsets go", || {
        coordinator.fetch_offsets("g", None).unwrap().len() == 1
    })
    .await;
    assert_eq!(
        coordinator.fetch_offsets("g", None).unwrap()[0].topic,
        "kept"
    );
    // The same coordinator goes on while its replica does.
    let same = broker.groups.coordinators().get(OFFSETS).unwrap();
    assert!(Arc::ptr_eq(&same, &coordinator));

    broker.image.store(Arc::default());
    broker.groups.refresh();
    assert!(broker.groups.coordinators().get(OFFSETS).is_none());
    until("it coordinates no more", || !coordinator.is_leading()).await;
    broker.stop().await;
}
