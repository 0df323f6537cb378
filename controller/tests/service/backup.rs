//! Backup and restore: what is brought back, what is refused, and what watchers see of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::common::{FakeBroker, Group, Watcher, create, new_topic, until, within};
use crate::disk::until_readiness_says;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use chronik_controller::backup::{Restored, restore};
use chronik_controller::metrics::Metrics;
use chronik_controller::rest;
use chronik_proto::v1;
use chronik_telemetry::http::Health;
use chronik_types::cluster_image::ClusterImage;
use tower::ServiceExt;

fn rest_of(group: &Group, index: usize) -> Router {
    let (_, registry) = Metrics::new();
    rest::router(group.controller(index).clone(), registry, Health::new())
}

/// The answer to the request of a backup; its body is not read.
async fn ask(router: &Router) -> Response {
    let request = Request::get("/v1/cluster/backup")
        .body(Body::empty())
        .unwrap();
    let answer = within("a backup", router.clone().oneshot(request)).await;
    answer.unwrap()
}

/// Asks a controller for a backup and saves it.
async fn back_up(group: &Group, index: usize, name: &str) -> PathBuf {
    let response = ask(&rest_of(group, index)).await;
    assert_eq!(response.status(), StatusCode::OK);
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
    let (revision, length) = (header("chronik-revision"), header("content-length"));
    assert_eq!(
        revision,
        group.controller(index).image().revision.to_string()
    );
    let bytes = to_bytes(response.into_body(), 100_000_000).await.unwrap();
    assert_eq!(length, bytes.len().to_string());
    let folder = group.config(index).data_dir;
    let left: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .contains("backup")
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let path = folder.parent().unwrap().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

async fn create_topic(group: &Group, index: usize, name: &str) {
    let created = create(&mut group.admin(index), vec![new_topic(name, 3, 1)], 0).await;
    assert_eq!(
        created[0].error(),
        v1::AdminError::TimedOut,
        "{name}: created, without a leader"
    );
}

async fn lose_all(group: &mut Group) {
    for index in 0..3 {
        group.kill(index).await;
        group.lose_disk(index);
    }
}

async fn restore_at(group: &Group, index: usize, from: &Path) -> Result<Restored, String> {
    let restored = within("a restore", restore(&group.config(index), from)).await;
    restored.map_err(|error| format!("{error:#}"))
}

#[tokio::test]
async fn a_backup_brings_everything_back_and_watchers_go_on() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    FakeBroker::register(&group, leader, 1).await;
    create_topic(&group, leader, "kept").await;
    let follower = group.follower_of(leader);
    let revision = group.controller(leader).image().revision;
    let known = |image: &Arc<ClusterImage>| image.revision >= revision;
    let at_backup = group.image(follower, "all", known).await;
    let backup = back_up(&group, follower, "a.backup").await;
    create_topic(&group, leader, "newer").await;
    let mut admin = group.admin(leader);
    let allocate = v1::AllocateProducerIdsRequest { count: 10 };
    let last_id = admin
        .allocate_producer_ids(allocate)
        .await
        .unwrap()
        .into_inner()
        .first
        + 9;
    let mut watcher = Watcher::open(group.channel(follower), ClusterImage::default()).await;
    let has_newer = |image: &ClusterImage| image.topic_by_name("newer").is_some();
    watcher.until("the newer topic", has_newer).await;
    lose_all(&mut group).await;
    for index in 0..3 {
        let restored = restore_at(&group, index, &backup).await.unwrap();
        assert_eq!((restored.revision, restored.topic_count), (revision, 1));
    }
    for index in 0..3 {
        group.restart(index).await;
    }
    let leader = group.leader().await;

    // Who followed the cluster before goes on with the image that it gets now.
    let before = watcher.image.clone();
    let mut watcher = Watcher::open(group.channel(leader), before.clone()).await;
    watcher
        .until("an image after the restore", |image| {
            !image.restores.is_empty()
        })
        .await;
    let image = &watcher.image;
    assert_eq!(image.cluster_id, before.cluster_id);
    assert!(image.revision > before.revision);
    assert_eq!(image.restores[0].backup_revision, revision);
    assert!(image.is_forgotten(before.revision));
    let (kept, was) = (image.topic_by_name("kept"), at_backup.topic_by_name("kept"));
    assert_eq!(kept.unwrap().topic_id, was.unwrap().topic_id);
    assert!(image.topic_by_name("newer").is_none());
    assert_eq!(image.controllers.len(), 3);
    let mut admin = group.admin(leader);
    let first_id = admin
        .allocate_producer_ids(allocate)
        .await
        .unwrap()
        .into_inner()
        .first;
    assert!(first_id > last_id, "{first_id} {last_id}");
    FakeBroker::register(&group, leader, 1).await;
    create_topic(&group, leader, "after").await;

    // A disk that is lost now gets the restored state from the others, not only what came after it.
    let lost = group.follower_of(leader);
    group.kill(lost).await;
    group.lose_disk(lost);
    group.restart(lost).await;
    group
        .until("a vote for the new disk", |group| {
            group.controller(lost).node().is_settled()
        })
        .await;
    let revision = group.controller(leader).image().revision;
    let image = group
        .image(lost, "all", |image| image.revision >= revision)
        .await;
    assert_eq!(image, group.controller(leader).image());
    assert!(image.topic_by_name("kept").is_some() && image.topic_by_name("after").is_some());
    // The same backup once more: what came between the two restores is forgotten as well.
    let second = image.revision;
    lose_all(&mut group).await;
    for index in 0..3 {
        restore_at(&group, index, &backup).await.unwrap();
        group.restart(index).await;
    }
    let leader = group.leader().await;
    let image = group.controller(leader).image();
    assert!(image.revision > second && image.is_forgotten(second));
}

#[tokio::test]
async fn a_controller_gives_two_backups_at_a_time() {
    let group = Group::start(1).await;
    let router = rest_of(&group, group.leader().await);
    // Large enough to wait for who reads it.
    let mut under_way = vec![ask(&router).await, ask(&router).await];
    for answer in &under_way {
        assert_eq!(answer.status(), StatusCode::OK);
    }
    let third = ask(&router).await;
    assert_eq!(third.status(), StatusCode::SERVICE_UNAVAILABLE);
    // One client leaves; the other takes its backup.
    drop(under_way.pop());
    until("a place, after a client left", async || {
        (ask(&router).await.status() == StatusCode::OK).then_some(())
    })
    .await;
    let body = under_way.remove(0).into_body();
    assert!(!to_bytes(body, 100_000_000).await.unwrap().is_empty());
    until("a place, after a backup was taken", async || {
        (ask(&router).await.status() == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test]
async fn only_controllers_of_the_same_backup_found_a_group() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    FakeBroker::register(&group, leader, 1).await;
    let (first, second) = (
        back_up(&group, leader, "first.backup").await,
        back_up(&group, leader, "second.backup").await,
    );
    lose_all(&mut group).await;
    // Nothing, and two backups of the very same revision.
    restore_at(&group, 1, &first).await.unwrap();
    restore_at(&group, 2, &second).await.unwrap();
    for index in 0..3 {
        group.restart(index).await;
    }
    for (index, other) in [
        (0, "controller 2 from backup"),
        (1, "controller 1 from nothing"),
    ] {
        until_readiness_says(&group, index, other).await;
    }
    for index in 0..3 {
        group.kill(index).await;
        group.lose_disk(index);
        restore_at(&group, index, &first).await.unwrap();
    }
    for index in 0..3 {
        group.restart(index).await;
    }
    group.leader().await;
}

#[tokio::test]
async fn what_cannot_be_restored_is_refused_and_leaves_nothing() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    FakeBroker::register(&group, leader, 1).await;
    create_topic(&group, leader, "t").await;
    let backup = back_up(&group, leader, "good.backup").await;
    let why = restore_at(&group, 0, &backup).await.unwrap_err();
    assert!(why.contains("is not empty"), "{why}");
    let database = group.config(0).data_dir.join("controller.db");
    let path = |name: &str| backup.with_file_name(name);
    let good = std::fs::read(&backup).unwrap();
    // A database that is none of ours, bytes that are no database, a part, and changed contents.
    std::fs::copy(&database, path("database")).unwrap();
    std::fs::write(path("text"), "not a database").unwrap();
    std::fs::write(path("part"), &good[..good.len() / 2]).unwrap();
    let at = good
        .windows(9)
        .position(|bytes| bytes == b"broker1:1")
        .unwrap();
    let mut changed = good.clone();
    changed[at] = b'c';
    std::fs::write(path("changed"), changed).unwrap();
    group.kill(0).await;
    group.lose_disk(0);
    for (name, expected) in [
        ("none", "cannot copy"),
        ("text", "damaged, or no backup"),
        ("part", "damaged, or no backup"),
        ("changed", "its checksum is wrong"),
        ("database", "it is no backup"),
    ] {
        let why = restore_at(&group, 0, &path(name)).await.unwrap_err();
        assert!(why.contains(expected), "{name}: {why}");
        let left = std::fs::read_dir(group.config(0).data_dir).unwrap().count();
        assert_eq!(left, 0, "{name} left something");
    }
    restore_at(&group, 0, &backup).await.unwrap();
    // The others run: a restored state does not come into a group that exists.
    group.restart(0).await;
    until_readiness_says(&group, 0, "belongs to a group already").await;
}
