//! How many replicas a write needs: a majority, and as many in sync as its acks ask for.

use chronik_types::id::BrokerId;

use super::*;
use crate::test_wait::stays;

#[tokio::test]
async fn without_a_quorum_writes_time_out_and_the_queue_is_bounded() {
    let mut cluster = Cluster::start(3, 1).await;
    assert_eq!(cluster.ack(0, value("a")).await, 0);
    cluster.router.cut(cluster.nodes[0].id);
    // acks=1 asks for the leader's disk only.
    let on_disk = cluster
        .produce(0, value("b"), Acks::Leader, LIMIT)
        .await
        .unwrap();
    assert_eq!(on_disk.base_offset, Offset(1));
    // Not committed, so not visible.
    assert_eq!(cluster.replica(0).high_watermark(), Offset(1));
    assert!(
        cluster
            .replica(0)
            .read(fetch(1))
            .await
            .unwrap()
            .records
            .is_empty()
    );

    let deadline = Instant::now() + SHORT;
    let mut waiting = Vec::new();
    let overloaded = loop {
        assert!(waiting.len() < 100_000, "the queue is not bounded");
        let item = item(value("waits"), Acks::All, deadline);
        match cluster.replica(0).enqueue(item) {
            Ok(future) => waiting.push(future),
            Err(error) => break error,
        }
    };
    assert_eq!(overloaded, AppendError::Overloaded);
    for future in waiting {
        assert_eq!(future.until(deadline).await, Err(AppendError::TimedOut));
    }
    assert!(Instant::now() < deadline + LIMIT);

    // With the quorum back, what was appended is committed; what only waited is not.
    cluster.router.heal();
    let healed = cluster.nodes[1..]
        .iter()
        .map(|node| node.id)
        .collect::<Vec<_>>();
    cluster
        .replica(0)
        .raft()
        .unwrap()
        .trigger()
        .reset_backoff(healed)
        .await
        .unwrap();
    cluster.wait_for_watermark(0, 2).await;
    assert_eq!(cluster.ack(0, value("c")).await, 2);
    cluster.stop_all().await;
}

#[tokio::test]
async fn min_insync_replicas_is_checked_before_and_after() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.state.send_modify(|state| state.isr.truncate(1));
    let refused = cluster.produce(0, value("a"), Acks::All, LIMIT).await;
    assert_eq!(
        refused,
        Err(AppendError::NotEnoughReplicas {
            in_sync: 1,
            required: 2
        })
    );
    // acks=1 does not ask for it.
    let one = cluster
        .produce(0, value("b"), Acks::Leader, LIMIT)
        .await
        .unwrap();
    assert_eq!(one.base_offset, Offset(0));

    // All three required: a majority is not enough, the third must have it, or leave the ISR.
    let ids: Vec<BrokerId> = cluster.nodes.iter().map(|node| node.id.broker_id).collect();
    cluster.state.send_modify(|state| {
        state.isr = ids.clone();
        state.min_insync_replicas = 3;
    });
    assert_eq!(cluster.ack(0, value("c")).await, 1);
    cluster.router.cut(cluster.nodes[2].id);
    let waits = cluster.produce(0, value("d"), Acks::All, SHORT).await;
    assert_eq!(waits, Err(AppendError::TimedOut));
    let deadline = Instant::now() + LIMIT;
    let item = item(value("e"), Acks::All, deadline);
    let future = cluster.replica(0).enqueue(item).unwrap();
    cluster.wait_for_watermark(0, 4).await;
    cluster.state.send_modify(|state| state.isr.truncate(2));
    assert_eq!(
        future.until(deadline).await,
        Err(AppendError::NotEnoughReplicasAfterAppend {
            in_sync: 2,
            required: 3
        })
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_single_replica_commits_by_itself() {
    let mut cluster = Cluster::start(1, 1).await;
    assert_eq!(cluster.ack(0, value("a")).await, 0);
    // Longer than a lease of several would be.
    let leadership = cluster.replica(0).leadership();
    stays("it leads", Duration::from_millis(900), || {
        leadership.borrow().is_leader
    })
    .await;
    assert_eq!(cluster.ack(0, value("b")).await, 1);
    cluster.crash(0).await;
    cluster.open(0).await;
    cluster.elect(0).await;
    assert_eq!(cluster.ack(0, value("c")).await, 2);
    assert_eq!(cluster.read_all(0).await.len(), 3);
    // Nobody else has to be asked whether a producer has skipped something.
    assert_eq!(cluster.ack(0, idempotent(9, 0, 0, 1)).await, 3);
    let gap = cluster.produce(0, idempotent(9, 0, 5, 1), Acks::All, LIMIT);
    let gap = gap.await;
    assert!(
        matches!(gap, Err(AppendError::OutOfOrderSequence { .. })),
        "{gap:?}"
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn the_leader_sees_its_followers_progress_and_the_log_what_is_committed() {
    let mut cluster = Cluster::start(3, 3).await;
    cluster.ack(0, value("a")).await;
    let log = cluster.replica(0).log();
    assert_eq!(log.committed(), log.last_entry_id().map(|(index, _)| index));
    let progress = cluster.replica(0).progress().unwrap();
    assert_eq!(progress.followers.len(), 2);
    assert!(
        progress
            .followers
            .iter()
            .all(|f| f.matched == progress.last_index)
    );
    assert_eq!(cluster.replica(1).progress(), None);
    cluster.stop_all().await;
}
