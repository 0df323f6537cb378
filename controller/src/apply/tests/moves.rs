//! Moves of a partition to other replicas: how they start, end, and are cancelled.

use chronik_types::id::ReplicaId;

use super::*;
use crate::command::ReassignmentRefusal;

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
