//! Produce: the order of requests and answers, every version, and outcomes that stay unknown.
//!
//! Invariant: answers of a connection come in the order of its requests.

use super::*;
use crate::testing::batch;

#[tokio::test]
async fn pipelined_produce_requests_reach_the_broker_in_order_and_are_answered_in_order() {
    let cluster = Cluster::start(1).await;
    const COUNT: usize = 20;
    cluster.brokers[0].set_mode(ProduceMode::Reverse(COUNT));
    let mut client = cluster.client(0).await;
    let mut sent = Vec::new();
    for number in 0..COUNT {
        let mut request = produce("t", 0, -1, 10_000);
        request.topic_data[0].partition_data[0].records = Some(batch(&[number as u8]));
        sent.push(client.send(&request, 7).await);
    }
    let mut offsets = Vec::new();
    for correlation_id in sent {
        let (answered, response) = client.receive::<k::ProduceRequest>(7).await;
        assert_eq!(answered, correlation_id);
        assert_eq!(partition_of(&response).error_code, 0);
        offsets.push(partition_of(&response).base_offset);
    }
    assert!(offsets.is_sorted(), "{offsets:?}");
    let produced = cluster.brokers[0].state.produced.lock().unwrap();
    let order: Vec<u8> = produced
        .iter()
        .map(|request| *request.partitions[0].records.last().unwrap())
        .collect();
    assert_eq!(order, (0..COUNT as u8).collect::<Vec<_>>());
}

#[tokio::test]
async fn requests_of_other_kinds_wait_for_those_before_them() {
    let cluster = Cluster::start(1).await;
    cluster.brokers[0].set_mode(ProduceMode::Reverse(2));
    let mut client = cluster.client(0).await;
    client.send(&produce("t", 0, -1, 10_000), 7).await;
    client.send(&produce("t", 0, -1, 10_000), 7).await;
    client.send(&k::MetadataRequest::default(), 1).await;
    client.send(&produce("t", 1, -1, 10_000), 7).await;
    assert_eq!(client.receive::<k::ProduceRequest>(7).await.0, 1);
    assert_eq!(client.receive::<k::ProduceRequest>(7).await.0, 2);
    assert_eq!(client.receive::<k::MetadataRequest>(1).await.0, 3);
    assert_eq!(client.receive::<k::ProduceRequest>(7).await.0, 4);
}

#[tokio::test]
async fn produce_works_in_every_version() {
    let cluster = Cluster::start(1).await;
    let topic_id = cluster.topic_id();
    let mut client = cluster.client(0).await;
    for version in 3..=13 {
        let mut request = produce("t", 0, -1, 1000);
        if version >= 13 {
            request.topic_data[0].name = "".into();
            request.topic_data[0].topic_id = topic_id;
        }
        let response = client.call(&request, version).await;
        assert_eq!(partition_of(&response).error_code, 0, "version {version}");
    }
}

#[tokio::test]
async fn produce_of_the_old_versions_is_refused_in_its_own_form() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    // Version 2: header with a null client id; acks 1, timeout 1, topic "t", partition 0, no bytes.
    let mut frame = vec![0, 0, 0, 2, 0, 0, 0, 9, 0xff, 0xff];
    frame.extend([
        0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, b't', 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    client.send_frame(&frame).await;
    let answer = client.frame().await.unwrap();
    let expected = [
        vec![
            0, 0, 0, 9, 0, 0, 0, 1, 0, 1, b't', 0, 0, 0, 1, 0, 0, 0, 0, 0, 35,
        ],
        vec![0xff; 16],
        vec![0; 4],
    ];
    assert_eq!(answer[..], expected.concat());
}

#[tokio::test]
async fn a_broken_stream_is_an_unknown_outcome() {
    let cluster = Cluster::start(1).await;
    cluster.brokers[0].set_mode(ProduceMode::Break);
    let mut client = cluster.client(0).await;
    let code = produce_code(&mut client, "t", 0, 5000).await;
    assert_eq!(code, ErrorCode::RequestTimedOut.code());
    // The stream comes back by itself.
    cluster.brokers[0].set_mode(ProduceMode::Answer);
    until("the stream comes back", async || {
        produce_code(&mut client, "t", 0, 5000).await == 0
    })
    .await;
}

#[tokio::test]
async fn no_answer_in_time_is_an_unknown_outcome() {
    let cluster = Cluster::start(1).await;
    cluster.brokers[0].set_mode(ProduceMode::Silent);
    let mut client = cluster.client(0).await;
    let code = produce_code(&mut client, "t", 0, 50).await;
    assert_eq!(code, ErrorCode::RequestTimedOut.code());
}

#[tokio::test]
async fn acks_0_has_no_answer() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    client.send(&produce("t", 0, 0, 1000), 7).await;
    let last = client.send(&produce("t", 0, 1, 1000), 7).await;
    assert_eq!(client.receive::<k::ProduceRequest>(7).await.0, last);
    assert_eq!(cluster.brokers[0].state.produced.lock().unwrap().len(), 2);
    // A failure cannot be told, so the connection ends.
    client.send(&produce("t", 99, 0, 1000), 7).await;
    assert_eq!(client.frame().await, None);
}
