//! What a partition promises, tried on three replicas in one process.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::BrokerId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{BatchHeader, batches};
use tokio::time::{Instant, timeout};

use super::queue::{Acks, ProduceItem};
use super::raft_config::RaftTiming;
use super::read::ReadRequest;
use super::test_batches::{idempotent, value, with_records};
use super::test_cluster::{Cluster, LIMIT};
use super::{AppendError, ReadError};
use crate::test_wait::stays;

const SHORT: Duration = Duration::from_millis(500);

/// Base offset, leader epoch and bytes after the stamped fields of each batch.
fn contents(read: &[Bytes]) -> Vec<(i64, i32, Vec<u8>)> {
    let mut out = Vec::new();
    for bytes in read {
        for batch in batches(bytes) {
            let (at, header) = batch.unwrap();
            header.verify_crc(&bytes[at..]).unwrap();
            let body = bytes[at + 17..at + header.size_bytes()].to_vec();
            out.push((header.base_offset.0, header.leader_epoch.0, body));
        }
    }
    out
}

fn fetch(offset: i64) -> ReadRequest {
    ReadRequest {
        offset: Offset(offset),
        max_bytes: 1 << 20,
        current_leader_epoch: LeaderEpoch(-1),
        last_fetched_epoch: LeaderEpoch(-1),
    }
}

#[tokio::test]
async fn acked_records_are_on_every_replica_in_order() {
    let mut cluster = Cluster::start(3, 2).await;
    assert_eq!(cluster.ack(0, value("a")).await, 0);
    let three = with_records(&[(1, b"b"), (2, b"c"), (3, b"d")]);
    assert_eq!(cluster.ack(0, three).await, 1);
    assert_eq!(cluster.ack(0, [value("e"), value("f")].concat()).await, 4);
    assert_eq!(cluster.replica(0).high_watermark(), Offset(6));
    let expected = contents(&cluster.read_all(0).await);
    assert_eq!(
        expected.iter().map(|c| c.0).collect::<Vec<_>>(),
        vec![0, 1, 4, 5]
    );
    for n in 1..3 {
        cluster.wait_for_watermark(n, 6).await;
        assert_eq!(contents(&cluster.read_all(n).await), expected);
    }
    cluster.stop_all().await;
}

#[tokio::test]
async fn many_at_once_keep_their_order_and_share_entries() {
    let mut cluster = Cluster::start(3, 2).await;
    let deadline = Instant::now() + LIMIT;
    let entries_before = cluster.replica(0).log().last_entry_id().unwrap().0;
    let futures: Vec<_> = (0..1000)
        .map(|n| {
            let records = Bytes::from(value(&format!("value {n}")));
            let item = ProduceItem {
                records,
                acks: Acks::All,
                deadline,
                leader_epoch: None,
                trace: None,
            };
            cluster.replica(0).enqueue(item).unwrap()
        })
        .collect();
    for (n, future) in futures.into_iter().enumerate() {
        assert_eq!(
            future.until(deadline).await.unwrap().base_offset,
            Offset(n as i64)
        );
    }
    let entries = cluster.replica(0).log().last_entry_id().unwrap().0 - entries_before;
    assert!(entries < 50, "{entries} entries for 1000 items");
    cluster.stop_all().await;
}

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
        let records = Bytes::from(records);
        let item = ProduceItem {
            records,
            acks: Acks::All,
            deadline,
            leader_epoch: None,
            trace: None,
        };
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

#[tokio::test]
async fn every_acked_record_survives_a_crash_of_all() {
    let mut cluster = Cluster::start(3, 2).await;
    let mut acked = BTreeMap::new();
    let mut leader = 0;
    for round in 0..4 {
        for n in 0..25 {
            let records = value(&format!("round {round} record {n}"));
            let body = records[17..].to_vec();
            acked.insert(cluster.ack(leader, records).await, body);
        }
        // Something unacked is under way when the power fails.
        for n in 0..20 {
            let item = ProduceItem {
                records: Bytes::from(value(&format!("round {round} unacked {n}"))),
                acks: Acks::None,
                deadline: Instant::now() + LIMIT,
                leader_epoch: None,
                trace: None,
            };
            cluster.replica(leader).enqueue(item).unwrap();
        }
        for n in 0..3 {
            cluster.crash(n).await;
        }
        for n in 0..3 {
            cluster.open(n).await;
        }
        leader = elect_any(&cluster).await;
        let read: BTreeMap<_, _> = contents(&cluster.read_all(leader).await)
            .into_iter()
            .map(|c| (c.0, c.2))
            .collect();
        for (offset, body) in &acked {
            assert_eq!(
                read.get(offset),
                Some(body),
                "offset {offset}, round {round}"
            );
        }
    }
    cluster.stop_all().await;
}

/// The replica with the longest log wins; which one that is, is for Raft to say.
async fn elect_any(cluster: &Cluster) -> usize {
    let deadline = Instant::now() + LIMIT;
    loop {
        for n in 0..cluster.nodes.len() {
            cluster.replica(n).campaign(false).await.unwrap();
            let mut leadership = cluster.replica(n).leadership();
            let ready = leadership.wait_for(|l| l.ready);
            if timeout(Duration::from_millis(300), ready).await.is_ok() {
                return n;
            }
        }
        assert!(Instant::now() < deadline, "no leader");
    }
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
        let records = Bytes::from(value("waits"));
        let item = ProduceItem {
            records,
            acks: Acks::All,
            deadline,
            leader_epoch: None,
            trace: None,
        };
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
    let item = ProduceItem {
        records: value("e").into(),
        acks: Acks::All,
        deadline,
        leader_epoch: None,
        trace: None,
    };
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
async fn a_resting_leader_renews_its_lease_and_writes() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    // Nothing in the group moves, since ticks are off.
    cluster.wait_for_lease_end(0).await;
    assert_eq!(cluster.ack(0, value("b")).await, 1);
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
async fn offsets_are_found_by_time() {
    let mut cluster = Cluster::start(1, 1).await;
    let batch = |times: &[i64]| {
        let records: Vec<(i64, &[u8])> = times.iter().map(|t| (*t, &b"v"[..])).collect();
        with_records(&records)
    };
    cluster.ack(0, batch(&[1_000, 1_500])).await;
    cluster.ack(0, batch(&[2_000, 5_000, 3_000])).await;
    cluster.ack(0, batch(&[4_000])).await;
    let find = async |timestamp| {
        let found = cluster
            .replica(0)
            .list_offset(timestamp, LeaderEpoch(-1))
            .await
            .unwrap();
        found.map(|f| (f.offset.0, f.timestamp))
    };
    assert_eq!(find(-1).await, Some((6, -1)));
    assert_eq!(find(-2).await, Some((0, -1)));
    assert_eq!(find(-3).await, Some((3, 5_000)));
    assert_eq!(find(0).await, Some((0, 1_000)));
    assert_eq!(find(1_001).await, Some((1, 1_500)));
    assert_eq!(find(2_001).await, Some((3, 5_000)));
    assert_eq!(find(5_001).await, None);
    assert_eq!(find(-5).await, None);
    let unsupported = cluster.replica(0).list_offset(-7, LeaderEpoch(-1)).await;
    assert_eq!(unsupported, Err(ReadError::UnsupportedTimestamp(-7)));
    let newer = cluster.replica(0).list_offset(-1, LeaderEpoch(99)).await;
    assert!(
        matches!(newer, Err(ReadError::UnknownLeaderEpoch { .. })),
        "{newer:?}"
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn log_append_time_is_stamped_by_the_leader() {
    let mut cluster = Cluster::start(1, 1).await;
    cluster
        .state
        .send_modify(|state| state.log_append_time = true);
    let appended = cluster
        .produce(0, value("a"), Acks::All, LIMIT)
        .await
        .unwrap();
    let time = appended.log_append_time_ms.unwrap();
    let read = cluster.read_all(0).await;
    let header = BatchHeader::parse(&read[0]).unwrap();
    header.verify_crc(&read[0]).unwrap();
    assert!(header.is_log_append_time());
    assert_eq!(header.max_timestamp, time);
    cluster.stop_all().await;
}

#[tokio::test]
async fn fetches_outside_the_log_are_out_of_range() {
    let mut cluster = Cluster::start(1, 1).await;
    cluster.ack(0, value("a")).await;
    assert_eq!(
        cluster
            .replica(0)
            .read(fetch(1))
            .await
            .unwrap()
            .records
            .len(),
        0
    );
    for offset in [-1, 2, i64::MAX] {
        let read = cluster.replica(0).read(fetch(offset)).await;
        assert!(
            matches!(read, Err(ReadError::OffsetOutOfRange { .. })),
            "{offset}: {read:?}"
        );
    }
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
