//! The coordinator over a log in memory: many members, failover, unknown outcomes, expiry.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chronik_proto::v1;
use chronik_proto::v1::groups_server::Groups;
use chronik_types::id::RaftGroupId;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use uuid::Uuid;

use super::batch::{self, Record};
use super::config::GroupConfig;
use super::coordinator::{Commit, Coordinator, Membership};
use super::coordinators::Coordinators;
use super::memory_log::{Fault, MemoryLog};
use super::state::{GroupError, Join, JoinRefused, Joined, Sync, Synced};
use crate::rpc::groups::GroupsService;

const GROUP: RaftGroupId = RaftGroupId(7);
const LIMIT: Duration = Duration::from_secs(30);

fn config() -> GroupConfig {
    GroupConfig {
        initial_rebalance_delay_ms: 0,
        session_timeout_min_ms: 50,
        ..GroupConfig::default()
    }
}

/// A broker with one partition of `__consumer_offsets`.
struct Broker {
    coordinators: Coordinators,
    log: MemoryLog,
}

impl Broker {
    fn start(log: MemoryLog, config: GroupConfig) -> Broker {
        let coordinators = Coordinators::new(config, CancellationToken::new());
        coordinators.start(GROUP, log.clone());
        Broker { coordinators, log }
    }

    /// A broker that leads a new log.
    async fn leading(config: GroupConfig) -> Broker {
        let broker = Broker::start(MemoryLog::new(), config);
        broker.log.lead(1);
        broker.wait_until_leading().await;
        broker
    }

    async fn wait_until_leading(&self) {
        until(|| self.get().is_leading()).await;
    }

    fn get(&self) -> Arc<Coordinator> {
        self.coordinators.get(GROUP).unwrap()
    }

    /// Another broker takes over.
    async fn fail_over(&self, epoch: i32) -> Broker {
        self.log.follow();
        let next = Broker::start(self.log.replica(), config());
        next.log.lead(epoch);
        next.wait_until_leading().await;
        next
    }
}

async fn until(condition: impl Fn() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("in time")
}

fn join(id: &str, new: &str) -> Join {
    Join {
        member_id: id.to_owned(),
        new_member_id: new.to_owned(),
        group_instance_id: None,
        client_id: "client".to_owned(),
        client_host: "/127.0.0.1".to_owned(),
        session_timeout: Duration::from_secs(30),
        rebalance_timeout: Duration::from_secs(30),
        protocol_type: "consumer".to_owned(),
        protocols: vec![("range".to_owned(), Bytes::from(new.to_owned()))],
        require_known_member_id: false,
        supports_skip_assignment: true,
    }
}

fn commit(topic: &str, partition: i32, offset: i64) -> Commit {
    Commit {
        topic: topic.to_owned(),
        topic_id: Uuid::nil(),
        partition,
        offset,
        leader_epoch: 3,
        metadata: "m".to_owned(),
    }
}

fn outside() -> Membership {
    Membership {
        generation: -1,
        ..Membership::default()
    }
}

async fn commit_one(coordinator: &Coordinator, offset: i64) -> Result<(), GroupError> {
    let commits = vec![commit("t", 0, offset)];
    within(coordinator.commit("g", &outside(), commits, None))
        .await
        .unwrap()[0]
}

fn committed(coordinator: &Coordinator, group: &str) -> Vec<(String, i32, i64)> {
    let fetched = coordinator.fetch_offsets(group, None).unwrap();
    fetched
        .into_iter()
        .map(|f| (f.topic, f.partition, f.value.unwrap().offset))
        .collect()
}

/// One client: joins until it is in, gives assignments if it leads, and returns its own.
async fn member(coordinator: Arc<Coordinator>, name: String) -> (Joined, Synced) {
    let mut id = String::new();
    loop {
        let joined = match coordinator.join("g", join(&id, &name)).await {
            Ok(joined) => joined,
            Err(JoinRefused {
                error: GroupError::RebalanceInProgress,
                ..
            }) => continue,
            Err(other) => panic!("{other:?}"),
        };
        id = joined.member_id.clone();
        let assign = |m: &super::state::JoinedMember| (m.member_id.clone(), m.metadata.clone());
        let sync = Sync {
            generation: joined.generation,
            member_id: id.clone(),
            assignments: joined.members.iter().map(assign).collect(),
            ..Sync::default()
        };
        match coordinator.sync("g", sync).await {
            Ok(synced) => return (joined, synced),
            Err(GroupError::RebalanceInProgress | GroupError::IllegalGeneration) => {}
            Err(other) => panic!("{other:?}"),
        }
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
    until(|| !broker.get().is_leading()).await;
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
    until(|| {
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
    until(|| broker.get().describe("g") == Err(GroupError::Loading)).await;
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
    until(|| {
        broker
            .get()
            .fetch_offsets("g", None)
            .is_ok_and(|f| f.len() == 1)
    })
    .await;
    assert_eq!(committed(&broker.get(), "g"), vec![("t".to_owned(), 0, 9)]);
}

#[tokio::test]
async fn a_commit_whose_outcome_was_unknown_shows_when_the_log_has_it() {
    let broker = Broker::leading(config()).await;
    let coordinator = broker.get();
    commit_one(&coordinator, 1).await.unwrap();
    broker.log.fail_next(Fault::UnknownAppended);
    let other = vec![commit("other", 0, 2)];
    let outcome = within(coordinator.commit("g", &outside(), other, None))
        .await
        .unwrap();
    assert_eq!(outcome, vec![Err(GroupError::TimedOut)]);
    broker.log.fail_next(Fault::UnknownLost);
    assert_eq!(commit_one(&coordinator, 3).await, Err(GroupError::TimedOut));
    broker.log.fail_next(Fault::Refused);
    assert_eq!(commit_one(&coordinator, 4).await, Err(GroupError::TimedOut));
    assert_eq!(committed(&coordinator, "g"), vec![("t".to_owned(), 0, 1)]);

    commit_one(&coordinator, 5).await.unwrap();
    let now = committed(&coordinator, "g");
    assert_eq!(
        now,
        vec![("other".to_owned(), 0, 2), ("t".to_owned(), 0, 5)]
    );
    let next = broker.fail_over(2).await;
    assert_eq!(committed(&next.get(), "g"), now);
}

#[tokio::test]
async fn an_append_without_end_is_an_unknown_outcome_and_the_queue_is_bounded() {
    let config = GroupConfig {
        write_timeout_ms: 100,
        write_queue_max_bytes: 2_000,
        ..config()
    };
    let broker = Broker::leading(config).await;
    let coordinator = broker.get();
    broker.log.hold_appends();
    let mut clients = JoinSet::new();
    for n in 0..100 {
        let coordinator = coordinator.clone();
        clients.spawn(async move {
            let commits = vec![Commit {
                metadata: "x".repeat(100),
                ..commit("t", n, 1)
            }];
            coordinator.commit("g", &outside(), commits, None).await
        });
    }
    let outcomes = within(clients.join_all()).await;
    let refused = outcomes
        .iter()
        .filter(|o| **o == Err(GroupError::TimedOut))
        .count();
    let timed_out = outcomes
        .iter()
        .filter(|o| **o == Ok(vec![Err(GroupError::TimedOut)]))
        .count();
    assert_eq!(refused + timed_out, 100);
    assert!(
        refused >= 50 && timed_out >= 1,
        "{refused} refused, {timed_out} timed out"
    );
    broker.log.release_appends();
    commit_one(&coordinator, 2).await.unwrap();
}

#[tokio::test]
async fn a_dropped_call_leaves_a_member_that_times_out() {
    let broker = Broker::leading(config()).await;
    let coordinator = broker.get();
    let short = Join {
        session_timeout: Duration::from_millis(60),
        ..join("", "a")
    };
    let joined = within(coordinator.join("g", short.clone())).await.unwrap();
    // The sync's caller goes away while the log is slow.
    broker.log.hold_appends();
    let sync = Sync {
        generation: joined.generation,
        member_id: joined.member_id,
        assignments: vec![("a".to_owned(), Bytes::from_static(b"p0"))],
        ..Sync::default()
    };
    let call = tokio::time::timeout(Duration::from_millis(20), coordinator.sync("g", sync)).await;
    assert!(call.is_err());
    broker.log.release_appends();
    until(|| coordinator.describe("g").is_ok_and(|g| g.state == "Empty")).await;
    let next = broker.fail_over(2).await;
    until(|| next.get().describe("g").is_ok_and(|g| g.state == "Empty")).await;
}

#[tokio::test]
async fn the_last_leave_is_in_the_log_before_its_answer() {
    let broker = Broker::leading(config()).await;
    let (joined, _) = within(member(broker.get(), "a".to_owned())).await;
    let leaving = [
        (joined.member_id.clone(), None),
        ("nobody".to_owned(), None),
    ];
    let outcomes = within(broker.get().leave("g", &leaving)).await.unwrap();
    assert_eq!(outcomes, vec![Ok(()), Err(GroupError::UnknownMember)]);
    let next = broker.fail_over(2).await;
    let group = next.get().describe("g").unwrap();
    assert_eq!((group.state, group.members.len()), ("Empty", 0));
}

#[tokio::test]
async fn old_offsets_and_empty_groups_expire_from_memory_and_log() {
    let config = GroupConfig {
        offsets_retention_seconds: 1,
        offsets_retention_check_interval_ms: 20,
        ..config()
    };
    let broker = Broker::leading(config).await;
    let coordinator = broker.get();
    let (joined, _) = within(member(coordinator.clone(), "a".to_owned())).await;
    let who = Membership {
        generation: joined.generation,
        member_id: joined.member_id.clone(),
        group_instance_id: None,
    };
    within(coordinator.commit("g", &who, vec![commit("t", 0, 1)], None))
        .await
        .unwrap();
    for (group, retention_ms) in [("aged", None), ("simple", Some(60_000))] {
        let commits = vec![commit("t", 0, 1)];
        within(coordinator.commit(group, &outside(), commits, retention_ms))
            .await
            .unwrap();
    }
    // A group in use keeps its offsets while younger ones expire.
    until(|| coordinator.describe("aged") == Err(GroupError::UnknownGroup)).await;
    assert_eq!(committed(&coordinator, "g").len(), 1);
    within(coordinator.leave("g", &[(joined.member_id, None)]))
        .await
        .unwrap();
    until(|| coordinator.describe("g") == Err(GroupError::UnknownGroup)).await;
    assert_eq!(committed(&coordinator, "g"), vec![]);
    let next = broker.fail_over(2).await;
    let listed = next.get().list().unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(
        committed(&next.get(), "simple"),
        vec![("t".to_owned(), 0, 1)]
    );
}

#[tokio::test]
async fn offsets_of_a_removed_topic_go_and_those_of_its_namesake_stay() {
    let broker = Broker::leading(config()).await;
    let coordinator = broker.get();
    let with_id = |partition, id| Commit {
        topic_id: Uuid::from_u128(id),
        ..commit("t", partition, 1)
    };
    let commits = vec![
        commit("t", 0, 1),
        with_id(1, 11),
        with_id(2, 22),
        commit("u", 0, 1),
    ];
    within(coordinator.commit("g", &outside(), commits, None))
        .await
        .unwrap();
    broker
        .coordinators
        .topics_removed(&[(Uuid::from_u128(11), "t".into())]);
    until(|| committed(&coordinator, "g").len() == 2).await;
    let left = vec![("t".to_owned(), 2, 1), ("u".to_owned(), 0, 1)];
    assert_eq!(committed(&coordinator, "g"), left);
    let next = broker.fail_over(2).await;
    assert_eq!(committed(&next.get(), "g"), left);
}

fn record(key: &'static [u8], value: Option<&'static [u8]>) -> Record {
    Record {
        key: Bytes::from_static(key),
        value: value.map(Bytes::from_static),
    }
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

#[tokio::test]
async fn a_large_commit_goes_in_several_batches_below_the_size_limit() {
    let broker = Broker::leading(config()).await;
    let commits: Vec<_> = (0..2_000)
        .map(|n| Commit {
            metadata: "x".repeat(900),
            ..commit("topic", n, i64::from(n))
        })
        .collect();
    let outcomes = within(broker.get().commit("g", &outside(), commits, None))
        .await
        .unwrap();
    assert!(outcomes.iter().all(Result::is_ok));
    let batches = broker.log.batches();
    assert!(batches.len() >= 2 && batches.iter().all(|batch| batch.len() < 1_048_588));
    let next = broker.fail_over(2).await;
    assert_eq!(committed(&next.get(), "g").len(), 2_000);
}

#[tokio::test]
async fn the_service_speaks_the_wire() {
    let broker = Broker::leading(config()).await;
    let service = GroupsService::new(broker.coordinators.clone());
    let request = v1::JoinGroupRequest {
        raft_group_id: GROUP.0,
        consumer_group: "g".to_owned(),
        session_timeout_ms: 10_000,
        rebalance_timeout_ms: 10_000,
        protocol_type: "consumer".to_owned(),
        protocols: vec![v1::GroupProtocol {
            name: "range".to_owned(),
            metadata: Bytes::new(),
        }],
        client_id: "client".to_owned(),
        client_host: "/127.0.0.1".to_owned(),
        require_known_member_id: true,
        ..Default::default()
    };
    let join = |request: v1::JoinGroupRequest| async {
        within(service.join_group(Request::new(request)))
            .await
            .unwrap()
            .into_inner()
    };
    let first = join(request.clone()).await;
    assert_eq!(first.error(), v1::GroupError::MemberIdRequired);
    assert!(
        first.member_id.starts_with("client-"),
        "{}",
        first.member_id
    );
    let known = v1::JoinGroupRequest {
        member_id: first.member_id.clone(),
        ..request.clone()
    };
    let joined = join(known).await;
    assert_eq!(
        (joined.error(), joined.generation),
        (v1::GroupError::None, 1)
    );
    let elsewhere = v1::JoinGroupRequest {
        raft_group_id: 99,
        ..request.clone()
    };
    assert_eq!(
        join(elsewhere).await.error(),
        v1::GroupError::NotCoordinator
    );
    let hasty = v1::JoinGroupRequest {
        session_timeout_ms: 1,
        ..request.clone()
    };
    assert_eq!(
        join(hasty).await.error(),
        v1::GroupError::InvalidSessionTimeout
    );
    let nameless = v1::JoinGroupRequest {
        consumer_group: String::new(),
        ..request.clone()
    };
    assert_eq!(join(nameless).await.error(), v1::GroupError::InvalidGroup);
    let wordy = v1::JoinGroupRequest {
        client_id: "x".repeat(40_000),
        ..request
    };
    assert_eq!(join(wordy).await.error(), v1::GroupError::MetadataTooLarge);

    let offset = |partition, metadata: &str| v1::OffsetToCommit {
        topic: "t".to_owned(),
        partition,
        offset: 5,
        leader_epoch: 1,
        metadata: metadata.to_owned(),
        ..Default::default()
    };
    // During the rebalance a commit is refused, for each of its offsets.
    let commit = v1::CommitOffsetsRequest {
        raft_group_id: GROUP.0,
        consumer_group: "g".to_owned(),
        generation: 1,
        member_id: first.member_id.clone(),
        offsets: vec![offset(0, ""), offset(1, &"x".repeat(4_097))],
        retention_ms: -1,
        ..Default::default()
    };
    let results = |commit: v1::CommitOffsetsRequest| async {
        let response = within(service.commit_offsets(Request::new(commit)))
            .await
            .unwrap();
        let results = response.into_inner().results;
        results
            .iter()
            .map(|result| result.error())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        results(commit.clone()).await,
        vec![v1::GroupError::RebalanceInProgress; 2]
    );
    let sync = v1::SyncGroupRequest {
        raft_group_id: GROUP.0,
        consumer_group: "g".to_owned(),
        generation: 1,
        member_id: first.member_id.clone(),
        assignments: vec![v1::MemberAssignment {
            member_id: first.member_id.clone(),
            assignment: Bytes::from_static(b"p0"),
        }],
        ..Default::default()
    };
    let synced = within(service.sync_group(Request::new(sync)))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (synced.error(), &synced.assignment[..]),
        (v1::GroupError::None, &b"p0"[..])
    );
    let outcomes = results(commit).await;
    assert_eq!(
        outcomes,
        vec![v1::GroupError::None, v1::GroupError::MetadataTooLarge]
    );

    let fetch = v1::FetchOffsetsRequest {
        groups: vec![v1::GroupOffsetsRequest {
            raft_group_id: GROUP.0,
            consumer_group: "g".to_owned(),
            topics: vec![v1::TopicPartitions {
                topic: "t".to_owned(),
                partitions: vec![0, 1],
            }],
            ..Default::default()
        }],
        require_stable: true,
    };
    let fetched = within(service.fetch_offsets(Request::new(fetch)))
        .await
        .unwrap()
        .into_inner();
    let offsets: Vec<_> = fetched.groups[0].offsets.iter().map(|o| o.offset).collect();
    assert_eq!(offsets, vec![5, -1]);
    let listed = service
        .list_groups(Request::new(v1::ListGroupsRequest {}))
        .await
        .unwrap();
    let listed = listed.into_inner();
    assert_eq!(
        (listed.error(), listed.groups[0].state.as_str()),
        (v1::GroupError::None, "Stable")
    );
    let refs = ["g", "nobody"].map(|name| v1::GroupRef {
        raft_group_id: GROUP.0,
        consumer_group: name.to_owned(),
    });
    let describe = v1::DescribeGroupsRequest {
        groups: refs.to_vec(),
    };
    let described = service
        .describe_groups(Request::new(describe))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(described.groups[0].members[0].assignment, &b"p0"[..]);
    assert_eq!(described.groups[1].error(), v1::GroupError::UnknownGroup);
    assert_eq!(described.groups[1].state, "Dead");
    within(broker.coordinators.shutdown()).await;
}
