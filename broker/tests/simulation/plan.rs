//! What one seed decides before its run begins: the cluster, its settings, and what is wrong with it
//! on purpose.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use chronik_broker::controller_client::ClusterView;
use chronik_broker::leadership::Place;
use chronik_broker::replica::{LogConfig, PartitionState};
use chronik_types::cluster_image::{Broker, ClusterImage, Drain, Partition, Topic};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use uuid::Uuid;

use crate::host::replica_id;

const TOPIC: TopicId = TopicId(Uuid::from_u128(1));

/// What is broken on purpose, to see that it is caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    None,
    /// An fsync of the WAL is reported before it is done.
    LyingDisks,
    /// A restarted replica has the vote that it had at the start before.
    ForgetVotes,
    /// acks=all is answered when the leader has the record.
    AckBeforeCommit,
}

impl Sabotage {
    const ALL: [Sabotage; 4] = [
        Sabotage::None,
        Sabotage::LyingDisks,
        Sabotage::ForgetVotes,
        Sabotage::AckBeforeCommit,
    ];

    pub fn name(self) -> String {
        format!("{self:?}")
    }

    pub fn named(name: &str) -> Sabotage {
        let found = Sabotage::ALL.into_iter().find(|s| s.name() == name);
        found.unwrap_or_else(|| panic!("there is no sabotage {name}"))
    }
}

#[derive(Debug, Clone)]
pub struct GroupPlan {
    pub id: RaftGroupId,
    pub place: Place,
    /// Preferred leader first.
    pub replicas: Vec<ReplicaId>,
    pub min_insync_replicas: usize,
    pub segment_bytes: u64,
}

impl GroupPlan {
    pub fn state(&self) -> PartitionState {
        PartitionState {
            isr: self.replicas.iter().map(|r| r.broker_id).collect(),
            min_insync_replicas: self.min_insync_replicas,
            max_message_bytes: 1 << 20,
            log_append_time: false,
            log: LogConfig {
                segment_bytes: self.segment_bytes,
                ..LogConfig::default()
            },
        }
    }
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub sabotage: Sabotage,
    pub brokers: Vec<BrokerId>,
    pub groups: Vec<GroupPlan>,
    /// How long faults go on.
    pub fault_ms: u64,
    /// Between two faults, on average.
    pub fault_interval_ms: u64,
    pub latency_max_ms: u64,
    pub fsync_max_ms: u64,
    pub stagger_ms: u64,
    /// None: followers stay open.
    pub rest_after: Option<Duration>,
    /// Clients leave each partition alone for a third of the time.
    pub has_quiet_times: bool,
    pub wal_file_size_bytes: u64,
    pub segment_bytes: u64,
    pub memory_max_bytes: usize,
    /// Records of one batch, and bytes of one record, at most.
    pub records_max: usize,
    pub record_bytes_max: usize,
    /// Between two batches of one producer, at least.
    pub pace_ms: u64,
}

impl Plan {
    pub fn new(sabotage: Sabotage, random: &mut StdRng) -> Plan {
        let broker_count = *[3, 3, 3, 3, 5, 1].choose(random).unwrap();
        let brokers: Vec<BrokerId> = (1..=broker_count).map(BrokerId).collect();
        let group_count = random.random_range(1..=4);
        let groups = (1..=group_count)
            .map(|id| group(id, &brokers, random))
            .collect();
        let pick = |values: &[u64], random: &mut StdRng| *values.choose(random).unwrap();
        Plan {
            sabotage,
            groups,
            brokers,
            fault_ms: random.random_range(4_000..15_000),
            fault_interval_ms: pick(&[300, 800, 1_500, 3_000], random),
            latency_max_ms: pick(&[0, 1, 3, 10, 40], random),
            fsync_max_ms: pick(&[0, 1, 4, 20], random),
            stagger_ms: pick(&[50, 150], random),
            rest_after: [None, Some(40), Some(300), Some(1_000)]
                .choose(random)
                .copied()
                .flatten()
                .map(Duration::from_millis),
            has_quiet_times: random.random_bool(0.5),
            wal_file_size_bytes: pick(&[16 << 10, 64 << 10, 1 << 20], random),
            segment_bytes: pick(&[8 << 10, 64 << 10, 1 << 20], random),
            memory_max_bytes: pick(&[1 << 20, 8 << 20, 64 << 20], random) as usize,
            records_max: pick(&[1, 5], random) as usize,
            record_bytes_max: pick(&[10, 200, 2_000], random) as usize,
            pace_ms: pick(&[10, 30, 100], random),
        }
    }

    pub fn groups_of(&self, broker: BrokerId) -> impl Iterator<Item = &GroupPlan> {
        let is_here = move |r: &ReplicaId| r.broker_id == broker;
        self.groups
            .iter()
            .filter(move |group| group.replicas.iter().any(is_here))
    }

    /// What the controllers say.
    pub fn view(&self, fenced: &BTreeSet<BrokerId>, revision: u64) -> ClusterView {
        let mut image = ClusterImage {
            revision,
            ..ClusterImage::default()
        };
        for id in &self.brokers {
            let broker = Broker {
                broker_id: *id,
                incarnation_id: Uuid::nil(),
                broker_epoch: BrokerEpoch(1),
                rpc_address: id.0.to_string(),
                rack: None,
                fenced: fenced.contains(id),
                drain: Drain::default(),
            };
            image.brokers.insert(*id, broker);
        }
        let partitions = (0..).zip(&self.groups).map(|(index, group)| Partition {
            partition: PartitionIndex(index),
            raft_group_id: group.id,
            replicas: group.replicas.clone(),
            isr: group.state().isr,
            leader: None,
            leader_epoch: LeaderEpoch(0),
            partition_epoch: PartitionEpoch(0),
            reassignment: None,
            wanted_leader: None,
        });
        image.put_topic(Arc::new(Topic {
            topic_id: TOPIC,
            name: "t".into(),
            configs: BTreeMap::new(),
            partitions: partitions.collect(),
        }));
        ClusterView {
            image: Arc::new(image),
            live: true,
            connected: true,
        }
    }
}

fn group(id: u64, brokers: &[BrokerId], random: &mut StdRng) -> GroupPlan {
    let factor = match random.random_range(0..6) {
        0 => 1,
        _ => brokers.len(),
    };
    let replicas: Vec<ReplicaId> = brokers
        .choose_multiple(random, factor)
        .map(|broker| replica_id(*broker))
        .collect();
    // Mostly what a majority has anyway; sometimes all of them.
    let min_insync_replicas = match random.random_range(0..8) {
        0 => factor,
        1..=3 => 1,
        _ => factor / 2 + 1,
    };
    GroupPlan {
        id: RaftGroupId(id),
        place: Place {
            topic_id: TOPIC,
            // Groups count from 1.
            partition: PartitionIndex(id as i32 - 1),
        },
        replicas,
        min_insync_replicas,
        segment_bytes: *[8 << 10, 64 << 10, 1 << 20].choose(random).unwrap(),
    }
}
