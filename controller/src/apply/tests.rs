//! The state machine's rules, a file for each topic; here is what their tests share.

mod brokers;
mod determinism;
mod leadership;
mod moves;
mod topics;

use std::collections::BTreeMap;

use chronik_types::cluster_image::{Partition, ReassignmentCause};
use chronik_types::epoch::{LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, TopicId};
use uuid::Uuid;

use super::apply;
use crate::command::{
    BrokerSession, Command, Outcome, PartitionAt, PartitionReport, ReassignmentChange,
    RegisterBroker, ReportOutcome, ReportPartitions, TopicPlan,
};
use crate::state::State;

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

/// As `three_brokers`, led by 1 and with brokers 4 and 5 besides.
fn five_brokers() -> State {
    let mut state = three_brokers();
    register(&mut state, 4, 4, 104);
    register(&mut state, 5, 5, 105);
    let epoch = partition(&state).partition_epoch;
    assert_eq!(report(&mut state, 1, 1, epoch, &[1, 2, 3]), accepted());
    state
}
