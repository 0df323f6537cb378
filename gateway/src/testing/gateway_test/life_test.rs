//! Start without a controller, drain, and the limits on connections.
//!
//! Invariant: a stopping gateway answers what it took, unless the drain deadline comes first.

use tokio::time::timeout;

use super::*;

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
