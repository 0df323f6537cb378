//! Records that are produced: in order, on every replica, and there after a crash.

use std::collections::BTreeMap;

use chronik_types::record_batch::BatchHeader;
use tokio::time::timeout;

use super::*;

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
            let item = item(value(&format!("value {n}")), Acks::All, deadline);
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
            let records = value(&format!("round {round} unacked {n}"));
            let item = item(records, Acks::None, Instant::now() + LIMIT);
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
