//! The state machine's rules, and that it is deterministic.

use std::collections::BTreeMap;

use chronik_types::cluster_image::{
    ClusterImage, ClusterSettings, Drain, Gateway, Partition, ReassignmentCause,
};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use proptest::prelude::*;
use uuid::Uuid;

use super::apply;
use crate::command::{
    BrokerRefusal, BrokerSession, Command, GatewaySession, Outcome, PartitionAt, PartitionReport,
    PartitionsPlan, ReassignmentChange, ReassignmentRefusal, RegisterBroker, ReportOutcome,
    ReportPartitions, SetTopicConfigs, TopicPlan, TopicRefusal, WantedLeader,
};
use crate::state::{State, StateDump};

fn register(state: &mut State, broker_id: i32, incarnation: u128, storage: u128) -> Outcome {
    let command = Command::RegisterBroker(RegisterBroker {
        broker_id: BrokerId(broker_id),
        incarnation_id: Uuid::from_u128(incarnation),
        rpc_address: format!("b{broker_id}:1"),
        rack: None,
        storage_id: Uuid::from_u128(storage),
        held: None,
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
        voters: Vec::new(),
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

fn move_to(state: &mut State, target: Option<&[i32]>) -> Outcome {
    let target = target.map(|ids| ids.iter().copied().map(BrokerId).collect());
    let change = ReassignmentChange {
        topic_id: topic_id(1),
        partition: PartitionIndex(0),
        target,
        cause: ReassignmentCause::Request,
    };
    let changes = vec![change];
    apply(state, Command::AlterReassignments { changes }).0
}

fn activate(state: &mut State) {
    let now = partition(state);
    let at = PartitionAt {
        topic_id: topic_id(1),
        partition: now.partition,
        partition_epoch: now.partition_epoch,
    };
    let partitions = vec![at];
    apply(state, Command::ActivateReassignments { partitions });
}

fn report_voters(state: &mut State, reporter: i32, caught_up: &[i32], voters: Vec<ReplicaId>) {
    let (session, known) = (session(state, reporter), partition(state));
    let reports = vec![PartitionReport {
        raft_group_id: RaftGroupId(1),
        leader_epoch: known.leader_epoch,
        partition_epoch: known.partition_epoch,
        caught_up: caught_up.iter().copied().map(BrokerId).collect(),
        voters,
    }];
    let command = Command::ReportPartitions(ReportPartitions { session, reports });
    assert_eq!(apply(state, command).0, accepted());
}

fn replicas(state: &State) -> Vec<i32> {
    partition(state).brokers().map(|id| id.0).collect()
}

fn moved() -> Outcome {
    Outcome::Reassigned(vec![Ok(())])
}

/// As `three_brokers`, led by 1 and with brokers 4 and 5 besides.
fn five_brokers() -> State {
    let mut state = three_brokers();
    register(&mut state, 4, 4, 104);
    register(&mut state, 5, 5, 105);
    let epoch = partition(&state).partition_epoch;
    assert_eq!(report(&mut state, 1, 1, epoch, &[1, 2, 3]), accepted());
    state
}

#[test]
fn a_move_waits_runs_and_ends_when_exactly_the_target_votes_and_is_in_sync() {
    let mut state = five_brokers();
    let before = partition(&state);
    assert_eq!(move_to(&mut state, Some(&[4, 1, 5])), moved());
    assert_eq!(
        partition(&state).replicas,
        before.replicas,
        "it waits its turn"
    );
    activate(&mut state);
    let under_way = partition(&state);
    assert_eq!(replicas(&state), [4, 1, 5, 2, 3]);
    assert_eq!(
        under_way.replicas[1], before.replicas[0],
        "who stays is the same"
    );
    assert_eq!(under_way.replicas[0].incarnation, state.image.revision);
    assert_eq!(
        (under_way.adding(), under_way.removing()),
        (
            vec![BrokerId(4), BrokerId(5)],
            vec![BrokerId(2), BrokerId(3)]
        )
    );
    let target = under_way.target_replicas();
    assert_eq!(target, under_way.replicas[..3]);

    // Voters without being in sync, being in sync without the voters, and voters of before.
    report_voters(&mut state, 1, &[1, 2, 3, 4], target.clone());
    assert!(partition(&state).reassignment.is_some());
    report_voters(&mut state, 1, &[1, 2, 3, 4, 5], Vec::new());
    report_voters(&mut state, 1, &[1, 2, 3, 4, 5], before.replicas.clone());
    assert!(partition(&state).reassignment.is_some());
    report_voters(&mut state, 1, &[1, 4, 5], target.clone());
    let done = partition(&state);
    assert_eq!((done.reassignment, done.replicas), (None, target));
    assert_eq!(isr(&state), [4, 1, 5]);
}

#[test]
fn a_late_report_of_voters_does_not_end_a_move_that_was_changed_since() {
    let mut state = five_brokers();
    move_to(&mut state, Some(&[1, 4, 5]));
    activate(&mut state);
    let (early, target) = (partition(&state), partition(&state).target_replicas());
    move_to(&mut state, None);
    move_to(&mut state, Some(&[1, 4, 5]));
    assert_eq!(partition(&state).target_replicas(), target);
    let reports = vec![PartitionReport {
        raft_group_id: RaftGroupId(1),
        leader_epoch: early.leader_epoch,
        partition_epoch: early.partition_epoch,
        caught_up: (1..=5).map(BrokerId).collect(),
        voters: target,
    }];
    let session = session(&state, 1);
    apply(
        &mut state,
        Command::ReportPartitions(ReportPartitions { session, reports }),
    );
    assert!(partition(&state).reassignment.is_some());
}

#[test]
fn a_cancelled_move_goes_back_and_keeps_all_replicas_until_the_voters_are_back() {
    let mut state = five_brokers();
    let before = partition(&state);
    let none = Outcome::Reassigned(vec![Err(ReassignmentRefusal::NoneInProgress)]);
    assert_eq!(move_to(&mut state, None), none);
    // One that waits is forgotten at once.
    move_to(&mut state, Some(&[4, 5]));
    assert_eq!(move_to(&mut state, None), moved());
    assert_eq!(partition(&state).reassignment, None);

    move_to(&mut state, Some(&[4, 5]));
    activate(&mut state);
    assert_eq!(move_to(&mut state, None), moved());
    assert_eq!(replicas(&state), [1, 2, 3, 4, 5]);
    let back = partition(&state);
    assert_eq!(back.target_replicas(), before.replicas);
    assert_eq!(
        (back.adding(), back.removing()),
        (vec![], vec![BrokerId(4), BrokerId(5)])
    );
    report_voters(&mut state, 1, &[1, 2, 3], before.replicas.clone());
    let done = partition(&state);
    assert_eq!((done.reassignment, done.replicas), (None, before.replicas));
}

#[test]
fn a_new_order_of_the_same_replicas_needs_no_move() {
    let mut state = five_brokers();
    assert_eq!(move_to(&mut state, Some(&[3, 1, 2])), moved());
    assert_eq!(replicas(&state), [3, 1, 2]);
    assert_eq!(partition(&state).reassignment, None);
    let refused = |refusal| Outcome::Reassigned(vec![Err(refusal)]);
    assert_eq!(
        move_to(&mut state, Some(&[1, 9])),
        refused(ReassignmentRefusal::UnknownBroker(BrokerId(9)))
    );
    let invalid = refused(ReassignmentRefusal::InvalidTarget);
    assert_eq!(move_to(&mut state, Some(&[])), invalid);
    assert_eq!(move_to(&mut state, Some(&[1, 1])), invalid);
    let mut unled = three_brokers();
    let never = refused(ReassignmentRefusal::NeverLed);
    assert_eq!(move_to(&mut unled, Some(&[1])), never);
}

#[test]
fn a_target_that_died_does_not_hold_a_move_up_and_a_lost_disk_gives_a_new_replica() {
    let mut state = five_brokers();
    move_to(&mut state, Some(&[1, 4, 5]));
    activate(&mut state);
    let target = partition(&state).target_replicas();
    let gone = session(&state, 5);
    apply(
        &mut state,
        Command::FenceBrokers {
            brokers: vec![gone],
        },
    );
    report_voters(&mut state, 1, &[1, 4], target);
    assert_eq!(partition(&state).reassignment, None);
    assert_eq!((replicas(&state), isr(&state)), (vec![1, 4, 5], vec![1, 4]));
    let lost = partition(&state).replicas[2];
    register(&mut state, 5, 55, 999);
    assert!(partition(&state).replicas[2].incarnation > lost.incarnation);
}

#[test]
fn a_wanted_leader_is_in_sync_and_forgotten_once_it_leads_or_cannot() {
    let mut state = five_brokers();
    let want = |state: &mut State, leader: i32| {
        let now = partition(state);
        let at = PartitionAt {
            topic_id: topic_id(1),
            partition: now.partition,
            partition_epoch: now.partition_epoch,
        };
        let leader = Some(BrokerId(leader));
        let leaders = vec![WantedLeader { at, leader }];
        apply(state, Command::SetWantedLeaders { leaders });
        partition(state).wanted_leader
    };
    assert_eq!(want(&mut state, 4), None, "it holds nothing");
    assert_eq!(want(&mut state, 2), Some(BrokerId(2)));
    let epoch = partition(&state).partition_epoch;
    report(&mut state, 2, 2, epoch, &[1, 2, 3]);
    assert_eq!(partition(&state).wanted_leader, None);
    assert_eq!(want(&mut state, 3), Some(BrokerId(3)));
    let gone = session(&state, 3);
    apply(
        &mut state,
        Command::FenceBrokers {
            brokers: vec![gone],
        },
    );
    assert_eq!(partition(&state).wanted_leader, None);
}

#[test]
fn a_broker_is_unregistered_when_fenced_and_empty_and_a_drain_outlives_its_restart() {
    let mut state = five_brokers();
    let unregister = |state: &mut State, id: i32| {
        let broker_id = BrokerId(id);
        match apply(state, Command::UnregisterBroker { broker_id }).0 {
            Outcome::Broker(result) => result,
            other => panic!("{other:?}"),
        }
    };
    let fence = |state: &mut State, id: i32| {
        let brokers = vec![session(state, id)];
        apply(state, Command::FenceBrokers { brokers });
    };
    assert!(matches!(
        unregister(&mut state, 5),
        Err(BrokerRefusal::Active(_))
    ));
    fence(&mut state, 5);
    assert_eq!(unregister(&mut state, 5), Ok(()));
    assert!(!state.image.brokers.contains_key(&BrokerId(5)));
    assert!(matches!(
        unregister(&mut state, 5),
        Err(BrokerRefusal::Unknown(_))
    ));
    fence(&mut state, 3);
    let held = unregister(&mut state, 3);
    assert!(matches!(
        held,
        Err(BrokerRefusal::HoldsReplicas {
            replica_count: 1,
            ..
        })
    ));
    move_to(&mut state, Some(&[1, 2, 4]));
    fence(&mut state, 4);
    assert!(
        unregister(&mut state, 4).is_err(),
        "it is the target of a move"
    );

    let (broker_id, drain) = (BrokerId(2), Drain::Replicas);
    apply(&mut state, Command::SetBrokerDrain { broker_id, drain });
    register(&mut state, 2, 22, 102);
    assert_eq!(state.image.brokers[&broker_id].drain, drain);
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
                held: None,
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
                            voters: Vec::new(),
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
        (
            0..6_u128,
            proptest::option::of(proptest::collection::vec(0..5_i32, 0..4))
        )
            .prop_map(|(id, target)| Command::AlterReassignments {
                changes: vec![ReassignmentChange {
                    topic_id: topic_id(id),
                    partition: PartitionIndex(0),
                    target: target.map(|ids| ids.into_iter().map(BrokerId).collect()),
                    cause: ReassignmentCause::Balance,
                }],
            }),
        (0..6_u128, 0..9_i32).prop_map(|(id, epoch)| Command::ActivateReassignments {
            partitions: vec![any_at(id, epoch)],
        }),
        (0..6_u128, 0..9_i32, 0..4_i32).prop_map(|(id, epoch, leader)| {
            Command::SetWantedLeaders {
                leaders: vec![WantedLeader {
                    at: any_at(id, epoch),
                    leader: Some(BrokerId(leader)),
                }],
            }
        }),
        (0..5_i32, any::<bool>()).prop_map(|(id, all)| Command::SetBrokerDrain {
            broker_id: BrokerId(id),
            drain: if all { Drain::Replicas } else { Drain::Leaders },
        }),
        (0..5_i32).prop_map(|id| Command::UnregisterBroker {
            broker_id: BrokerId(id)
        }),
        (1..4_u32).prop_map(|reassignment_parallel_max| Command::SetClusterSettings {
            settings: ClusterSettings {
                reassignment_parallel_max,
                ..ClusterSettings::default()
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

fn any_at(id: u128, epoch: i32) -> PartitionAt {
    PartitionAt {
        topic_id: topic_id(id),
        partition: PartitionIndex(0),
        partition_epoch: PartitionEpoch(epoch),
    }
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
