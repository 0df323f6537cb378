//! The state machine's rules, and that it is deterministic.

use std::collections::BTreeMap;

use chronik_types::cluster_image::{ClusterImage, Gateway, Partition};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, RaftGroupId, TopicId};
use proptest::prelude::*;
use uuid::Uuid;

use super::apply;
use crate::command::{
    BrokerSession, Command, GatewaySession, Outcome, PartitionReport, PartitionsPlan,
    RegisterBroker, ReportOutcome, ReportPartitions, SetTopicConfigs, TopicPlan, TopicRefusal,
};
use crate::state::{State, StateDump};

fn register(state: &mut State, broker_id: i32, incarnation: u128, storage: u128) -> Outcome {
    let command = Command::RegisterBroker(RegisterBroker {
        broker_id: BrokerId(broker_id),
        incarnation_id: Uuid::from_u128(incarnation),
        rpc_address: format!("b{broker_id}:1"),
        rack: None,
        storage_id: Uuid::from_u128(storage),
    });
    apply(state, command).0
}

fn topic_id(id: u128) -> TopicId {
    TopicId(Uuid::from_u128(id))
}

fn create(state: &mut State, id: u128, name: &str, assignments: &[&[i32]]) -> Outcome {
    let assignments = assignments
        .iter()
        .map(|ids| ids.iter().copied().map(BrokerId).collect())
        .collect();
    let plan = TopicPlan {
        topic_id: topic_id(id),
        name: name.to_owned(),
        configs: BTreeMap::new(),
        assignments,
    };
    apply(state, Command::CreateTopics { topics: vec![plan] }).0
}

fn session(state: &State, broker_id: i32) -> BrokerSession {
    let broker = &state.image.brokers[&BrokerId(broker_id)];
    BrokerSession {
        broker_id: broker.broker_id,
        broker_epoch: broker.broker_epoch,
    }
}

fn report(
    state: &mut State,
    reporter: i32,
    leader_epoch: i32,
    partition_epoch: PartitionEpoch,
    caught_up: &[i32],
) -> Outcome {
    let session = session(state, reporter);
    let reports = vec![PartitionReport {
        raft_group_id: RaftGroupId(1),
        leader_epoch: LeaderEpoch(leader_epoch),
        partition_epoch,
        caught_up: caught_up.iter().copied().map(BrokerId).collect(),
    }];
    apply(
        state,
        Command::ReportPartitions(ReportPartitions { session, reports }),
    )
    .0
}

fn partition(state: &State) -> Partition {
    state.image.topic(topic_id(1)).unwrap().partitions[0].clone()
}

fn isr(state: &State) -> Vec<i32> {
    partition(state).isr.iter().map(|id| id.0).collect()
}

/// Brokers 1 to 3 and a topic of one partition with group 1 on all of them.
fn three_brokers() -> State {
    let mut state = State::default();
    for id in 1..=3_u8 {
        register(
            &mut state,
            i32::from(id),
            u128::from(id),
            u128::from(id) + 100,
        );
    }
    assert_eq!(
        create(&mut state, 1, "t", &[&[1, 2, 3]]),
        Outcome::Topics(vec![Ok(topic_id(1))])
    );
    state
}

fn accepted() -> Outcome {
    Outcome::Reported(vec![ReportOutcome::Accepted])
}

#[test]
fn a_new_topic_has_fresh_groups_and_incarnations_and_no_leader() {
    let mut state = three_brokers();
    let first = partition(&state);
    assert_eq!(first.replicas[0].incarnation, state.image.revision);
    assert_eq!((first.leader, isr(&state)), (None, vec![1, 2, 3]));
    apply(
        &mut state,
        Command::DeleteTopics {
            topic_ids: vec![topic_id(1)],
        },
    );
    assert!(state.groups.is_empty());
    create(&mut state, 2, "t", &[&[1, 2, 3]]);
    let second = &state.image.topic_by_name("t").unwrap().partitions[0];
    assert_eq!(
        second.raft_group_id,
        RaftGroupId(2),
        "group ids are never used again"
    );
    assert!(second.replicas[0].incarnation > first.replicas[0].incarnation);
}

#[test]
fn names_that_exist_or_collide_are_refused() {
    let mut state = three_brokers();
    let refused = |refusal| Outcome::Topics(vec![Err(refusal)]);
    assert_eq!(
        create(&mut state, 2, "t", &[&[1]]),
        refused(TopicRefusal::NameExists)
    );
    create(&mut state, 3, "a.b", &[&[1]]);
    let collision = TopicRefusal::NameCollides("a.b".to_owned());
    assert_eq!(create(&mut state, 4, "a_b", &[&[1]]), refused(collision));
    let unknown = TopicRefusal::UnknownBroker(BrokerId(9));
    assert_eq!(create(&mut state, 5, "c", &[&[1, 9]]), refused(unknown));
}

#[test]
fn leadership_needs_a_current_leader_epoch_and_isr_the_partition_epoch() {
    let mut state = three_brokers();
    let epoch = partition(&state).partition_epoch;
    assert_eq!(report(&mut state, 1, 1, epoch, &[1, 2, 3]), accepted());
    assert_eq!(partition(&state).leader, Some(BrokerId(1)));
    let led = partition(&state).partition_epoch;
    assert!(led > epoch);

    let stale = Outcome::Reported(vec![ReportOutcome::StalePartitionEpoch]);
    assert_eq!(report(&mut state, 1, 1, epoch, &[1]), stale);
    assert_eq!(isr(&state), [1, 2, 3]);
    assert_eq!(report(&mut state, 1, 1, led, &[1, 3]), accepted());
    assert_eq!(isr(&state), [1, 3]);

    let old_leader = Outcome::Reported(vec![ReportOutcome::StaleLeaderEpoch]);
    assert_eq!(report(&mut state, 2, 0, led, &[2]), old_leader);
    assert_eq!(
        report(&mut state, 2, 1, led, &[2]),
        old_leader,
        "one leader per epoch"
    );
    // A new leader is taken at any partition epoch and joins the ISR.
    assert_eq!(report(&mut state, 2, 2, epoch, &[1, 2, 3]), accepted());
    assert_eq!(
        (partition(&state).leader, isr(&state)),
        (Some(BrokerId(2)), vec![1, 3, 2])
    );
    // The same again changes nothing and takes no revision.
    let (before, current) = (state.image.revision, partition(&state).partition_epoch);
    assert_eq!(report(&mut state, 2, 2, current, &[1, 2, 3]), accepted());
    assert_eq!(isr(&state), [1, 2, 3]);
    let after = state.image.revision;
    let current = partition(&state).partition_epoch;
    assert_eq!(report(&mut state, 2, 2, current, &[1, 2, 3]), accepted());
    assert_eq!((after, state.image.revision), (before + 1, after));
}

#[test]
fn a_fenced_broker_loses_leadership_and_isr_but_not_the_last_place() {
    let mut state = three_brokers();
    let epoch = partition(&state).partition_epoch;
    report(&mut state, 1, 1, epoch, &[1, 2, 3]);
    let first = session(&state, 1);
    apply(
        &mut state,
        Command::FenceBrokers {
            brokers: vec![first],
        },
    );
    assert_eq!((partition(&state).leader, isr(&state)), (None, vec![2, 3]));
    assert!(state.image.brokers[&BrokerId(1)].fenced);
    let reports = Vec::new();
    let command = Command::ReportPartitions(ReportPartitions {
        session: first,
        reports,
    });
    assert_eq!(apply(&mut state, command), (Outcome::Fenced, None));
    let rest = vec![session(&state, 2), session(&state, 3)];
    apply(&mut state, Command::FenceBrokers { brokers: rest });
    assert_eq!(isr(&state).len(), 1);
    // An old session's end means nothing to the next one.
    register(&mut state, 1, 50, 101);
    let revision = state.image.revision;
    apply(
        &mut state,
        Command::FenceBrokers {
            brokers: vec![first],
        },
    );
    assert_eq!(state.image.revision, revision);
    assert!(!state.image.brokers[&BrokerId(1)].fenced);
}

#[test]
fn a_broker_id_belongs_to_one_data_folder_at_a_time() {
    let mut state = three_brokers();
    let epoch = |state: &State| state.image.brokers[&BrokerId(1)].broker_epoch;
    let first = epoch(&state);
    assert_eq!(
        register(&mut state, 1, 1, 101),
        Outcome::BrokerRegistered(first)
    );
    assert_eq!(register(&mut state, 1, 77, 999), Outcome::BrokerIdInUse);
    // Restarted on the same folder: a new session at once.
    let before = partition(&state).replicas.clone();
    assert!(matches!(
        register(&mut state, 1, 78, 101),
        Outcome::BrokerRegistered(_)
    ));
    assert!(epoch(&state) > first);
    assert_eq!(partition(&state).replicas, before);
    // Fenced, and back with another disk: its replicas are new ones.
    let session = session(&state, 1);
    apply(
        &mut state,
        Command::FenceBrokers {
            brokers: vec![session],
        },
    );
    assert_eq!(
        register(&mut state, 1, 79, 999),
        Outcome::BrokerRegistered(BrokerEpoch(state.image.revision))
    );
    let replicas = partition(&state).replicas;
    assert_eq!(replicas[0].incarnation, state.image.revision);
    assert_eq!(replicas[1..], before[1..]);
    assert_eq!(isr(&state), [2, 3]);
}

#[test]
fn configs_and_partitions_change_only_what_was_looked_at() {
    let mut state = three_brokers();
    let configs: BTreeMap<_, _> = [("retention.ms".to_owned(), "1".to_owned())].into();
    let set = |expected: &BTreeMap<String, String>| {
        Command::SetTopicConfigs(SetTopicConfigs {
            topic_id: topic_id(1),
            expected: expected.clone(),
            configs: configs.clone(),
        })
    };
    apply(&mut state, set(&BTreeMap::new()));
    assert_eq!(state.image.topic_by_name("t").unwrap().configs, configs);
    let changed = Outcome::Topics(vec![Err(TopicRefusal::Changed)]);
    assert_eq!(
        apply(&mut state, set(&BTreeMap::new())),
        (changed.clone(), None)
    );
    let grow = || Command::CreatePartitions {
        topics: vec![PartitionsPlan {
            topic_id: topic_id(1),
            present_count: 1,
            assignments: vec![vec![BrokerId(2)]; 2],
        }],
    };
    apply(&mut state, grow());
    assert_eq!(state.image.topic_by_name("t").unwrap().partitions.len(), 3);
    assert_eq!(apply(&mut state, grow()), (changed, None));
}

fn any_command() -> impl Strategy<Value = Command> {
    let broker = 0..4_i32;
    let id = 0..6_u128;
    prop_oneof![
        (broker.clone(), id.clone(), 0..2_u128).prop_map(|(broker, incarnation, storage)| {
            Command::RegisterBroker(RegisterBroker {
                broker_id: BrokerId(broker),
                incarnation_id: Uuid::from_u128(incarnation),
                rpc_address: "a:1".to_owned(),
                rack: None,
                storage_id: Uuid::from_u128(storage),
            })
        }),
        (broker.clone(), 0..40_u64).prop_map(|(broker, epoch)| Command::FenceBrokers {
            brokers: vec![BrokerSession {
                broker_id: BrokerId(broker),
                broker_epoch: BrokerEpoch(epoch),
            }],
        }),
        (id.clone(), proptest::collection::vec(0..4_i32, 1..4)).prop_map(|(id, mut brokers)| {
            brokers.sort_unstable();
            brokers.dedup();
            Command::CreateTopics {
                topics: vec![TopicPlan {
                    topic_id: topic_id(id),
                    name: format!("t{id}"),
                    configs: BTreeMap::new(),
                    assignments: vec![brokers.into_iter().map(BrokerId).collect(); 2],
                }],
            }
        }),
        id.clone().prop_map(|id| Command::DeleteTopics {
            topic_ids: vec![topic_id(id)]
        }),
        (
            broker,
            0..40_u64,
            1..9_u64,
            0..5_i32,
            0..9_i32,
            any::<[bool; 4]>()
        )
            .prop_map(
                |(broker, epoch, group, leader_epoch, partition_epoch, caught_up)| {
                    Command::ReportPartitions(ReportPartitions {
                        session: BrokerSession {
                            broker_id: BrokerId(broker),
                            broker_epoch: BrokerEpoch(epoch),
                        },
                        reports: vec![PartitionReport {
                            raft_group_id: RaftGroupId(group),
                            leader_epoch: LeaderEpoch(leader_epoch),
                            partition_epoch: PartitionEpoch(partition_epoch),
                            caught_up: (0..4)
                                .map(BrokerId)
                                .filter(|id| caught_up[usize::try_from(id.0).unwrap()])
                                .collect(),
                        }],
                    })
                }
            ),
        id.prop_map(|id| Command::RegisterGateway {
            gateway: Gateway {
                gateway_id: format!("g{}", id % 2),
                incarnation_id: Uuid::from_u128(id),
                rack: None,
                endpoints: Vec::new(),
            },
        }),
        (0..2_u8, 0..6_u128).prop_map(|(gateway, id)| Command::RemoveGateways {
            gateways: vec![GatewaySession {
                gateway_id: format!("g{gateway}"),
                incarnation_id: Uuid::from_u128(id),
            }],
        }),
    ]
}

/// Reports name the sessions that there are now and then, so that they get past the first check.
fn with_current_epoch(state: &State, command: Command) -> Command {
    let current = |session: BrokerSession| match state.image.brokers.get(&session.broker_id) {
        Some(broker) if session.broker_epoch.0.is_multiple_of(4) => session_of(broker),
        _ => session,
    };
    match command {
        Command::ReportPartitions(ReportPartitions { session, reports }) => {
            Command::ReportPartitions(ReportPartitions {
                session: current(session),
                reports,
            })
        }
        Command::FenceBrokers { brokers } => Command::FenceBrokers {
            brokers: brokers.into_iter().map(current).collect(),
        },
        other => other,
    }
}

fn session_of(broker: &chronik_types::cluster_image::Broker) -> BrokerSession {
    BrokerSession {
        broker_id: broker.broker_id,
        broker_epoch: broker.broker_epoch,
    }
}

fn check_invariants(state: &State) {
    let image = &state.image;
    let fenced = |id: &BrokerId| image.brokers[id].fenced;
    let mut partition_count = 0;
    for topic in image.topics.values() {
        for partition in &topic.partitions {
            partition_count += 1;
            let key = (topic.topic_id, partition.partition);
            assert_eq!(state.groups.get(&partition.raft_group_id), Some(&key));
            assert!(partition.raft_group_id.0 < state.next_raft_group_id);
            assert!(!partition.isr.is_empty());
            assert!(
                partition
                    .isr
                    .iter()
                    .all(|id| partition.replica_on(*id).is_some())
            );
            if let Some(leader) = partition.leader {
                assert!(!fenced(&leader), "a fenced broker leads");
                assert!(partition.isr.contains(&leader));
            }
        }
    }
    assert_eq!(partition_count, state.groups.len());
}

proptest! {
    #[test]
    fn equal_commands_give_equal_states_changes_and_answers(
        commands in proptest::collection::vec(any_command(), 1..60),
    ) {
        let (mut one, mut other) = (State::default(), State::default());
        let mut watched = ClusterImage::default();
        for command in commands {
            let command = with_current_epoch(&one, command);
            // The other controller decodes it from the log, and is restarted now and then.
            let json = serde_json::to_string(&command).unwrap();
            let decoded: Command = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(&decoded, &command);
            let (outcome, change) = apply(&mut one, command);
            let (other_outcome, other_change) = apply(&mut other, decoded);
            prop_assert_eq!(outcome, other_outcome);
            prop_assert_eq!(&change, &other_change);
            if let Some(change) = change {
                prop_assert_eq!(change.revision, watched.revision + 1);
                watched.apply(change);
            }
            let dump = StateDump::from(&other);
            let json = serde_json::to_string(&dump).unwrap();
            other = State::from(serde_json::from_str::<StateDump>(&json).unwrap());
            prop_assert_eq!(StateDump::from(&one), StateDump::from(&other));
            prop_assert_eq!(&watched, &*one.image, "a watcher of changes sees the same image");
            check_invariants(&one);
        }
    }
}
