//! Who leads, what becomes of the records when that changes, and leases.

use chronik_types::id::BrokerId;

use super::*;

#[tokio::test]
async fn a_follower_refuses_with_a_hint() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.wait_for_leadership(1, |l| l.leader.is_some()).await;
    let refused = cluster
        .produce(1, value("a"), Acks::All, LIMIT)
        .await
        .unwrap_err();
    let AppendError::NotLeader { leader: Some(hint) } = refused else {
        panic!("{refused}")
    };
    assert_eq!(hint.broker_id, BrokerId(1));
    let refused = cluster.replica(1).read(fetch(0)).await.unwrap_err();
    assert!(
        matches!(refused, ReadError::NotLeader { leader: Some(h) } if h == hint),
        "{refused}"
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn what_was_decided_under_one_leadership_is_not_appended_under_the_next() {
    let mut cluster = Cluster::start(3, 2).await;
    let epoch = cluster.replica(0).leadership().borrow().leader_epoch;
    let records = || Bytes::from(value("decision"));
    let appended = cluster.replica(0).append_internal(epoch, records()).await;
    assert_eq!(appended, Ok(Offset(0)));
    cluster.wait_for_followers(0).await;
    cluster.elect(1).await;
    cluster.wait_for_leadership(0, |l| !l.is_leader).await;
    cluster.wait_for_followers(1).await;
    cluster.elect(0).await;
    let now = cluster.replica(0).leadership().borrow().leader_epoch;
    assert!(now > epoch);
    let refused = cluster.replica(0).append_internal(epoch, records()).await;
    assert!(
        matches!(refused, Err(AppendError::NotLeader { .. })),
        "{refused:?}"
    );
    let appended = cluster.replica(0).append_internal(now, records()).await;
    assert_eq!(appended, Ok(Offset(1)));
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_new_leader_goes_on_where_the_old_one_was_cut_off() {
    let mut cluster = Cluster::start(3, 2).await;
    assert_eq!(cluster.ack(0, value("a")).await, 0);
    // A majority has it; the next leader must be among them.
    cluster.wait_for_followers(0).await;
    cluster.router.cut(cluster.nodes[0].id);
    // The old leader takes it, and cannot commit it.
    let lost = cluster.produce(0, value("lost"), Acks::All, SHORT).await;
    assert_eq!(lost, Err(AppendError::TimedOut));
    cluster.elect(1).await;
    assert_eq!(cluster.ack(1, value("b")).await, 1);
    cluster.router.heal();
    cluster
        .replica(1)
        .raft()
        .unwrap()
        .trigger()
        .heartbeat()
        .await
        .unwrap();
    cluster.wait_for_watermark(0, 2).await;
    let expected = contents(&cluster.read_all(1).await);
    assert_eq!(contents(&cluster.read_all(0).await), expected);
    let epochs: Vec<i32> = expected.iter().map(|c| c.1).collect();
    assert!(epochs[0] < epochs[1], "{epochs:?}");

    // A client that read "a" in the first epoch finds out where that ended.
    let end = cluster
        .replica(1)
        .epoch_end_offset(LeaderEpoch(-1), LeaderEpoch(epochs[0]))
        .unwrap();
    assert_eq!(end.unwrap().end_offset, Offset(1));
    let request = ReadRequest {
        last_fetched_epoch: LeaderEpoch(epochs[0]),
        ..fetch(2)
    };
    let diverging = cluster
        .replica(1)
        .read(request)
        .await
        .unwrap()
        .diverging
        .unwrap();
    assert_eq!(diverging.end_offset, Offset(1));
    let request = ReadRequest {
        current_leader_epoch: LeaderEpoch(epochs[0]),
        ..fetch(0)
    };
    let fenced = cluster.replica(1).read(request).await;
    assert!(
        matches!(fenced, Err(ReadError::FencedLeaderEpoch { .. })),
        "{fenced:?}"
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_resting_leader_renews_its_lease_and_writes() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    // Nothing in the group moves, since ticks are off.
    cluster.wait_for_lease_end(0).await;
    assert_eq!(cluster.ack(0, value("b")).await, 1);
    cluster.stop_all().await;
}
