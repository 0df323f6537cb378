//! Leaders whose Raft is closed: they lead on in their term in the process that won it, and only there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chronik_types::offset::Offset;
use openraft::raft::{AppendEntriesRequest, VoteRequest};

use super::{NOW, last_log_id, to_rest};
use crate::peers::RaftEndpoint;
use crate::replica::engine::EngineStatus;
use crate::replica::raft_config::TypeConfig;
use crate::replica::test_batches::{idempotent, value};
use crate::replica::test_cluster::{Cluster, LIMIT};
use crate::replica::{AppendError, Replica};
use crate::test_wait::{until, wait_for};

/// A leader at rest, whose followers have its one record.
async fn resting_leader() -> Cluster {
    let cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    cluster.wait_for_watermark(2, 1).await;
    to_rest(cluster.replica(0)).await;
    cluster
}

/// Asks a resting replica for its vote, as a rival that has its whole log.
async fn lose_vote(replica: &Replica, cluster: &Cluster, rival: usize) {
    let mut vote = replica.vote();
    vote.leader_id.term += 1;
    vote.leader_id.voted_for = cluster.nodes[rival].id;
    vote.committed = false;
    let request = VoteRequest::new(vote, last_log_id(replica));
    let answer = RaftEndpoint::vote(replica, request, false).await.unwrap();
    assert!(answer.vote_granted, "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_at_rest_leads_on_in_its_term_for_the_next_record() {
    let mut cluster = resting_leader().await;
    let leader = cluster.replica(0).clone();
    let (vote, before) = (leader.vote(), *leader.leadership().borrow());
    assert!(
        before.is_leader && before.ready && vote.committed,
        "{before:?}"
    );
    let progress = leader.progress().expect("it leads");
    assert_eq!(progress.last_index, last_log_id(&leader).map(|id| id.index));
    assert_eq!(progress.followers.len(), 2);
    for follower in &progress.followers {
        assert_eq!(follower.matched, progress.last_index);
    }
    for n in [1, 2] {
        to_rest(cluster.replica(n)).await;
    }
    let mut leadership = leader.leadership();
    leadership.borrow_and_update();
    assert_eq!(cluster.ack(0, value("b")).await, 1);
    assert_eq!(leader.vote(), vote, "no election");
    assert!(!leadership.has_changed().unwrap(), "nobody noticed");
    cluster.wait_for_watermark(1, 2).await;
    cluster.wait_for_watermark(2, 2).await;
    // And again, with the lease of an instance that has just begun.
    to_rest(&leader).await;
    assert!(leader.leads_still(before.leader_epoch).await);
    assert_eq!(leader.engine().status(), EngineStatus::Open);
    let deadline = tokio::time::Instant::now() + LIMIT;
    to_rest(&leader).await;
    let start = leader.raise_log_start(Some(Offset(1)), deadline).await;
    assert_eq!(start.unwrap(), Offset(1));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_at_rest_votes_for_another_and_leads_no_more() {
    let mut cluster = resting_leader().await;
    let leader = cluster.replica(0).clone();
    lose_vote(&leader, &cluster, 1).await;
    let now = *leader.leadership().borrow();
    assert!(!now.is_leader && now.leader.is_none(), "{now:?}");
    assert_eq!(leader.progress(), None);
    assert_eq!(leader.engine().status(), EngineStatus::AtRest);
    let refused = cluster
        .produce(0, value("b"), crate::replica::Acks::All, LIMIT)
        .await;
    assert!(matches!(refused, Err(AppendError::NotLeader { .. })));
    // Opened now, it is no leader either.
    drop(leader.wake().await.unwrap());
    assert!(!leader.leadership().borrow().is_leader);
    cluster.elect(1).await;
    assert_eq!(cluster.ack(1, value("c")).await, 1);
    cluster.wait_for_watermark(0, 2).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_at_rest_steps_down() {
    let mut cluster = resting_leader().await;
    let leader = cluster.replica(0).clone();
    let epoch = leader.leadership().borrow().leader_epoch;
    leader.step_down().await;
    let now = *leader.leadership().borrow();
    assert!(!now.is_leader && now.leader.is_none(), "{now:?}");
    assert_eq!(now.leader_epoch, epoch);
    drop(leader.wake().await.unwrap());
    assert!(!leader.leadership().borrow().is_leader);
    cluster.elect(0).await;
    cluster.ack(0, value("b")).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_nobody_leads_on() {
    for power_fails in [false, true] {
        let mut cluster = resting_leader().await;
        let epoch = cluster.replica(0).leadership().borrow().leader_epoch;
        match power_fails {
            true => cluster.crash(0).await,
            false => cluster.stop(0).await,
        }
        cluster.open(0).await;
        let back = cluster.replica(0).clone();
        let now = *back.leadership().borrow();
        assert!(!now.is_leader && now.leader.is_none(), "{now:?}");
        assert_eq!(now.leader_epoch, epoch, "it knows its term");
        drop(back.wake().await.unwrap());
        assert!(!back.leadership().borrow().is_leader);
        cluster.elect(0).await;
        assert!(cluster.replica(0).leadership().borrow().leader_epoch > epoch);
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_follower_lacks_something_stays_open() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.router.cut(cluster.nodes[2].id);
    cluster.ack(0, value("a")).await;
    cluster.wait_for_watermark(1, 1).await;
    let leader = cluster.replica(0).clone();
    let nobody = Arc::default();
    assert!(!leader.engine().close_if_idle(NOW, &nobody).await);
    assert_eq!(leader.engine().status(), EngineStatus::Open);
    // If it is away, nobody waits for it.
    let away = Arc::new(BTreeSet::from([cluster.nodes[2].id.broker_id]));
    let closed = async || {
        leader
            .engine()
            .close_if_idle(NOW, &away)
            .await
            .then_some(())
    };
    wait_for("it rests", closed).await;
    let matched = |leader: &Replica| {
        let progress = leader.progress().unwrap();
        let followers = progress.followers.iter();
        followers.map(|f| f.matched).collect::<Vec<_>>()
    };
    let last = last_log_id(&leader).map(|log_id| log_id.index);
    let before = matched(&leader);
    assert_eq!(before[0], last);
    assert!(before[1] < last, "{before:?}");
    let (nobody, away) = (BTreeSet::new(), &*away);
    let lagging = cluster.nodes[2].id;
    assert!(leader.engine().behind_at_rest(&nobody).contains(&lagging));
    assert!(!leader.engine().behind_at_rest(away).contains(&lagging));
    cluster.router.heal();
    drop(leader.wake().await.unwrap());
    cluster.wait_for_watermark(2, 1).await;
    to_rest(&leader).await;
    assert_eq!(matched(&leader), [last, last]);
    // Until they have said that they know that all is committed.
    let last = last_log_id(&leader).unwrap();
    for n in [1, 2] {
        let follower = cluster.nodes[n].id;
        assert!(leader.engine().behind_at_rest(&nobody).contains(&follower));
        leader.engine().matched_at_rest(follower, last, true);
    }
    assert_eq!(leader.engine().behind_at_rest(&nobody), []);
    // A restarted one may have forgotten.
    let back = BTreeSet::from([lagging.broker_id]);
    leader.engine().unsure_at_rest(&back);
    assert_eq!(leader.engine().behind_at_rest(&nobody), [lagging]);
    // An answer about less than there is says nothing of the rest.
    let mut before = last;
    before.index -= 1;
    leader.engine().matched_at_rest(lagging, before, true);
    assert_eq!(leader.engine().behind_at_rest(&nobody), [lagging]);
    leader.engine().matched_at_rest(lagging, last, true);
    assert_eq!(leader.engine().behind_at_rest(&nobody), []);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_remembers_little_when_it_goes_to_rest() {
    let mut cluster = Cluster::start(3, 2).await;
    for n in 0..40 {
        cluster.ack(0, value(&n.to_string())).await;
    }
    let leader = cluster.replica(0).clone();
    let remembered = || {
        let last = leader.log().last_entry_id().map_or(0, |(index, _)| index);
        last - leader.log().first_index()
    };
    // Not while a follower lacks something.
    cluster.router.cut(cluster.nodes[2].id);
    cluster.ack(0, value("more")).await;
    let nobody = BTreeSet::new();
    leader.purge_before_rest(NOW).await.unwrap();
    assert!(remembered() > 40, "{}", remembered());
    cluster.router.heal();
    for n in [1, 2] {
        cluster.wait_for_watermark(n, 41).await;
    }
    cluster.wait_for_followers(0).await;
    // It does not count as used by that, and closes at once.
    let idle = Duration::from_millis(20);
    until("it was not used", || leader.engine().idle_for() >= idle).await;
    leader.purge_before_rest(idle).await.unwrap();
    assert_eq!(remembered(), 0);
    assert!(leader.engine().close_if_idle(idle, &Arc::new(nobody)).await);
    cluster.router.cut(cluster.nodes[2].id);
    assert_eq!(cluster.ack(0, value("b")).await, 41);
    cluster.router.heal();
    for n in [0, 1, 2] {
        cluster.wait_for_watermark(n, 42).await;
        assert_eq!(cluster.read_all(n).await.len(), 42);
    }
    cluster.stop_all().await;
}

/// What a follower did not save before its power failed it applies again when its leader speaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_lost_power_applies_at_rest_what_holds_no_records() {
    for has_records in [false, true] {
        let mut cluster = Cluster::start(3, 2).await;
        if has_records {
            cluster.ack(0, value("a")).await;
        }
        cluster.wait_for_followers(0).await;
        let leader = cluster.replica(0).clone();
        let vote = leader.vote();
        let last = last_log_id(&leader);
        cluster.crash(1).await;
        cluster.open(1).await;
        let back = cluster.replica(1).clone();
        assert_eq!(last_log_id(&back), last);
        assert_eq!(back.state.applied_index(), None, "nothing was saved");
        let message = AppendEntriesRequest::<TypeConfig> {
            vote,
            prev_log_id: last,
            entries: Vec::new(),
            leader_commit: last,
        };
        let answer = back.engine().follow_at_rest(&message).await;
        match has_records {
            true => assert_eq!(answer, None, "records are Raft's to apply"),
            false => {
                assert_eq!(answer, Some(Ok(last)));
                let index = last.map(|log_id| log_id.index);
                let known = (back.log().committed(), back.state.applied_index());
                // If it had known the commit before, the next message brings it.
                assert!(
                    known == (index, index) || known == (index, None),
                    "{known:?}"
                );
                assert!(back.engine().stand(0).await.is_some(), "it may campaign");
            }
        }
        cluster.stop_all().await;
    }
}

/// Raft itself searches the followers' logs anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_leader_knew_of_its_followers_holds_when_it_is_opened() {
    let mut cluster = Cluster::start(3, 2).await;
    for n in 0..40 {
        cluster.ack(0, value(&n.to_string())).await;
    }
    for n in [1, 2] {
        cluster.wait_for_watermark(n, 40).await;
    }
    let leader = cluster.replica(0).clone();
    to_rest(&leader).await;
    let known = leader.progress();
    assert!(known.is_some());
    for n in [1, 2] {
        cluster.router.cut(cluster.nodes[n].id);
    }
    let open = leader.wake().await.unwrap();
    assert_eq!(leader.progress(), known);
    // It rests again by what it knows.
    drop(open);
    to_rest(&leader).await;
    assert_eq!(leader.progress(), known);
    cluster.router.heal();
    cluster.ack(0, value("more")).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_is_answered_by_a_leader_at_rest_that_needs_all_in_sync() {
    let mut cluster = Cluster::start(3, 3).await;
    let batch = idempotent(9, 0, 0, 1);
    assert_eq!(cluster.ack(0, batch.clone()).await, 0);
    for n in [1, 2] {
        cluster.wait_for_watermark(n, 1).await;
    }
    let leader = cluster.replica(0).clone();
    to_rest(&leader).await;
    let (vote, opened) = (leader.vote(), leader.engine().opened());
    assert_eq!(cluster.ack(0, batch).await, 0);
    assert_eq!((leader.vote(), leader.engine().opened()), (vote, opened));
    cluster.stop_all().await;
}

/// Replica 1 wins without its Raft; the message that begins its term.
async fn win(cluster: &Cluster) -> AppendEntriesRequest<TypeConfig> {
    for n in [1, 2] {
        to_rest(cluster.replica(n)).await;
    }
    let next = cluster.replica(1);
    let before = next.vote().leader_id.term;
    let candidacy = next.engine().stand(before + 4).await.unwrap();
    assert_eq!(candidacy.vote.leader_id.term, before + 5);
    assert_eq!(candidacy.voters.len(), 3);
    let request = candidacy.request(true);
    let answer = RaftEndpoint::vote(&**cluster.replica(0), request, false).await;
    assert!(answer.unwrap().vote_granted);
    let message = next.engine().win(&candidacy).await.unwrap();
    assert!(next.engine().win(&candidacy).await.is_none(), "it is won");
    assert_eq!(message.entries.len(), 1);
    let now = *next.leadership().borrow();
    assert!(now.is_leader && !now.ready, "{now:?}");
    assert!(next.engine().speak_at_rest().is_none());
    message
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_election_at_rest_makes_a_leader_also_where_one_is_away() {
    let mut cluster = resting_leader().await;
    let message = win(&cluster).await;
    let (old, next) = (cluster.replica(0).clone(), cluster.replica(1).clone());
    let first = message.entries[0].log_id;
    let answer = old.engine().follow_at_rest(&message).await.unwrap();
    assert_eq!(answer.unwrap(), Some(first));
    next.engine()
        .matched_at_rest(cluster.nodes[0].id, first, false);
    assert!(next.engine().commit_at_rest(first).await);
    assert!(next.leadership().borrow().ready);
    assert_eq!(next.engine().speak_at_rest().unwrap().vote, message.vote);
    let progress = next.progress().unwrap();
    let matched: Vec<Option<u64>> = progress.followers.iter().map(|f| f.matched).collect();
    assert_eq!(matched, [Some(first.index), None]);
    for replica in [&old, &next] {
        assert_eq!(replica.engine().status(), EngineStatus::AtRest);
    }
    cluster.router.cut(cluster.nodes[2].id);
    assert_eq!(cluster.ack(1, value("b")).await, 1);
    assert_eq!(next.vote(), message.vote, "no other election");
    cluster.wait_for_watermark(0, 2).await;
    cluster.router.heal();
    cluster.wait_for_watermark(2, 2).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_that_is_opened_in_the_middle_of_an_election_campaigns_anew() {
    for one_has_it in [false, true] {
        let mut cluster = resting_leader().await;
        let message = win(&cluster).await;
        let next = cluster.replica(1).clone();
        let first = message.entries[0].log_id;
        if one_has_it {
            let answer = cluster.replica(0).engine().follow_at_rest(&message).await;
            assert_eq!(answer.unwrap().unwrap(), Some(first));
        }
        drop(next.wake().await.unwrap());
        assert!(!next.engine().commit_at_rest(first).await);
        let led = next.leadership();
        until("it leads no more", || !led.borrow().is_leader).await;
        assert_eq!(next.progress(), None);
        cluster.elect(1).await;
        assert!(next.vote() > message.vote, "another term");
        assert_eq!(cluster.ack(1, value("b")).await, 1);
        cluster.wait_for_watermark(0, 2).await;
        cluster.wait_for_watermark(2, 2).await;
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_that_has_voted_for_another_meanwhile_does_not_win() {
    let mut cluster = resting_leader().await;
    to_rest(cluster.replica(1)).await;
    let next = cluster.replica(1).clone();
    let candidacy = next.engine().stand(0).await.unwrap();
    lose_vote(&next, &cluster, 2).await;
    assert!(next.engine().win(&candidacy).await.is_none());
    assert!(!next.leadership().borrow().is_leader);
    // Nor one whose Raft was opened, which does not know of the campaign.
    let leader = cluster.replica(0).clone();
    assert!(leader.engine().stand(0).await.is_none(), "it leads");
    let candidacy = next.engine().stand(0).await.unwrap();
    let open = next.wake().await.unwrap();
    assert!(next.engine().win(&candidacy).await.is_none());
    drop(open);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_term_of_another_that_was_heard_of_is_not_taken_again() {
    let mut cluster = resting_leader().await;
    let follower = cluster.replica(1).clone();
    to_rest(&follower).await;
    let mut other = follower.vote();
    other.leader_id.term += 6;
    other.leader_id.voted_for = cluster.nodes[2].id;
    other.committed = true;
    follower.engine().outvoted(other).await;
    let now = *follower.leadership().borrow();
    assert!(
        now.leader.is_none(),
        "it has not heard from that leader: {now:?}"
    );
    let candidacy = follower.engine().stand(0).await.unwrap();
    assert_eq!(candidacy.vote.leader_id.term, other.leader_id.term + 1);
    cluster.stop_all().await;
}

/// On one thread, so that what is spawned begins only when this test waits.
#[tokio::test]
async fn no_term_is_taken_for_a_caller_that_is_gone() {
    let mut cluster = resting_leader().await;
    let follower = cluster.replica(1).clone();
    to_rest(&follower).await;
    let (engine, held) = (follower.engine(), follower.vote());
    let mut given_up = Box::pin(engine.stand(0));
    assert!(futures::poll!(&mut given_up).is_pending());
    drop(given_up);
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    // Behind it in the turn.
    assert!(engine.candidacy(0).await.is_some());
    assert_eq!(follower.vote(), held);
    assert!(engine.stand(0).await.is_some());
    assert!(follower.vote() > held);
    cluster.stop_all().await;
}

/// Everybody is closed between any two records, and leads change hands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_while_leaders_come_and_go() {
    let mut cluster = Cluster::start(3, 2).await;
    for n in 0..60 {
        let leader = n / 20;
        if n % 20 == 0 && n > 0 {
            drop(cluster.replica(leader - 1).wake().await.unwrap());
            cluster.wait_for_followers(leader - 1).await;
            cluster.elect(leader).await;
        }
        assert_eq!(cluster.ack(leader, value(&n.to_string())).await, n as i64);
        if n % 3 == 0 {
            for replica in 0..3 {
                cluster.wait_for_watermark(replica, n as i64 + 1).await;
            }
            to_rest(cluster.replica(leader)).await;
        }
    }
    let expected = cluster.read_all(2).await;
    for n in [0, 1] {
        let replica = cluster.replica(n).clone();
        until("all have all", || replica.high_watermark().0 == 60).await;
        assert_eq!(cluster.read_all(n).await, expected);
    }
    cluster.stop_all().await;
}
