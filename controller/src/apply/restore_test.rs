//! What a restored state makes of numbers, sessions and replicas.

use std::collections::BTreeMap;

use chronik_types::cluster_image::{Gateway, Restore};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId, TopicId};
use uuid::Uuid;

use crate::apply::apply;
use crate::command::{
    BrokerSession, Command, HeldReplica, Outcome, PartitionReport, RegisterBroker, ReportOutcome,
    ReportPartitions, TopicPlan,
};
use crate::state::{PendingRestore, State, StateDump};

const FLOOR: u64 = 1_000_000_000_000;

fn register(state: &mut State, broker_id: i32, held: Option<&[(u64, u64)]>) {
    let replica = |(group, incarnation): &(u64, u64)| HeldReplica {
        raft_group_id: RaftGroupId(*group),
        incarnation: *incarnation,
    };
    let held = held.map(|held| held.iter().map(replica).collect());
    let id = u128::from(broker_id.unsigned_abs());
    let command = Command::RegisterBroker(RegisterBroker {
        broker_id: BrokerId(broker_id),
        incarnation_id: Uuid::from_u128(id),
        rpc_address: format!("b{broker_id}:1"),
        rack: None,
        storage_id: Uuid::from_u128(100 + id),
        held,
    });
    // As the log brings it.
    let json = serde_json::to_string(&command).unwrap();
    assert_eq!(serde_json::from_str::<Command>(&json).unwrap(), command);
    assert!(matches!(
        apply(state, command).0,
        Outcome::BrokerRegistered(_)
    ));
}

fn create(state: &mut State, id: u128, brokers: &[i32]) {
    let plan = TopicPlan {
        topic_id: TopicId(Uuid::from_u128(id)),
        name: format!("t{id}"),
        configs: BTreeMap::new(),
        assignments: vec![brokers.iter().copied().map(BrokerId).collect()],
    };
    apply(state, Command::CreateTopics { topics: vec![plan] });
}

/// Broker 1 reports that it leads group 1, with all replicas in sync.
fn lead(state: &mut State) {
    let topic = state.image.topic(TopicId(Uuid::from_u128(1))).unwrap();
    let report = PartitionReport {
        raft_group_id: RaftGroupId(1),
        leader_epoch: LeaderEpoch(1),
        partition_epoch: topic.partitions[0].partition_epoch,
        caught_up: (1..=3).map(BrokerId).collect(),
        voters: Vec::new(),
    };
    let session = BrokerSession {
        broker_id: BrokerId(1),
        broker_epoch: state.image.brokers[&BrokerId(1)].broker_epoch,
    };
    let reports = vec![report];
    let command = Command::ReportPartitions(ReportPartitions { session, reports });
    let (outcome, _) = apply(state, command);
    assert_eq!(outcome, Outcome::Reported(vec![ReportOutcome::Accepted]));
}

/// Three brokers, a topic on all of them (group 1) that the first one leads, one on the first (group
/// 2), and a gateway.
fn cluster() -> State {
    let mut state = State::default();
    for broker_id in 1..=3 {
        register(&mut state, broker_id, None);
    }
    create(&mut state, 1, &[1, 2, 3]);
    create(&mut state, 2, &[1]);
    lead(&mut state);
    let gateway = Gateway {
        gateway_id: "g".to_owned(),
        incarnation_id: Uuid::nil(),
        rack: None,
        endpoints: Vec::new(),
    };
    apply(&mut state, Command::RegisterGateway { gateway });
    apply(&mut state, Command::AllocateProducerIds { count: 1000 });
    state
}

/// As `chronik-controller restore` leaves it, begun with by a leader.
fn restored(backup: &State, floor: u64) -> State {
    let mut dump = StateDump::from(backup);
    dump.pending_restore = Some(PendingRestore {
        backup_id: Uuid::nil(),
        backup_revision: dump.revision,
    });
    let mut state = State::from(dump);
    let (outcome, change) = apply(&mut state, Command::BeginAfterRestore { floor });
    assert_eq!((outcome, change.is_some()), (Outcome::Done, true));
    state
}

fn replicas(state: &State, topic: u128) -> Vec<(i32, u64)> {
    let topic = state.image.topic(TopicId(Uuid::from_u128(topic))).unwrap();
    let partition = &topic.partitions[0];
    let pair = |replica: &ReplicaId| (replica.broker_id.0, replica.incarnation);
    partition.replicas.iter().map(pair).collect()
}

#[test]
fn no_number_is_given_out_twice() {
    let backup = cluster();
    let backup_revision = backup.image.revision;
    // What went on after the backup.
    let mut lost = backup.clone();
    create(&mut lost, 3, &[1]);
    apply(&mut lost, Command::AllocateProducerIds { count: 1000 });

    let mut state = restored(&backup, FLOOR);
    assert_eq!(state.image.revision, FLOOR);
    let expected = Restore {
        backup_revision,
        revision: FLOOR,
    };
    assert_eq!(state.image.restores, [expected]);
    assert!(state.image.is_forgotten(lost.image.revision));
    assert!(!state.image.is_forgotten(backup_revision) && !state.image.is_forgotten(FLOOR));
    create(&mut state, 4, &[1]);
    let topic = state.image.topic(TopicId(Uuid::from_u128(4))).unwrap();
    assert!(topic.partitions[0].raft_group_id.0 >= FLOOR);
    assert!(topic.partitions[0].replicas[0].incarnation > FLOOR);
    let (ids, _) = apply(&mut state, Command::AllocateProducerIds { count: 1 });
    assert_eq!(ids, Outcome::ProducerIds(FLOOR.cast_signed()));
    // Once only.
    let before = state.image.revision;
    apply(&mut state, Command::BeginAfterRestore { floor: FLOOR * 2 });
    assert_eq!(state.image.revision, before);
    // A clock that went back does no harm.
    let again = restored(&state, 5);
    assert!(again.image.revision > state.image.revision + (1 << 31));
    assert_eq!(again.image.restores.len(), 2);
    // And the state survives being written and read.
    let dump = StateDump::from(&again);
    assert_eq!(StateDump::from(&State::from(dump.clone())), dump);
}

#[test]
fn sessions_and_leaders_are_found_anew() {
    let backup = cluster();
    let state = restored(&backup, FLOOR);
    let image = &state.image;
    assert!(image.brokers.values().all(|broker| broker.fenced));
    assert!(image.gateways.is_empty());
    let led = &backup.image.topics[&TopicId(Uuid::from_u128(1))].partitions[0];
    assert_eq!((led.leader, led.isr.len()), (Some(BrokerId(1)), 3));
    for (id, topic) in &image.topics {
        let (now, before) = (&topic.partitions[0], &backup.image.topics[id].partitions[0]);
        assert_eq!((now.leader, &now.replicas), (None, &before.replicas));
        assert_eq!(now.isr.len(), 1);
        assert!(now.partition_epoch.0 > before.partition_epoch.0 + 1_000_000);
    }
}

#[test]
fn brokers_say_what_they_hold() {
    let backup = cluster();
    let mut state = restored(&backup, FLOOR);
    let first = replicas(&state, 1)[0].1;
    // The same replica, and no log of the only replica of topic 2.
    register(&mut state, 1, Some(&[(1, first)]));
    // One that was replaced after the backup.
    register(&mut state, 2, Some(&[(1, first + 50)]));
    // None: it was moved away after the backup.
    register(&mut state, 3, Some(&[]));
    let now = replicas(&state, 1);
    assert_eq!(now[..2], [(1, first), (2, first + 50)]);
    assert!(now[2].1 > FLOOR, "a new replica, which the others fill");
    assert_eq!(
        replicas(&state, 2),
        replicas(&backup, 2),
        "it must not begin empty"
    );
    // What it says later is what the controllers told it.
    register(&mut state, 3, Some(&[]));
    assert_eq!(replicas(&state, 1), now);
}
