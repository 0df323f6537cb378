//! Who has a broker id: one data folder at a time, and until it is unregistered; a drain stays.

use chronik_types::cluster_image::Drain;
use chronik_types::epoch::BrokerEpoch;

use super::*;
use crate::command::BrokerRefusal;

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
