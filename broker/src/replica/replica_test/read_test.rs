//! Offsets by time, and the ends of what can be fetched.

use super::*;

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
