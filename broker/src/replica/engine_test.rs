//! Raft instances that are closed and opened under a partition's feet.

mod at_rest_test;
mod leader_test;

use std::sync::Arc;
use std::time::Duration;

use futures::stream::StreamExt;
use openraft::raft::AppendEntriesRequest;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::append_session;
use super::engine::{EngineStatus, WakeError};
use super::queue::Acks;
use super::raft_config::LogId;
use super::test_batches::value;
use super::test_cluster::{Cluster, LIMIT};
use super::{AppendError, Replica};

const NOW: Duration = Duration::ZERO;

/// Closes the replica's Raft as soon as it may be.
async fn to_rest(replica: &Arc<Replica>) {
    let closed = async {
        while !replica.engine().close_if_idle(NOW, &Arc::default()).await {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, closed)
        .await
        .expect("the replica rests in time");
    assert_eq!(replica.engine().status(), EngineStatus::AtRest);
}

fn last_log_id(replica: &Replica) -> Option<LogId> {
    let (index, term) = replica.log().last_entry_id()?;
    Some(super::codec::log_id(term, index))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_at_rest_keeps_all_it_knows_and_opens_for_the_next_append() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    let follower = cluster.replica(1).clone();
    let (vote, leadership) = (follower.vote(), *follower.leadership().borrow());
    to_rest(&follower).await;
    assert_eq!(follower.vote(), vote);
    assert_eq!(*follower.leadership().borrow(), leadership);
    assert_eq!(leadership.leader, Some(cluster.nodes[0].id));
    assert_eq!(follower.high_watermark().0, 1);
    assert!(follower.raft().is_none());

    cluster.ack(0, value("b")).await;
    cluster.wait_for_watermark(1, 2).await;
    assert_eq!(follower.engine().status(), EngineStatus::Open);
    assert_eq!(follower.vote(), vote);
    cluster.stop_all().await;
    assert_eq!(follower.engine().status(), EngineStatus::Closed);
    assert!(matches!(follower.wake().await, Err(WakeError::Closed)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_use_or_not_settled_stays_open() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    // One that was used a moment ago, or is being used.
    let follower = cluster.replica(1).clone();
    assert!(
        !follower
            .engine()
            .close_if_idle(LIMIT, &Arc::default())
            .await
    );
    let handle = follower.raft().unwrap();
    assert!(!follower.engine().close_if_idle(NOW, &Arc::default()).await);
    drop(handle);
    to_rest(&follower).await;
    // One that has an entry of which it does not know that it is committed.
    cluster.wait_for_watermark(2, 1).await;
    cluster.router.cut(cluster.nodes[1].id);
    cluster.router.cut(cluster.nodes[2].id);
    let short = Duration::from_millis(300);
    let lost = cluster.produce(0, value("b"), Acks::All, short).await;
    assert_eq!(lost, Err(AppendError::TimedOut));
    assert!(
        !cluster
            .replica(0)
            .engine()
            .close_if_idle(NOW, &Arc::default())
            .await
    );
    cluster.router.heal();
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_ask_at_once_get_one_instance() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    let follower = cluster.replica(1).clone();
    for _ in 0..5 {
        let before = {
            let _open = follower.wake().await.unwrap();
            follower.engine().instance().unwrap().0
        };
        to_rest(&follower).await;
        let asking = (0..32).map(|turn| {
            let follower = follower.clone();
            tokio::spawn(async move {
                let wake = follower.wake();
                if turn % 4 == 0 {
                    // Those who give up undo nothing.
                    let _ = timeout(Duration::from_micros(50), wake).await;
                    return before + 1;
                }
                let _open = wake.await.unwrap();
                follower.engine().instance().unwrap().0
            })
        });
        for number in futures::future::join_all(asking).await {
            assert_eq!(number.unwrap(), before + 1);
        }
    }
    cluster.stop_all().await;
}

/// One session, with the follower closed between any two appends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_outlives_the_instances_that_serve_it() {
    let mut cluster = Cluster::start(3, 2).await;
    for n in 0..10 {
        cluster.ack(0, value(&n.to_string())).await;
    }
    cluster.wait_for_watermark(1, 10).await;
    // What follows the follower gets from this test alone, one by one.
    cluster.router.cut(cluster.nodes[1].id);
    for n in 10..20 {
        cluster.ack(0, value(&n.to_string())).await;
    }
    let leader = cluster.replica(0).clone();
    let last = last_log_id(&leader).unwrap();
    let follower = cluster.replica(1).clone();
    let (requests, receiver) = mpsc::channel(8);
    let requests_stream = ReceiverStream::new(receiver).boxed();
    let mut answers = append_session::answers(follower.engine().clone(), requests_stream);
    let vote = leader.vote();
    let term = super::codec::term(&last);
    let mut log_reader = super::log_store::LogStore::new(
        leader.log().clone(),
        Arc::default(),
        Arc::default(),
        CancellationToken::new(),
    );
    let opened = follower.engine().opened();
    for index in last.index - 10..last.index {
        use openraft::storage::RaftLogReader;
        to_rest(&follower).await;
        let entries = log_reader
            .try_get_log_entries(index + 1..index + 2)
            .await
            .unwrap();
        let request = AppendEntriesRequest {
            vote,
            prev_log_id: Some(super::codec::log_id(term, index)),
            entries,
            leader_commit: Some(last),
        };
        requests.send(request).await.unwrap();
        let answer = timeout(LIMIT, answers.next()).await.unwrap().unwrap();
        assert_eq!(
            answer.unwrap().unwrap(),
            Some(super::codec::log_id(term, index + 1))
        );
    }
    // The session that waits holds nothing open.
    to_rest(&follower).await;
    assert_eq!(follower.engine().opened(), opened + 10);
    drop(requests);
    assert!(timeout(LIMIT, answers.next()).await.unwrap().is_none());
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_while_instances_come_and_go() {
    let mut cluster = Cluster::start(3, 2).await;
    let resting = [0, 1, 2].map(|n| {
        let replica = cluster.replica(n).clone();
        tokio::spawn(async move {
            let mut closed = 0u32;
            loop {
                match replica.engine().status() {
                    EngineStatus::Closed => return closed,
                    _ => {
                        closed +=
                            u32::from(replica.engine().close_if_idle(NOW, &Arc::default()).await)
                    }
                }
                tokio::task::yield_now().await;
            }
        })
    });
    for n in 0..200 {
        assert_eq!(cluster.ack(0, value(&n.to_string())).await, n);
    }
    cluster.wait_for_watermark(1, 200).await;
    cluster.wait_for_watermark(2, 200).await;
    let expected = cluster.read_all(0).await;
    assert_eq!(cluster.read_all(1).await, expected);
    assert_eq!(cluster.read_all(2).await, expected);
    cluster.stop_all().await;
    for closed in futures::future::join_all(resting).await {
        assert!(closed.unwrap() > 0, "it never came to rest");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_steps_down_whatever_it_does() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_followers(0).await;
    for n in [1, 2] {
        cluster.router.cut(cluster.nodes[n].id);
    }
    let leader = cluster.replica(0).clone();
    let deadline = Instant::now() + LIMIT;
    let item = super::ProduceItem {
        records: value("b").into(),
        acks: Acks::All,
        deadline,
        leader_epoch: None,
        trace: None,
    };
    let waiting = leader.enqueue(item).unwrap();
    let epoch = leader.leadership().borrow().leader_epoch;
    let begun = Instant::now();
    leader.step_down().await;
    // Not known, or not even proposed when it stepped down.
    let outcome = waiting.until(deadline).await;
    assert!(
        matches!(
            outcome,
            Err(AppendError::TimedOut | AppendError::NotLeader { .. })
        ),
        "{outcome:?}"
    );
    assert!(
        begun.elapsed() < LIMIT / 2,
        "it does not wait for the request's time limit"
    );
    let now = *leader.leadership().borrow();
    assert!(!now.is_leader && now.leader.is_none());
    assert_eq!(
        now.leader_epoch, epoch,
        "it is the last epoch that it knows"
    );
    let refused = cluster.produce(0, value("c"), Acks::All, LIMIT).await;
    assert!(matches!(refused, Err(AppendError::NotLeader { .. })));
    cluster.router.heal();
    cluster.elect(1).await;
    cluster.ack(1, value("d")).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_ends_by_itself_is_opened_again() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    let follower = cluster.replica(1).clone();
    let number = follower.engine().instance().unwrap().0;
    follower.raft().unwrap().shutdown().await.unwrap();
    let failed = async {
        while follower.engine().status() != EngineStatus::Failed {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, failed).await.unwrap();
    // Until its time has come nothing opens it, so that one that always fails costs little.
    assert!(matches!(follower.wake().await, Err(WakeError::Failed)));
    let reopened = async {
        while follower
            .engine()
            .instance()
            .is_none_or(|(now, _)| now == number)
        {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, reopened).await.unwrap();
    cluster.ack(0, value("b")).await;
    cluster.wait_for_watermark(1, 2).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_disk_is_full_can_be_closed() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    cluster.set_disk_capacity(1, Some(1 << 20));
    let log = cluster.replica(1).log().clone();
    let known = async {
        while log.check_room(1).is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, known)
        .await
        .expect("the broker looks at its disk");
    cluster.ack(0, value("b")).await;
    let early = timeout(Duration::from_millis(300), cluster.wait_for_watermark(1, 2)).await;
    assert!(early.is_err(), "a full disk takes nothing");
    // Its Raft waits in the middle of an append.
    timeout(LIMIT, cluster.replica(1).step_down())
        .await
        .expect("the instance closes though its append has no room");
    timeout(LIMIT, cluster.replica(1).shutdown())
        .await
        .expect("the replica closes though its disk is full");
    cluster.set_disk_capacity(1, None);
    cluster.stop_all().await;
}
