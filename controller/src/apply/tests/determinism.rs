//! Any commands in any order: every controller comes to the same state, and its invariants hold.

use chronik_types::cluster_image::{Broker, ClusterImage, ClusterSettings, Drain, Gateway};
use chronik_types::epoch::BrokerEpoch;
use proptest::prelude::*;

use super::*;
use crate::command::{GatewaySession, WantedLeader};
use crate::state::StateDump;

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

fn session_of(broker: &Broker) -> BrokerSession {
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
