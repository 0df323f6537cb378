//! Groups of one and of three controllers: writes through anybody, failover, watches.

use std::time::{Duration, Instant};

use crate::common::{FakeBroker, Group, Watcher, create, new_topic, within};
use chronik_proto::v1;
use chronik_types::id::BrokerId;
use tonic::Code;

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
    group
        .until("a purge: the log is bounded", |group| {
            group.controller(next).node().status().purged_log_index != 0
        })
        .await;
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
