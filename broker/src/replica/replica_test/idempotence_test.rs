//! Idempotent producers: a retry is answered as the original was, and only who leads for sure refuses
//! a batch for good.

use super::*;
use crate::replica::raft_config::RaftTiming;

#[tokio::test]
async fn a_retry_of_an_idempotent_batch_is_answered_with_its_first_offset() {
    let mut cluster = Cluster::start(3, 2).await;
    assert_eq!(cluster.ack(0, idempotent(9, 0, 0, 2)).await, 0);
    assert_eq!(cluster.ack(0, idempotent(9, 0, 2, 1)).await, 2);
    assert_eq!(cluster.ack(0, idempotent(9, 0, 0, 2)).await, 0);
    let gap = cluster.refusal(0, idempotent(9, 0, 7, 1)).await;
    assert!(
        matches!(gap, AppendError::OutOfOrderSequence { expected: 3, .. }),
        "{gap:?}"
    );

    // The original and its retry may wait together.
    let deadline = Instant::now() + LIMIT;
    let enqueue = |records: Vec<u8>| {
        let item = item(records, Acks::All, deadline);
        cluster.replica(0).enqueue(item).unwrap()
    };
    let (first, retry) = (
        enqueue(idempotent(9, 0, 3, 1)),
        enqueue(idempotent(9, 0, 3, 1)),
    );
    assert_eq!(first.until(deadline).await.unwrap().base_offset, Offset(3));
    assert_eq!(retry.until(deadline).await.unwrap().base_offset, Offset(3));
    assert_eq!(cluster.replica(0).high_watermark(), Offset(4));

    // So it is on another leader, and after a restart of it.
    cluster.wait_for_watermark(1, 4).await;
    let to = cluster.nodes[1].id;
    cluster.replica(0).transfer_leadership(to).await.unwrap();
    cluster.wait_for_leadership(1, |l| l.ready).await;
    assert_eq!(cluster.ack(1, idempotent(9, 0, 2, 1)).await, 2);
    assert_eq!(cluster.ack(1, idempotent(9, 0, 4, 1)).await, 4);
    cluster.stop(1).await;
    cluster.open(1).await;
    cluster.elect(1).await;
    assert_eq!(cluster.ack(1, idempotent(9, 0, 4, 1)).await, 4);
    let fenced = [idempotent(9, 1, 0, 1), idempotent(9, 0, 5, 1)];
    assert_eq!(cluster.ack(1, fenced[0].clone()).await, 5);
    let refused = cluster
        .produce(1, fenced[1].clone(), Acks::All, LIMIT)
        .await;
    assert!(
        matches!(refused, Err(AppendError::InvalidProducerEpoch { .. })),
        "{refused:?}"
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_leader_that_was_replaced_unawares_ends_no_producer() {
    let mut cluster = Cluster::start(3, 2).await;
    assert_eq!(cluster.ack(0, idempotent(9, 0, 0, 1)).await, 0);
    cluster.wait_for_followers(0).await;
    cluster.router.cut(cluster.nodes[0].id);
    cluster.elect(1).await;
    assert_eq!(cluster.ack(1, idempotent(9, 0, 1, 1)).await, 1);
    // The old leader has not heard of that, and so not of the producer's last batch either.
    let old = cluster.replica(0).leadership();
    assert!(old.borrow().ready);
    let next = || idempotent(9, 0, 2, 1);
    let alone = cluster.produce(0, next(), Acks::All, LIMIT).await;
    assert_eq!(alone, Err(AppendError::NotLeader { leader: None }));
    assert!(old.borrow().ready);
    let asked = cluster.produce(0, next(), Acks::All, LIMIT);
    let (answer, ()) = tokio::join!(asked, async { cluster.router.heal() });
    assert!(
        matches!(answer, Err(AppendError::NotLeader { .. })),
        "{answer:?}"
    );
    // Who leads says what is wrong.
    let gap = cluster.refusal(1, idempotent(9, 0, 7, 1)).await;
    assert!(
        matches!(gap, AppendError::OutOfOrderSequence { expected: 2, .. }),
        "{gap:?}"
    );
    assert_eq!(cluster.ack(1, next()).await, 2);
    cluster.stop_all().await;
}

#[tokio::test]
async fn who_leads_can_say_so_at_once_though_it_was_heard_a_moment_ago() {
    // Heartbeats come so rarely that none of them is the answer.
    let timing = RaftTiming {
        heartbeat_interval: Duration::from_secs(60),
        election_timeout_min: Duration::from_secs(200),
        election_timeout_max: Duration::from_secs(300),
    };
    let mut cluster = Cluster::start_with(3, 2, timing).await;
    assert_eq!(cluster.ack(0, idempotent(9, 0, 0, 1)).await, 0);
    let gap = cluster.refusal(0, idempotent(9, 0, 7, 1)).await;
    assert!(
        matches!(gap, AppendError::OutOfOrderSequence { .. }),
        "{gap:?}"
    );
    cluster.stop_all().await;
}
