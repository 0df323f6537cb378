//! The coordinator over a log in memory: many members, failover, unknown outcomes, expiry. Here:
//! the broker under test and its clients.

mod leadership_test;
mod wire_test;
mod writes_test;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::config::GroupConfig;
use super::coordinator::{Commit, Coordinator, Membership};
use super::coordinators::Coordinators;
use super::memory_log::MemoryLog;
use super::state::{GroupError, Join, JoinRefused, Joined, Sync, Synced};
use crate::test_wait::{until, within};

const GROUP: RaftGroupId = RaftGroupId(7);

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
        until("it leads", || self.get().is_leading()).await;
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
