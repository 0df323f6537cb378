//! Groups when leadership comes and goes: what the log has survives, who waits learns that this is
//! not its coordinator any more, and nothing that the log holds stops the groups.

use tokio::task::JoinSet;

use super::*;
use crate::consumer_group::batch::{self, Record};

fn record(key: &'static [u8], value: Option<&'static [u8]>) -> Record {
    Record {
        key: Bytes::from_static(key),
        value: value.map(Bytes::from_static),
    }
}

#[tokio::test]
async fn many_members_share_one_generation_and_survive_a_failover() {
    let broker = Broker::leading(GroupConfig {
        initial_rebalance_delay_ms: 300,
        ..config()
    })
    .await;
    let mut clients = JoinSet::new();
    for n in 0..200 {
        clients.spawn(member(broker.get(), format!("member-{n:03}")));
    }
    let members: Vec<_> = within(clients.join_all()).await;
    assert_eq!(
        members
            .iter()
            .filter(|(joined, _)| !joined.members.is_empty())
            .count(),
        1
    );
    for (joined, synced) in &members {
        assert_eq!(joined.generation, members[0].0.generation);
        assert_eq!(synced.assignment, joined.member_id.as_bytes());
        let who = Membership {
            generation: joined.generation,
            member_id: joined.member_id.clone(),
            group_instance_id: None,
        };
        let commits = vec![commit("t", 1, 5), commit("u", 2, 6)];
        let outcomes = broker.get().commit("g", &who, commits, None).await.unwrap();
        assert_eq!(outcomes, vec![Ok(()), Ok(())]);
    }

    let before = (
        broker.get().describe("g"),
        broker.get().fetch_offsets("g", None),
    );
    let next = broker.fail_over(2).await;
    assert_eq!(
        (
            next.get().describe("g"),
            next.get().fetch_offsets("g", None)
        ),
        before
    );
    let description = before.0.unwrap();
    assert_eq!(
        (description.state, description.members.len()),
        ("Stable", 200)
    );
    let who = Membership {
        generation: members[9].0.generation,
        member_id: members[9].0.member_id.clone(),
        group_instance_id: None,
    };
    assert_eq!(next.get().heartbeat("g", &who), Ok(()));
    until("it leads no more", || !broker.get().is_leading()).await;
    assert_eq!(
        broker.get().heartbeat("g", &who),
        Err(GroupError::NotCoordinator)
    );
}

#[tokio::test]
async fn waiting_joins_learn_that_leadership_is_gone() {
    let broker = Broker::leading(GroupConfig {
        initial_rebalance_delay_ms: 60_000,
        ..config()
    })
    .await;
    let coordinator = broker.get();
    let waiting = tokio::spawn(async move { coordinator.join("g", join("", "a")).await });
    until("one member waits", || {
        broker
            .get()
            .describe("g")
            .is_ok_and(|g| g.members.len() == 1)
    })
    .await;
    broker.log.follow();
    let refused = within(waiting).await.unwrap().unwrap_err();
    assert_eq!(refused.error, GroupError::NotCoordinator);
}

#[tokio::test]
async fn while_the_log_is_read_the_answer_is_loading() {
    let broker = Broker::start(MemoryLog::new(), config());
    assert_eq!(broker.get().describe("g"), Err(GroupError::NotCoordinator));
    broker.log.push(batch::encode(&[record(b"?", None)], 1), 1);
    broker.log.hold_reads();
    broker.log.lead(1);
    until("the log is read", || {
        broker.get().describe("g") == Err(GroupError::Loading)
    })
    .await;
    broker.log.release_reads();
    broker.wait_until_leading().await;
    assert_eq!(broker.get().describe("g"), Err(GroupError::UnknownGroup));
}

#[tokio::test]
async fn a_new_leadership_reads_the_log_again() {
    let broker = Broker::leading(config()).await;
    commit_one(&broker.get(), 4).await.unwrap();
    // Another replica led in between and took a commit.
    let other = broker.fail_over(2).await;
    commit_one(&other.get(), 9).await.unwrap();
    other.log.follow();
    broker.log.lead(3);
    until("the commit is there", || {
        broker
            .get()
            .fetch_offsets("g", None)
            .is_ok_and(|f| f.len() == 1)
    })
    .await;
    assert_eq!(committed(&broker.get(), "g"), vec![("t".to_owned(), 0, 9)]);
}

#[tokio::test]
async fn strange_records_in_the_topic_do_not_stop_the_groups() {
    let log = MemoryLog::new();
    let strange = [
        record(b"", None),
        record(b"\0\x01\0\x05ab", Some(b"")),
        record(b"\0\x02\0\x01g", Some(b"\0\x63")),
        record(b"\0\x09new", Some(b"?")),
    ];
    log.push(batch::encode(&strange, 1), 1);
    let broker = Broker::start(log, config());
    broker.log.lead(2);
    broker.wait_until_leading().await;
    assert_eq!(broker.get().list(), Ok(vec![]));
    commit_one(&broker.get(), 8).await.unwrap();
    let next = broker.fail_over(3).await;
    assert_eq!(committed(&next.get(), "g"), vec![("t".to_owned(), 0, 8)]);
}
