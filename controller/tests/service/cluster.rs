//! Groups of one and of three controllers: writes through anybody, failover, watches, sessions.

use std::time::{Duration, Instant};

use crate::common::{FakeBroker, Group, Watcher, create, new_topic, registration, report, within};
use chronik_proto::{uuid_bytes, v1};
use chronik_types::id::BrokerId;
use tonic::Code;
use uuid::Uuid;

/// All brokers of a test, which report leadership and stay alive until dropped.
async fn with_brokers<T>(group: &Group, count: i32, work: impl Future<Output = T>) -> T {
    let at = group.leader().await;
    let mut brokers = Vec::new();
    for broker_id in 1..=count {
        brokers.push(FakeBroker::register(group, at, broker_id).await);
    }
    let leading = brokers.iter_mut().map(|broker| {
        let mut heart = FakeBroker {
            broker_id: broker.broker_id,
            broker_epoch: broker.broker_epoch,
            sessions: broker.sessions.clone(),
        };
        let images = group.controller(at).feed().subscribe();
        async move {
            tokio::join!(
                broker.lead_all(images),
                heart.live(Duration::from_millis(300))
            );
        }
    });
    tokio::select! {
        _ = futures::future::join_all(leading) => panic!("brokers ended"),
        done = work => done,
    }
}

#[tokio::test]
async fn one_controller_creates_topics_and_recovers_them() {
    let started = Instant::now();
    let mut group = Group::start(1).await;
    let leader = group.leader().await;
    println!("one controller leads after {:?}", started.elapsed());
    with_brokers(&group, 3, async {
        let topics = vec![
            new_topic("plain", 6, 3),
            new_topic("defaults", -1, -1),
            new_topic("__consumer_offsets", -1, -1),
            new_topic("bad name", 1, 1),
            new_topic("wide", 1, 4),
            new_topic("none", 0, 1),
        ];
        let started = Instant::now();
        let created = create(&mut group.admin(leader), topics, 10_000).await;
        println!("created after {:?}", started.elapsed());
        let shape: Vec<_> = created
            .iter()
            .map(|t| (t.error(), t.partition_count, t.replication_factor))
            .collect();
        assert_eq!(
            shape,
            [
                (v1::AdminError::None, 6, 3),
                (v1::AdminError::None, 1, 3),
                (v1::AdminError::None, 50, 3),
                (v1::AdminError::InvalidTopicName, 0, 0),
                (v1::AdminError::InvalidReplicationFactor, 0, 0),
                (v1::AdminError::InvalidPartitions, 0, 0),
            ]
        );
        assert_eq!(created[2].configs["cleanup.policy"], "compact");
    })
    .await;
    let before = group.controller(leader).image();
    let plain = before.topic_by_name("plain").unwrap();
    assert!(
        plain
            .partitions
            .iter()
            .all(|p| p.leader.is_some() && p.isr.len() == 3)
    );
    let preferred = |id: i32| {
        plain
            .partitions
            .iter()
            .filter(move |p| p.leader == Some(BrokerId(id)))
    };
    assert!(
        (1..=3).all(|id| preferred(id).count() == 2),
        "leaders are balanced"
    );

    let mut admin = group.admin(leader);
    let request = v1::AllocateProducerIdsRequest { count: 500 };
    let first = admin
        .allocate_producer_ids(request)
        .await
        .unwrap()
        .into_inner()
        .first;
    group.kill(leader).await;
    group.restart(leader).await;
    assert_eq!(group.leader().await, leader);
    let after = group.controller(leader).image();
    assert_eq!(
        (&after.topics, &after.cluster_id),
        (&before.topics, &before.cluster_id)
    );
    let mut admin = group.admin(leader);
    let second = admin
        .allocate_producer_ids(request)
        .await
        .unwrap()
        .into_inner()
        .first;
    assert_eq!(second, first + 500, "producer ids are given out once");
}

#[tokio::test]
async fn any_controller_takes_writes_and_the_group_survives_its_leader() {
    let started = Instant::now();
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    println!(
        "three controllers have a leader after {:?}",
        started.elapsed()
    );
    let follower = group.follower_of(leader);
    with_brokers(&group, 3, async {
        let created = create(
            &mut group.admin(follower),
            vec![new_topic("a", 3, 3)],
            10_000,
        )
        .await;
        assert_eq!(created[0].error(), v1::AdminError::None);
        let again = create(&mut group.admin(follower), vec![new_topic("a", 3, 3)], 0).await;
        assert_eq!(again[0].error(), v1::AdminError::TopicAlreadyExists);
    })
    .await;
    let image = group
        .image(follower, "topic", |i| i.topic_by_name("a").is_some())
        .await;
    assert_eq!(image.controllers.len(), 3);
    assert!(image.controller_leader.is_some());

    let watcher = Watcher::open(group.channel(follower), Default::default()).await;
    let mut watcher = { watcher };
    watcher
        .until("image", |image| image.topic_by_name("a").is_some())
        .await;
    assert_eq!(watcher.full_image_count, 1);
    let killed = Instant::now();
    group.kill(leader).await;
    let next = group.leader().await;
    println!("a new leader after {:?}", killed.elapsed());
    assert_ne!(next, leader);
    let survivor = group.follower_of(next);
    let created = create(&mut group.admin(survivor), vec![new_topic("b", 1, 1)], 0).await;
    assert_eq!(
        created[0].error(),
        v1::AdminError::TimedOut,
        "created, nobody leads it"
    );

    // The watcher goes on at another controller from where it was.
    let mut resumed = Watcher::open(group.channel(next), watcher.image.clone()).await;
    resumed
        .until("topic b", |image| image.topic_by_name("b").is_some())
        .await;
    assert_eq!(resumed.full_image_count, 0, "changes were enough");
    assert_eq!(resumed.image, *group.controller(next).image());

    // Enough changes for snapshots and purges: the one that was away needs a snapshot.
    for number in 0..100 {
        let configs = v1::AlterTopicConfigsRequest {
            topics: vec![v1::TopicConfigChanges {
                name: "a".to_owned(),
                changes: vec![v1::ConfigChange {
                    name: "retention.ms".to_owned(),
                    operation: v1::config_change::Operation::Set.into(),
                    value: number.to_string(),
                }],
            }],
            validate_only: false,
        };
        let results = group
            .admin(survivor)
            .alter_topic_configs(configs)
            .await
            .unwrap();
        assert_eq!(results.into_inner().topics[0].error(), v1::AdminError::None);
    }
    // Snapshot and purge follow the writes in their own time.
    let purged = async {
        while group.controller(next).node().status().purged_log_index == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within("a purge: the log is bounded", purged).await;
    group.restart(leader).await;
    let revision = group.controller(next).image().revision;
    let image = group
        .image(leader, "catching up", |i| i.revision >= revision)
        .await;
    assert_eq!(
        image.topic_by_name("a").unwrap().configs["retention.ms"],
        "99"
    );

    // All at once, and back.
    let before = group.controller(next).image();
    for index in 0..3 {
        group.kill(index).await;
    }
    for index in 0..3 {
        group.restart(index).await;
    }
    let leader = group.leader().await;
    let after = group.controller(leader).image();
    assert_eq!(
        (&after.topics, &after.brokers),
        (&before.topics, &before.brokers)
    );
    // An orderly stop hands leadership over.
    let stopped = Instant::now();
    group.stop(leader).await;
    let stop_took = stopped.elapsed();
    assert!(stop_took < Duration::from_secs(5), "{stop_took:?}");
    assert_ne!(group.leader().await, leader);
    println!("handed over after {:?}", stopped.elapsed());
}

#[tokio::test]
async fn without_a_majority_writes_are_unavailable_or_unknown_and_reads_go_on() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    let last = group.follower_of(leader);
    group
        .image(last, "joined", |image| !image.cluster_id.is_empty())
        .await;
    for index in (0..3).filter(|index| *index != last) {
        group.kill(index).await;
    }
    let request = v1::CreateTopicsRequest {
        topics: vec![new_topic("a", 1, 1)],
        timeout_ms: 0,
        validate_only: false,
    };
    let error = within("an error", group.admin(last).create_topics(request))
        .await
        .unwrap_err();
    assert!(
        matches!(error.code(), Code::Unavailable | Code::DeadlineExceeded),
        "{error}"
    );
    let mut watcher = Watcher::open(group.channel(last), Default::default()).await;
    watcher
        .until("image", |image| !image.cluster_id.is_empty())
        .await;
}

#[tokio::test]
async fn a_silent_broker_is_fenced_and_one_with_heartbeats_is_not() {
    let group = Group::start_with(1, 900).await;
    let mut quiet = FakeBroker::register(&group, 0, 1).await;
    let mut lively = FakeBroker::register(&group, 0, 2).await;
    let created = create(&mut group.admin(0), vec![new_topic("a", 1, 2)], 0).await;
    assert_eq!(created[0].error(), v1::AdminError::TimedOut);
    let partition = group
        .controller(0)
        .image()
        .topic_by_name("a")
        .unwrap()
        .partitions[0]
        .clone();
    let results = quiet
        .report(vec![report(&partition, 1, partition.partition_epoch.0)])
        .await;
    assert_eq!(
        results.results[0].outcome(),
        v1::partition_report_result::Outcome::Accepted
    );
    let before = group.controller(0).node().status().last_log_index;
    let fenced = |image: &std::sync::Arc<chronik_types::cluster_image::ClusterImage>| {
        image.brokers[&BrokerId(1)].fenced
    };
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
    let topic = group
        .controller(0)
        .image()
        .topic_by_name("a")
        .unwrap()
        .clone();
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
    let topic = group
        .controller(0)
        .image()
        .topic_by_name("a")
        .unwrap()
        .clone();
    assert!(
        topic
            .partitions
            .iter()
            .all(|p| p.leader == Some(BrokerId(1)))
    );
}
