//! Start without a controller, drain, and the limits on connections.
//!
//! Invariant: a stopping gateway answers what it took, unless the drain deadline comes first.

use tokio::time::timeout;

use super::*;
use crate::config::Limits;

#[tokio::test]
async fn a_gateway_starts_and_serves_while_all_controllers_are_down() {
    let cluster = Cluster::start(1).await;
    let folder = cluster.folder;
    let address = cluster.controller.address;
    cluster.gateway.shut_down().await;
    drop(cluster.controller);
    let gateway = crate::start(config(address, &folder, 1)).await.unwrap();
    let mut client = KafkaClient::connect(gateway.kafka_addresses[0]).await;
    let metadata = client.call(&all_topics(), 1).await;
    assert_eq!(metadata.brokers.len(), 3);
    assert_eq!(produce_code(&mut client, "t", 0, 5000).await, 0);
    gateway.shut_down().await;
}

#[tokio::test]
async fn a_stopping_gateway_answers_what_it_took() {
    let cluster = Cluster::start(1).await;
    let broker = cluster.brokers[0].state.clone();
    cluster.brokers[0].set_mode(ProduceMode::Hold);
    let mut client = cluster.client(0).await;
    let mut other = cluster.client(0).await;
    client.send(&produce("t", 0, -1, 10_000), 7).await;
    other.send(&produce("t", 0, -1, 10_000), 7).await;
    broker.wait_for_produced(2).await;
    let stopping = tokio::spawn(cluster.gateway.shut_down());
    broker.released.cancel();
    for client in [&mut client, &mut other] {
        let (_, response) = client.receive::<k::ProduceRequest>(7).await;
        assert_eq!(partition_of(&response).error_code, 0);
    }
    timeout(Duration::from_secs(4), stopping)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(client.frame().await, None);
}

#[tokio::test]
async fn the_drain_deadline_ends_connections_that_wait_for_a_broker() {
    let cluster = Cluster::start_with(1, |config| config.limits.drain_timeout_ms = 100).await;
    cluster.brokers[0].set_mode(ProduceMode::Hold);
    let mut client = cluster.client(0).await;
    client.send(&produce("t", 0, -1, 60_000), 7).await;
    cluster.brokers[0].state.wait_for_produced(1).await;
    timeout(Duration::from_secs(4), cluster.gateway.shut_down())
        .await
        .unwrap();
    assert_eq!(client.frame().await, None);
}

/// Each small request takes a kibibyte of what may be in flight.
#[tokio::test]
async fn a_connection_has_so_many_requests_and_bytes_in_flight_and_no_more() {
    const MAX: usize = 3;
    const SENT: usize = 20;
    let limits: [fn(&mut Limits); 2] = [
        |limits| limits.max_in_flight_requests = MAX,
        |limits| limits.max_in_flight_bytes = MAX * 1024,
    ];
    for limit in limits {
        let cluster = Cluster::start_with(1, |config| limit(&mut config.limits)).await;
        let broker = cluster.brokers[0].state.clone();
        cluster.brokers[0].set_mode(ProduceMode::Hold);
        // Told apart by the time that they have, of which some is used up on the way.
        let taken = |is_greedy: bool| {
            let produced = broker.produced.lock().unwrap();
            let of = |request: &&v1::ProduceRequest| (request.timeout_ms <= 120_000) == is_greedy;
            produced.iter().filter(of).count()
        };
        let mut greedy = cluster.client(0).await;
        for _ in 0..SENT {
            greedy.send(&produce("t", 0, -1, 120_000), 7).await;
        }
        until("it has what it may have", async || taken(true) >= MAX).await;
        // All are read in turn: while others are served, it would have got more.
        let mut others = Vec::new();
        for n in 1..=5 {
            let mut other = cluster.client(0).await;
            other.send(&produce("t", 0, -1, 300_000), 7).await;
            until("another client is served", async || taken(false) == n).await;
            others.push(other);
        }
        // One whose answer is waited for, and one that waits for room, come on top.
        assert!(taken(true) <= MAX + 2, "{} are in flight", taken(true));
        broker.released.cancel();
        for _ in 0..SENT {
            let (_, response) = greedy.receive::<k::ProduceRequest>(7).await;
            assert_eq!(partition_of(&response).error_code, 0);
        }
    }
}

#[tokio::test]
async fn too_many_connections_are_closed_at_once() {
    let cluster = Cluster::start_with(1, |config| config.limits.max_connections = 2).await;
    let mut first = cluster.client(0).await;
    first.call(&all_topics(), 1).await;
    // The connection that waited for the start of the cluster may not be gone yet.
    until("a second connection is served", async || {
        let mut second = cluster.client(0).await;
        let mut third = cluster.client(0).await;
        let request = k::ApiVersionsRequest::default();
        second.send(&request, 0).await;
        third.send(&request, 0).await;
        let (second, third) = (second.frame().await, third.frame().await);
        assert!(third.is_none());
        second.is_some()
    })
    .await;
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let cluster = Cluster::start_with(1, |config| config.limits.connections_max_idle_ms = 50).await;
    let mut client = cluster.client(0).await;
    assert_eq!(client.frame().await, None);
}
