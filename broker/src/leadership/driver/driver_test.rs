//! What the driver does with one group, step by step: its replica is real, its peers are not there.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chronik_storage::{RealDisk, Storage, StorageConfig};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::*;
use crate::peers::campaign::held_vote;
use crate::peers::{LinkState, LinkStatus, LinkTiming, PeersOptions};
use crate::replica::raft_config::{RaftTiming, raft_config};
use crate::replica::{LogConfig, PartitionState, ReplicaOptions, Upkeep};
use crate::test_wait::until;
use crate::throttle::Throttle;

const GROUP: RaftGroupId = RaftGroupId(7);

fn replica_id(broker: i32) -> ReplicaId {
    ReplicaId {
        broker_id: BrokerId(broker),
        incarnation: 1,
    }
}

async fn open(storage: &Storage, peers: &Peers, voters: &[ReplicaId]) -> Arc<Replica> {
    let state = PartitionState {
        isr: voters.iter().map(|voter| voter.broker_id).collect(),
        min_insync_replicas: 1,
        max_message_bytes: 1_048_588,
        log_append_time: false,
        log: LogConfig::default(),
    };
    let replica = Replica::open(ReplicaOptions {
        replica_id: voters[0],
        log: storage.open_log(GROUP).unwrap(),
        network: peers.network(GROUP, voters[0]),
        raft_config: raft_config(RaftTiming::default()),
        state: watch::channel(state).1,
        upkeep: Upkeep::default(),
    });
    let replica = replica.await.unwrap();
    replica
        .initialize(voters.iter().copied().collect::<BTreeSet<_>>())
        .await
        .unwrap();
    replica
}

fn storage(folder: &Path) -> Storage {
    let config = StorageConfig {
        dir: folder.to_owned(),
        // However full the machine's disk is.
        reserve_bytes: Some(0),
        ..StorageConfig::default()
    };
    Storage::open(config, Arc::new(RealDisk)).unwrap()
}

fn options(stop: CancellationToken) -> DriverOptions {
    let replicas = Replicas::new();
    let (peers, nudges) = Peers::new(PeersOptions {
        broker_id: BrokerId(1),
        incarnation: Uuid::new_v4(),
        timing: LinkTiming::default(),
        groups: Arc::new(replicas.downgrade()),
        behind: mpsc::channel(1).0,
        replication_seconds: crate::metrics::seconds_histogram(),
        fill_throttle: Throttle::of(None),
        is_disk_stuck: watch::channel(false).1,
        stop: stop.clone(),
    });
    let view = ClusterView {
        image: Arc::default(),
        live: false,
        connected: false,
    };
    DriverOptions {
        broker_id: BrokerId(1),
        timing: CampaignTiming::new(Duration::from_secs(3600)),
        step_down_after: Duration::from_secs(3600),
        peers,
        replicas,
        view: watch::channel(view).1,
        groups: mpsc::unbounded_channel().1,
        nudges,
        led: mpsc::unbounded_channel().0,
        metrics: BrokerMetrics::register(&mut Registry::default()),
        draining: watch::channel(false).1,
        stop,
    }
}

fn links(up: &[i32]) -> LinkTable {
    let status = LinkStatus {
        state: LinkState::Up,
        incarnation: Some(Uuid::from_u128(1)),
        inbound: None,
    };
    let links = up.iter().map(|broker| (BrokerId(*broker), status));
    LinkTable(links.collect())
}

fn opened(in_order: &[ReplicaId], replica: &Arc<Replica>) -> GroupEvent {
    let assigned = Assigned {
        group: GROUP,
        place: Place {
            topic_id: TopicId(Uuid::from_u128(1)),
            partition: PartitionIndex(0),
        },
        replicas: in_order.to_vec(),
        voters: in_order.to_vec(),
        moving: None,
    };
    GroupEvent::Opened(assigned, replica.clone())
}

/// Two replicas that both tried by force, the one with the shorter log always a term ahead, kept a
/// partition without a leader for 20 seconds.
#[tokio::test]
async fn a_campaign_that_a_rival_has_spoilt_ends_and_the_next_goes_above_the_rivals_term() {
    let folder = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let (mut driver, mut events) = Driver::new(options(stop.clone()));
    let voters = [1, 2, 3].map(replica_id);
    let storage = storage(folder.path());
    let replica = open(&storage, &driver.options.peers, &voters).await;
    until("the first election", || held_vote(&replica).term == 1).await;
    driver.group_event(opened(&voters, &replica));
    let nudge = |term| Nudge { group: GROUP, term };
    // The one leader is gone, the other replica is there.
    driver.links = links(&[2]);
    driver.nudged(nudge(1));
    until("it campaigns", || held_vote(&replica).term == 2).await;
    let running = driver.groups[&GROUP].running.clone().unwrap();

    driver.nudged(nudge(1));
    assert!(!running.is_cancelled(), "its request is of a later term");
    driver.nudged(nudge(5));
    assert!(running.is_cancelled());
    while driver.groups[&GROUP].rival_term.is_some() {
        let event = events.recv().await.unwrap();
        driver.task_event(event);
    }
    until("it goes above the rival", || held_vote(&replica).term > 5).await;
    assert_eq!(held_vote(&replica).term, 6);

    // Where both others are there the rival may win without this one, and has a moment to.
    driver.links = links(&[2, 3]);
    driver.nudged(nudge(20));
    while driver.groups[&GROUP].running.is_some() {
        let event = events.recv().await.unwrap();
        driver.task_event(event);
    }
    let group = &driver.groups[&GROUP];
    assert!(group.rival_term == Some(20) && group.due.is_some() && !group.campaigning);
    stop.cancel();
    replica.shutdown().await;
}

/// One of 10,000 partitions, whose first candidate did not campaign, had no leader for 20 seconds.
#[tokio::test]
async fn a_second_candidate_waits_no_longer_than_the_others_campaigns_take() {
    let folder = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let (mut driver, _events) = Driver::new(options(stop.clone()));
    driver.options.timing = CampaignTiming::new(Duration::from_millis(50));
    let voters = [1, 2, 3].map(replica_id);
    let storage = storage(folder.path());
    let replica = open(&storage, &driver.options.peers, &voters).await;
    driver.links = links(&[2, 3]);
    driver.leaderless = 10_000;
    let second = [2, 1, 3].map(replica_id);
    driver.group_event(opened(&second, &replica));
    let waits = |driver: &Driver| {
        let due = driver.groups[&GROUP].due.unwrap();
        due.saturating_duration_since(Instant::now())
    };
    driver.wait_less();
    let long = Duration::from_secs(19);
    assert!(waits(&driver) > long);
    driver.leaderless = 6_000;
    driver.wait_less();
    assert!(waits(&driver) > long, "few are led yet");
    driver.leaderless = 1;
    driver.wait_less();
    assert!(waits(&driver) < Duration::from_secs(2));
    stop.cancel();
    replica.shutdown().await;
}
