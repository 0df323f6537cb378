//! Sessions of brokers and gateways: registered, kept alive, ended; and what brokers report.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::{FakeBroker, Group, create, new_topic, registration, report};
use chronik_proto::{uuid_bytes, v1};
use chronik_types::cluster_image::{ClusterImage, Topic};
use chronik_types::id::BrokerId;
use tonic::Code;
use uuid::Uuid;

/// Topic `a` as controller 0 knows it.
fn topic_a(group: &Group) -> Arc<Topic> {
    let image = group.controller(0).image();
    image.topic_by_name("a").unwrap().clone()
}

#[tokio::test]
async fn a_silent_broker_is_fenced_and_one_with_heartbeats_is_not() {
    let group = Group::start_with(1, 900).await;
    let mut quiet = FakeBroker::register(&group, 0, 1).await;
    let mut lively = FakeBroker::register(&group, 0, 2).await;
    let created = create(&mut group.admin(0), vec![new_topic("a", 1, 2)], 0).await;
    assert_eq!(created[0].error(), v1::AdminError::TimedOut);
    let partition = topic_a(&group).partitions[0].clone();
    let results = quiet
        .report(vec![report(&partition, 1, partition.partition_epoch.0)])
        .await;
    assert_eq!(
        results.results[0].outcome(),
        v1::partition_report_result::Outcome::Accepted
    );
    let before = group.controller(0).node().status().last_log_index;
    let fenced = |image: &Arc<ClusterImage>| image.brokers[&BrokerId(1)].fenced;
    let image = tokio::select! {
        () = lively.live(Duration::from_millis(100)) => unreachable!(),
        image = group.image(0, "fencing", fenced) => image,
    };
    assert!(!image.brokers[&BrokerId(2)].fenced);
    let partition = &image.topic_by_name("a").unwrap().partitions[0];
    assert_eq!(
        (partition.leader, &*partition.isr),
        (None, &[BrokerId(2)][..])
    );
    assert!(quiet.heartbeat().await && !lively.heartbeat().await);
    let results = quiet
        .report(vec![report(partition, 2, partition.partition_epoch.0)])
        .await;
    assert!(results.fenced && results.results.is_empty());
    let after = group.controller(0).node().status().last_log_index;
    // One fencing and the refused report: heartbeats go nowhere near the log.
    assert!(after <= before + 2, "{before} {after}");

    let request = v1::BrokerHeartbeatRequest {
        broker_id: 2,
        broker_epoch: lively.broker_epoch,
        shutting_down: true,
        ..Default::default()
    };
    let response = lively
        .sessions
        .broker_heartbeat(request)
        .await
        .unwrap()
        .into_inner();
    assert!(response.fenced);
    assert!(
        group.controller(0).image().brokers[&BrokerId(2)].fenced,
        "at once"
    );
}

#[tokio::test]
async fn a_new_leader_gives_every_session_a_full_timeout() {
    let mut group = Group::start_with(3, 2400).await;
    let leader = group.leader().await;
    FakeBroker::register(&group, leader, 1).await;
    let follower = group.follower_of(leader);
    group
        .image(follower, "broker", |i| i.brokers.contains_key(&BrokerId(1)))
        .await;
    group.kill(leader).await;
    let next = group.leader().await;
    let taken_over = Instant::now();
    assert!(!group.controller(next).image().brokers[&BrokerId(1)].fenced);
    group
        .image(next, "fencing", |i| i.brokers[&BrokerId(1)].fenced)
        .await;
    let after = taken_over.elapsed();
    assert!(after > Duration::from_millis(2000), "{after:?}");
}

#[tokio::test]
async fn registrations_are_checked() {
    let group = Group::start(1).await;
    group.leader().await;
    let mut sessions = group.sessions(0);
    let register = |incarnation: u128, storage: u128| {
        registration(1, Uuid::from_u128(incarnation), Uuid::from_u128(storage))
    };
    let first = sessions
        .register_broker(register(1, 1))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (first.session_timeout_ms, first.heartbeat_interval_ms),
        (3000, 500)
    );
    let twin = sessions.register_broker(register(2, 2)).await.unwrap_err();
    assert_eq!(twin.code(), Code::AlreadyExists);
    let restarted = sessions
        .register_broker(register(3, 1))
        .await
        .unwrap()
        .into_inner();
    assert!(restarted.broker_epoch > first.broker_epoch);
    let mut wrong = register(4, 1);
    wrong.cluster_id = "another".to_owned();
    let error = sessions.register_broker(wrong).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    let mut malformed = register(5, 1);
    malformed.incarnation_id = b"short".to_vec().into();
    let error = sessions.register_broker(malformed).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);

    let gateway = |incarnation: u128| v1::RegisterGatewayRequest {
        gateway_id: "g".to_owned(),
        incarnation_id: uuid_bytes(Uuid::from_u128(incarnation)),
        rack: None,
        endpoints: vec![v1::Endpoint {
            host: "h".to_owned(),
            port: 9092,
        }],
    };
    sessions.register_gateway(gateway(1)).await.unwrap();
    let heartbeat = |incarnation: u128, leaving| v1::GatewayHeartbeatRequest {
        gateway_id: "g".to_owned(),
        incarnation_id: uuid_bytes(Uuid::from_u128(incarnation)),
        leaving,
    };
    let expired =
        |response: tonic::Response<v1::GatewayHeartbeatResponse>| response.into_inner().expired;
    assert!(!expired(
        sessions
            .gateway_heartbeat(heartbeat(1, false))
            .await
            .unwrap()
    ));
    assert!(expired(
        sessions
            .gateway_heartbeat(heartbeat(2, false))
            .await
            .unwrap()
    ));
    assert!(expired(
        sessions
            .gateway_heartbeat(heartbeat(1, true))
            .await
            .unwrap()
    ));
    assert!(group.controller(0).image().gateways.is_empty());
}

#[tokio::test]
async fn thousands_of_reports_are_few_transactions() {
    let group = Group::start(1).await;
    group.leader().await;
    let mut broker = FakeBroker::register(&group, 0, 1).await;
    let created = create(&mut group.admin(0), vec![new_topic("a", 3000, 1)], 0).await;
    assert_eq!(created[0].error(), v1::AdminError::TimedOut);
    let topic = topic_a(&group);
    let reports = topic
        .partitions
        .iter()
        .map(|p| report(p, 1, p.partition_epoch.0))
        .collect();
    let before = group.controller(0).node().status().last_log_index;
    let started = Instant::now();
    let response = broker.report(reports).await;
    println!("3000 reports took {:?}", started.elapsed());
    assert_eq!(response.results.len(), 3000);
    assert_eq!(
        group.controller(0).node().status().last_log_index,
        before + 1
    );
    let topic = topic_a(&group);
    assert!(
        topic
            .partitions
            .iter()
            .all(|p| p.leader == Some(BrokerId(1)))
    );
}
