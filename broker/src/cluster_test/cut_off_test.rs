//! Three real brokers whose ways to each other are cut, in one direction or both: whoever leads goes on
//! only as long as a majority can answer it, and whoever comes back disturbs nobody.

use std::time::{Duration, Instant};

use chronik_proto::v1;
use tokio::time::{MissedTickBehavior, interval};

use super::harness::{BROKERS, Cluster, all_in_sync};
use super::ways::{Way, both_ways};
use crate::fake_controller::{FakeController, Serving};
use crate::test_wait::{stays, until};

/// One partition with a record in it, its leader, and the others.
struct Scene {
    cluster: Cluster,
    leader: i32,
    others: Vec<i32>,
}

const GROUP: u64 = 1;

async fn scene(folder: &std::path::Path, serving: &Serving) -> Scene {
    let cluster = Cluster::start(folder, serving);
    // Whoever is elected first may lead: only what a test cuts shall move leadership.
    serving.controller.keep_leaders();
    serving.controller.create_topic("t", 1, &BROKERS);
    all_in_sync(&serving.controller, "a leader").await;
    let leader = cluster.produce(GROUP, "one").await;
    let others = BROKERS.into_iter().filter(|id| *id != leader).collect();
    Scene {
        cluster,
        leader,
        others,
    }
}

impl Scene {
    /// How the broker answers one produce request with acks=all.
    async fn ask(&self, id: i32, value: &str) -> v1::PartitionError {
        self.cluster.ask_to_produce(id, GROUP, value).await
    }

    fn term(&self, id: i32) -> u64 {
        let replicas = self.cluster.brokers[&id].replicas.all();
        replicas[0].vote().leader_id.term
    }

    fn leads(&self, id: i32) -> bool {
        let replicas = self.cluster.brokers[&id].replicas.all();
        replicas[0].leadership().borrow().is_leader
    }

    /// One of the others takes the value.
    async fn produce_elsewhere(&self, value: &str) -> i32 {
        self.cluster.produce_at(&self.others, GROUP, value).await
    }

    /// Heals the network; nobody is disturbed, everybody has the same.
    async fn heal(self, controller: &FakeController, expected: &[&str]) {
        let leader = *BROKERS
            .iter()
            .find(|id| self.leads(**id) && **id != self.leader)
            .unwrap_or(&self.leader);
        let term = self.term(leader);
        self.cluster.ways.heal();
        all_in_sync(controller, "everybody is back").await;
        let others: Vec<i32> = BROKERS.into_iter().filter(|id| *id != leader).collect();
        until("everybody follows", || {
            others
                .iter()
                .all(|id| self.term(*id) == term && !self.leads(*id))
        })
        .await;
        assert!(
            self.leads(leader) && self.term(leader) == term,
            "no election"
        );
        assert_eq!(
            self.cluster.read(leader, GROUP, expected.len()).await,
            expected
        );
        self.cluster.end();
    }
}

/// The leader leads no more after this: its lease, and some slack for a busy machine.
const STEP_DOWN_BOUND: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_acks_nothing_and_steps_down() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let scene = scene(folder.path(), &serving).await;
    let old = scene.leader;
    scene.cluster.ways.cut(&both_ways(old, &scene.others));
    let begun = Instant::now();
    assert_eq!(scene.ask(old, "lost").await, v1::PartitionError::TimedOut);
    scene.produce_elsewhere("two").await;
    println!(
        "from the cut to the next acked write elsewhere: {:?}",
        begun.elapsed()
    );
    until("it steps down", || !scene.leads(old)).await;
    println!(
        "from the cut to the end of the old leadership: {:?}",
        begun.elapsed()
    );
    assert!(begun.elapsed() < STEP_DOWN_BOUND);
    assert_eq!(
        scene.ask(old, "lost too").await,
        v1::PartitionError::NotLeader
    );
    // However long it is alone, it starts no election that it cannot win.
    let term = scene.term(old);
    stays("its term", Duration::from_secs(2), || {
        scene.term(old) == term
    })
    .await;
    scene.heal(&serving.controller, &["one", "two"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hears_nobody_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let scene = scene(folder.path(), &serving).await;
    let old = scene.leader;
    let deaf: Vec<Way> = scene.others.iter().map(|other| (*other, old)).collect();
    scene.cluster.ways.cut(&deaf);
    // What it sends arrives, and may be committed under the next leader: the outcome is unknown.
    let unknown = scene.ask(old, "unknown").await;
    assert_eq!(unknown, v1::PartitionError::TimedOut);
    let next = scene.produce_elsewhere("two").await;
    let now = scene.cluster.read(next, GROUP, 2).await;
    let expected = [["one", "unknown", "two"].as_slice(), &["one", "two"]];
    assert!(
        expected.contains(
            &now.iter()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .as_slice()
        ),
        "{now:?}"
    );
    until("it steps down", || !scene.leads(old)).await;
    let now: Vec<&str> = now.iter().map(String::as_str).collect();
    scene.heal(&serving.controller, &now).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_nobody_hears_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let scene = scene(folder.path(), &serving).await;
    let old = scene.leader;
    let mute: Vec<Way> = scene.others.iter().map(|other| (old, *other)).collect();
    scene.cluster.ways.cut(&mute);
    let next = scene.produce_elsewhere("two").await;
    until("it steps down", || !scene.leads(old)).await;
    assert_ne!(scene.ask(old, "lost").await, v1::PartitionError::None);
    assert_eq!(scene.cluster.read(next, GROUP, 2).await, ["one", "two"]);
    scene.heal(&serving.controller, &["one", "two"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_is_cut_off_from_its_leader_alone_disturbs_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let serving = FakeController::serve().await;
    let scene = scene(folder.path(), &serving).await;
    let (leader, follower) = (scene.leader, scene.others[0]);
    let term = scene.term(leader);
    scene.cluster.ways.cut(&both_ways(leader, &[follower]));
    // Longer than any lease and any delay of a campaign; the third broker hears the leader.
    let begun = Instant::now();
    let mut pace = interval(Duration::from_millis(200));
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut count = 0;
    while begun.elapsed() < Duration::from_secs(8) {
        pace.tick().await;
        let value = format!("more {count}");
        // Time for a slow disk; nothing else may delay it.
        let limit = Duration::from_secs(20);
        let asked = scene
            .cluster
            .ask_to_produce_within(limit, leader, GROUP, &value);
        assert_eq!(asked.await, v1::PartitionError::None);
        count += 1;
    }
    assert!(
        scene.leads(leader) && scene.term(leader) == term,
        "no election"
    );
    let mut expected = vec!["one".to_owned()];
    expected.extend((0..count).map(|n| format!("more {n}")));
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    scene.heal(&serving.controller, &expected).await;
}
