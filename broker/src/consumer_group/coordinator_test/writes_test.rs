//! Commits, leaves and expiry on their way to the log: what was answered as done is in the log, and
//! what had an unknown outcome shows once the log has it.

use tokio::task::JoinSet;

use super::*;
use crate::consumer_group::memory_log::Fault;

#[tokio::test]
async fn a_commit_whose_outcome_was_unknown_shows_when_the_log_has_it() {
    let broker = Broker::leading(config()).await;
    let coordinator = broker.get();
    commit_one(&coordinator, 1).await.unwrap();
    broker.log.fail_next(Fault::UnknownAppended);
    let other = vec![commit("other", 0, 2)];
    let outcome = within(coordinator.commit("g", &outside(), other, None))
        .await
        .unwrap();
    assert_eq!(outcome, vec![Err(GroupError::TimedOut)]);
    broker.log.fail_next(Fault::UnknownLost);
    assert_eq!(commit_one(&coordinator, 3).await, Err(GroupError::TimedOut));
    broker.log.fail_next(Fault::Refused);
    assert_eq!(commit_one(&coordinator, 4).await, Err(GroupError::TimedOut));
    assert_eq!(committed(&coordinator, "g"), vec![("t".to_owned(), 0, 1)]);

    commit_one(&coordinator, 5).await.unwrap();
    let now = committed(&coordinator, "g");
    assert_eq!(
        now,
        vec![("other".to_owned(), 0, 2), ("t".to_owned(), 0, 5)]
    );
    let next = broker.fail_over(2).await;
    assert_eq!(committed(&next.get(), "g"), now);
}

#[tokio::test]
async fn an_append_without_end_is_an_unknown_outcome_and_the_queue_is_bounded() {
    let config = GroupConfig {
        write_timeout_ms: 100,
        write_queue_max_bytes: 2_000,
        ..config()
    };
    let broker = Broker::leading(config).await;
    let coordinator = broker.get();
    broker.log.hold_appends();
    let mut clients = JoinSet::new();
    for n in 0..100 {
        let coordinator = coordinator.clone();
        clients.spawn(async move {
            let commits = vec![Commit {
                metadata: "x".repeat(100),
                ..commit("t", n, 1)
            }];
            coordinator.commit("g", &outside(), commits, None).await
        });
    }
    let outcomes = within(clients.join_all()).await;
    let refused = outcomes
        .iter()
        .filter(|o| **o == Err(GroupError::TimedOut))
        .count();
    let timed_out = outcomes
        .iter()
        .filter(|o| **o == Ok(vec![Err(GroupError::TimedOut)]))
        .count();
    assert_eq!(refused + timed_out, 100);
    assert!(
        refused >= 50 && timed_out >= 1,
        "{refused} refused, {timed_out} timed out"
    );
    broker.log.release_appends();
    commit_one(&coordinator, 2).await.unwrap();
}

#[tokio::test]
async fn a_dropped_call_leaves_a_member_that_times_out() {
    let broker = Broker::leading(config()).await;
    let coordinator = broker.get();
    let short = Join {
        session_timeout: Duration::from_millis(60),
        ..join("", "a")
    };
    let joined = within(coordinator.join("g", short.clone())).await.unwrap();
    // The sync's caller goes away while the log is slow.
    broker.log.hold_appends();
    let sync = Sync {
        generation: joined.generation,
        member_id: joined.member_id,
        assignments: vec![("a".to_owned(), Bytes::from_static(b"p0"))],
        ..Sync::default()
    };
    let call = tokio::time::timeout(Duration::from_millis(20), coordinator.sync("g", sync)).await;
    assert!(call.is_err());
    broker.log.release_appends();
    until("the group is empty", || {
        coordinator.describe("g").is_ok_and(|g| g.state == "Empty")
    })
    .await;
    let next = broker.fail_over(2).await;
    until("the next leader has it empty", || {
        next.get().describe("g").is_ok_and(|g| g.state == "Empty")
    })
    .await;
}

#[tokio::test]
async fn the_last_leave_is_in_the_log_before_its_answer() {
    let broker = Broker::leading(config()).await;
    let (joined, _) = within(member(broker.get(), "a".to_owned())).await;
    let leaving = [
        (joined.member_id.clone(), None),
        ("nobody".to_owned(), None),
    ];
    let outcomes = within(broker.get().leave("g", &leaving)).await.unwrap();
    assert_eq!(outcomes, vec![Ok(()), Err(GroupError::UnknownMember)]);
    let next = broker.fail_over(2).await;
    let group = next.get().describe("g").unwrap();
    assert_eq!((group.state, group.members.len()), ("Empty", 0));
}

#[tokio::test]
async fn old_offsets_and_empty_groups_expire_from_memory_and_log() {
    let config = GroupConfig {
        offsets_retention_seconds: 1,
        offsets_retention_check_interval_ms: 20,
        ..config()
    };
    let broker = Broker::leading(config).await;
    let coordinator = broker.get();
    let (joined, _) = within(member(coordinator.clone(), "a".to_owned())).await;
    let who = Membership {
        generation: joined.generation,
        member_id: joined.member_id.clone(),
        group_instance_id: None,
    };
    within(coordinator.commit("g", &who, vec![commit("t", 0, 1)], None))
        .await
        .unwrap();
    for (group, retention_ms) in [("aged", None), ("simple", Some(60_000))] {
        let commits = vec![commit("t", 0, 1)];
        within(coordinator.commit(group, &outside(), commits, retention_ms))
            .await
            .unwrap();
    }
    // A group in use keeps its offsets while younger ones expire.
    until("the aged group expires", || {
        coordinator.describe("aged") == Err(GroupError::UnknownGroup)
    })
    .await;
    assert_eq!(committed(&coordinator, "g").len(), 1);
    within(coordinator.leave("g", &[(joined.member_id, None)]))
        .await
        .unwrap();
    until("the empty group expires", || {
        coordinator.describe("g") == Err(GroupError::UnknownGroup)
    })
    .await;
    assert_eq!(committed(&coordinator, "g"), vec![]);
    let next = broker.fail_over(2).await;
    let listed = next.get().list().unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(
        committed(&next.get(), "simple"),
        vec![("t".to_owned(), 0, 1)]
    );
}

#[tokio::test]
async fn offsets_of_a_removed_topic_go_and_those_of_its_namesake_stay() {
    let broker = Broker::leading(config()).await;
    let coordinator = broker.get();
    let with_id = |partition, id| Commit {
        topic_id: Uuid::from_u128(id),
        ..commit("t", partition, 1)
    };
    let commits = vec![
        commit("t", 0, 1),
        with_id(1, 11),
        with_id(2, 22),
        commit("u", 0, 1),
    ];
    within(coordinator.commit("g", &outside(), commits, None))
        .await
        .unwrap();
    broker
        .coordinators
        .topics_removed(&[(Uuid::from_u128(11), "t".into())]);
    until("two offsets are left", || {
        committed(&coordinator, "g").len() == 2
    })
    .await;
    let left = vec![("t".to_owned(), 2, 1), ("u".to_owned(), 0, 1)];
    assert_eq!(committed(&coordinator, "g"), left);
    let next = broker.fail_over(2).await;
    assert_eq!(committed(&next.get(), "g"), left);
}

#[tokio::test]
async fn a_large_commit_goes_in_several_batches_below_the_size_limit() {
    let broker = Broker::leading(config()).await;
    let commits: Vec<_> = (0..2_000)
        .map(|n| Commit {
            metadata: "x".repeat(900),
            ..commit("topic", n, i64::from(n))
        })
        .collect();
    let outcomes = within(broker.get().commit("g", &outside(), commits, None))
        .await
        .unwrap();
    assert!(outcomes.iter().all(Result::is_ok));
    let batches = broker.log.batches();
    assert!(batches.len() >= 2 && batches.iter().all(|batch| batch.len() < 1_048_588));
    let next = broker.fail_over(2).await;
    assert_eq!(committed(&next.get(), "g").len(), 2_000);
}
