//! Log start, purge and copies of logs, tried on three replicas in one process.

use std::time::Duration;

use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use tokio::time::Instant;

use super::test_batches::{idempotent, value};
use super::test_cluster::{Cluster, LIMIT, copy_log};
use super::{AppendError, LogStartError, ReadError, log_store};
use crate::test_wait::{until, wait_for};

async fn raise(cluster: &Cluster, n: usize, to: Option<i64>) -> Result<i64, LogStartError> {
    let deadline = Instant::now() + LIMIT;
    let raised = cluster
        .replica(n)
        .raise_log_start(to.map(Offset), deadline)
        .await;
    raised.map(|offset| offset.0)
}

async fn wait_for_log_start(cluster: &Cluster, n: usize, offset: i64) {
    let replica = cluster.replica(n).clone();
    until("the log start moves", || {
        replica.log_start_offset() == Offset(offset)
    })
    .await;
}

async fn purge_all(cluster: &Cluster, n: usize) -> u64 {
    let replica = cluster.replica(n).clone();
    let index = replica.state.applied_index().unwrap();
    replica.purge(index).await.unwrap();
    until("the log is purged", || {
        log_store::purged(replica.log()).is_some_and(|purged| purged.index >= index)
    })
    .await;
    index
}

#[tokio::test]
async fn a_log_start_is_agreed_on_and_survives_a_crash_of_all() {
    let mut cluster = Cluster::start(3, 2).await;
    for n in 0..10 {
        assert_eq!(cluster.ack(0, value("x")).await, n);
    }
    assert_eq!(raise(&cluster, 0, Some(4)).await, Ok(4));
    // Lower is no error and changes nothing.
    assert_eq!(raise(&cluster, 0, Some(2)).await, Ok(4));
    let above = async || match raise(&cluster, 0, Some(11)).await.unwrap_err() {
        // On a busy machine a majority may not answer in time.
        LogStartError::NotProposed(AppendError::NotLeader { leader: None }) => None,
        refusal => Some(refusal),
    };
    let above = wait_for("the leader refuses for good", above).await;
    assert!(matches!(above, LogStartError::OutOfRange { .. }), "{above}");
    assert!(raise(&cluster, 0, Some(-2)).await.is_err());
    let follower = raise(&cluster, 1, Some(5)).await.unwrap_err();
    let not_leader = AppendError::NotLeader {
        leader: cluster.replica(1).leader_hint(),
    };
    assert_eq!(follower, LogStartError::NotProposed(not_leader));
    for n in 0..3 {
        wait_for_log_start(&cluster, n, 4).await;
        let below = cluster
            .replica(n)
            .read_committed_from(Offset(3), 1000)
            .await;
        assert!(matches!(below, Err(ReadError::OffsetOutOfRange { .. })));
        assert_eq!(cluster.read_all(n).await.len(), 6);
    }
    // Of the leader nobody knows what is on its own disk: two others suffice for what is committed.
    cluster.wait_for_followers(0).await;
    for n in 0..3 {
        cluster.crash(n).await;
    }
    for n in 0..3 {
        cluster.open(n).await;
    }
    cluster.elect(1).await;
    for n in 0..3 {
        wait_for_log_start(&cluster, n, 4).await;
    }
    let earliest = cluster.replica(1).list_offset(-2, LeaderEpoch(-1)).await;
    assert_eq!(earliest.unwrap().unwrap().offset, Offset(4));
    // To the high watermark: the log is empty and goes on.
    assert_eq!(raise(&cluster, 1, None).await, Ok(10));
    assert_eq!(cluster.ack(1, value("y")).await, 10);
    assert_eq!(cluster.read_all(1).await.len(), 1);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_log_start_without_a_majority_is_not_told_as_done() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.ack(0, value("a")).await;
    for n in 1..3 {
        cluster.router.cut(cluster.nodes[n].id);
    }
    let deadline = Instant::now() + Duration::from_millis(800);
    let replica = cluster.replica(0).clone();
    let raised = replica.raise_log_start(Some(Offset(1)), deadline).await;
    assert!(raised.is_err());
    assert_eq!(replica.log_start_offset(), Offset(0));
    cluster.router.heal();
    cluster.stop_all().await;
}

#[tokio::test]
async fn old_records_are_read_after_a_purge_and_a_restart() {
    let mut cluster = Cluster::start(3, 2).await;
    for n in 0..20 {
        assert_eq!(cluster.ack(0, value(&"x".repeat(1000))).await, n);
    }
    cluster.wait_for_followers(0).await;
    let expected = cluster.read_all(0).await;
    for n in 0..3 {
        purge_all(&cluster, n).await;
    }
    assert_eq!(cluster.read_all(0).await, expected);
    for n in 0..3 {
        cluster.crash(n).await;
    }
    for n in 0..3 {
        cluster.open(n).await;
    }
    cluster.elect(1).await;
    assert_eq!(cluster.ack(1, value("z")).await, 20);
    for n in 0..3 {
        cluster.wait_for_watermark(n, 21).await;
        assert_eq!(cluster.read_all(n).await[..20], expected[..]);
    }
    cluster.stop_all().await;
}

/// A follower that missed what its leader's Raft has forgotten, back in touch; it takes a copy.
async fn with_a_follower_left_behind() -> Cluster {
    let cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("first")).await;
    cluster.wait_for_followers(0).await;
    cluster.router.cut(cluster.nodes[2].id);
    for n in 0..30 {
        cluster.ack(0, idempotent(9, 0, n, 1)).await;
    }
    assert_eq!(raise(&cluster, 0, Some(1)).await, Ok(1));
    purge_all(&cluster, 0).await;
    cluster
}

#[tokio::test]
async fn a_follower_below_the_purge_point_takes_a_copy_and_follows() {
    let mut cluster = with_a_follower_left_behind().await;
    cluster.router.heal();
    cluster.ack(0, idempotent(9, 0, 30, 1)).await;
    cluster.wait_for_watermark(2, 32).await;
    wait_for_log_start(&cluster, 2, 1).await;
    assert_eq!(cluster.read_all(2).await, cluster.read_all(0).await);
    assert!(log_store::purged(cluster.replica(2).log()).is_some());
    // It knows the producer, so as a leader it tells a retry from a new batch.
    cluster.wait_for_followers(0).await;
    cluster.elect(2).await;
    assert_eq!(cluster.ack(2, idempotent(9, 0, 30, 1)).await, 31);
    assert_eq!(cluster.ack(2, idempotent(9, 0, 31, 1)).await, 32);
    // And it comes back with all that after a crash.
    cluster.wait_for_followers(2).await;
    cluster.crash(2).await;
    cluster.open(2).await;
    cluster.elect(0).await;
    cluster.ack(0, value("last")).await;
    cluster.wait_for_watermark(2, 34).await;
    assert_eq!(cluster.read_all(2).await, cluster.read_all(0).await);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_new_replica_far_behind_takes_a_copy() {
    let mut cluster = with_a_follower_left_behind().await;
    // Its disk is gone; for this test the old id stands for the new one of a replacement.
    cluster.lose_disk(2).await;
    cluster.open(2).await;
    cluster.router.heal();
    cluster.ack(0, value("after")).await;
    cluster.wait_for_watermark(2, 32).await;
    assert_eq!(cluster.read_all(2).await, cluster.read_all(0).await);
    cluster.stop_all().await;
}

#[tokio::test]
async fn power_may_fail_at_any_moment_of_a_copy() {
    // How many moments there are is measured, then each is tried.
    let mut cluster = with_a_follower_left_behind().await;
    let vote = cluster.replica(0).vote();
    let before = cluster.disk_changes(2);
    let storage = cluster.storage(2);
    copy_log(cluster.replica(0), cluster.replica(2), storage, vote)
        .await
        .unwrap();
    let changes = cluster.disk_changes(2) - before;
    assert!(changes > 4, "{changes}");
    cluster.stop_all().await;
    for moment in 0..changes + 2 {
        let mut cluster = with_a_follower_left_behind().await;
        let vote = cluster.replica(0).vote();
        cluster.fail_power_after(2, moment);
        let storage = cluster.storage(2);
        let copied = copy_log(cluster.replica(0), cluster.replica(2), storage, vote).await;
        cluster.crash(2).await;
        cluster.open(2).await;
        let found = cluster.replica(2).log().log_end_offset();
        assert!(
            found == Offset(1) || found == Offset(31),
            "{moment}: {found}"
        );
        assert!(
            copied.is_err() || found == Offset(31),
            "{moment}: {copied:?}"
        );
        cluster.router.heal();
        cluster.ack(0, value("after")).await;
        cluster.wait_for_watermark(2, 32).await;
        assert_eq!(
            cluster.read_all(2).await,
            cluster.read_all(0).await,
            "{moment}"
        );
        cluster.stop_all().await;
    }
}
