//! Who leads a partition and who is in sync: by reports, after a fencing, and by wish.

use super::*;
use crate::command::WantedLeader;

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
