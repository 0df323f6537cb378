//! openraft's own storage suite on our stores, and what it does not cover: restart and snapshots.

use std::sync::Arc;

use chronik_types::cluster_image::{Controller, Gateway};
use chronik_types::id::{BrokerId, ControllerId, TopicId};
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{EntryPayload, RaftSnapshotBuilder, StorageError};
use tempfile::TempDir;
use uuid::Uuid;

use super::codec;
use super::log_store::LogStore;
use super::network::{snapshot_chunks, snapshot_from_wire};
use super::state_machine::StateMachine;
use super::type_config::{Entry, Proposal, RaftVote, TypeConfig};
use crate::command::{BecomeLeader, Command, RegisterBroker, TopicPlan};
use crate::db::{Db, LogPosition};
use crate::image_feed::{ImageFeed, Missing};
use crate::state::{PendingRestore, StateDump};

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let folder = tempfile::tempdir().unwrap();
        let (log_store, machine, _) = open(&folder).await;
        Ok((folder, log_store, machine))
    }
}

async fn open(folder: &TempDir) -> (LogStore, StateMachine, ImageFeed) {
    let (db, mut contents, _worker) = Db::open(folder.path()).await.unwrap();
    let log_store = LogStore::new(db.clone(), &mut contents).unwrap();
    let (machine, feed) = StateMachine::new(db, &mut contents, 100).unwrap();
    (log_store, machine, feed)
}

/// Closes the database and opens it again, as a restart does.
async fn reopen(
    folder: &TempDir,
    stores: (LogStore, StateMachine),
) -> (LogStore, StateMachine, ImageFeed) {
    drop(stores);
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
    loop {
        match Db::open(folder.path()).await {
            Ok((db, mut contents, _worker)) => {
                let log_store = LogStore::new(db.clone(), &mut contents).unwrap();
                let (machine, feed) = StateMachine::new(db, &mut contents, 100).unwrap();
                return (log_store, machine, feed);
            }
            // The worker lets go of the folder's lock once it has finished.
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
        tokio::task::yield_now().await;
    }
}

fn commands() -> Vec<Command> {
    vec![
        Command::BecomeLeader(BecomeLeader {
            controller_id: ControllerId(1),
            cluster_id: "cluster".to_owned(),
            controllers: vec![Controller {
                controller_id: ControllerId(1),
                rpc_address: "a:1".to_owned(),
                rest_address: "a:2".to_owned(),
            }],
        }),
        Command::RegisterBroker(RegisterBroker {
            broker_id: BrokerId(7),
            incarnation_id: Uuid::from_u128(1),
            rpc_address: "b:1".to_owned(),
            rack: Some("r".to_owned()),
            storage_id: Uuid::from_u128(2),
            held: None,
        }),
        Command::RegisterGateway {
            gateway: Gateway {
                gateway_id: "g".to_owned(),
                incarnation_id: Uuid::from_u128(3),
                rack: None,
                endpoints: Vec::new(),
            },
        },
        Command::CreateTopics {
            topics: ["kept", "gone"]
                .into_iter()
                .zip(10..)
                .map(|(name, id)| TopicPlan {
                    topic_id: TopicId(Uuid::from_u128(id)),
                    name: name.to_owned(),
                    configs: [("retention.ms".to_owned(), "5".to_owned())].into(),
                    assignments: vec![vec![BrokerId(7)]; 3],
                })
                .collect(),
        },
        Command::DeleteTopics {
            topic_ids: vec![TopicId(Uuid::from_u128(11))],
        },
        Command::AllocateProducerIds { count: 1000 },
    ]
}

fn entries() -> Vec<Entry> {
    let log_id = |index| codec::log_id(LogPosition { term: 1, index });
    let voters = [1, 2, 3].into();
    let membership = openraft::Membership::new_with_defaults(vec![voters], []);
    let mut entries = vec![Entry::new(log_id(0), EntryPayload::Membership(membership))];
    for (index, command) in (1..).zip(commands()) {
        let proposal = Proposal::encode(&command).unwrap();
        entries.push(Entry::new(log_id(index), EntryPayload::Normal(proposal)));
    }
    entries
}

async fn apply_all(machine: &mut StateMachine, entries: Vec<Entry>) {
    let stream = futures::stream::iter(entries.into_iter().map(|entry| Ok((entry, None))));
    machine.apply(stream).await.unwrap();
}

async fn dump(machine: &mut StateMachine) -> StateDump {
    machine
        .get_current_snapshot()
        .await
        .unwrap()
        .unwrap()
        .snapshot
}

#[tokio::test]
async fn openraft_storage_suite() {
    Suite::test_all(Builder).await.unwrap();
}

#[tokio::test]
async fn a_restart_recovers_log_vote_and_state() {
    let folder = tempfile::tempdir().unwrap();
    let (mut log_store, mut machine, _feed) = open(&folder).await;
    let vote = RaftVote::new_committed(1, 2);
    log_store.save_vote(&vote).await.unwrap();
    log_store
        .append(entries(), IOFlushed::noop())
        .await
        .unwrap();
    log_store
        .purge(codec::log_id(LogPosition { term: 1, index: 1 }))
        .await
        .unwrap();
    apply_all(&mut machine, entries()).await;
    let before = dump(&mut machine).await;
    let applied = machine.applied_state().await.unwrap();
    assert_eq!(before.cluster_id, "cluster");
    assert_eq!(before.topics.len(), 1);
    assert_eq!(before.next_producer_id, 1000);

    let (mut log_store, mut machine, feed) = reopen(&folder, (log_store, machine)).await;
    assert_eq!(dump(&mut machine).await, before);
    assert_eq!(machine.applied_state().await.unwrap(), applied);
    assert_eq!(
        feed.image().topic_by_name("kept").unwrap().partitions.len(),
        3
    );
    assert_eq!(log_store.read_vote().await.unwrap(), Some(vote));
    let recovered = log_store.try_get_log_entries(0..).await.unwrap();
    assert_eq!(recovered, entries()[2..]);
    let state = log_store.get_log_state().await.unwrap();
    assert_eq!(state.last_purged_log_id.map(|id| id.index), Some(1));
    assert_eq!(state.last_log_id.map(|id| id.index), Some(6));
}

#[tokio::test]
async fn a_snapshot_survives_the_wire_and_replaces_everything() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_log, mut machine, _feed) = open(&source).await;
    apply_all(&mut machine, entries()).await;
    let snapshot = machine
        .get_snapshot_builder()
        .await
        .build_snapshot()
        .await
        .unwrap();
    let vote = RaftVote::new_committed(3, 1);
    let mut chunks = snapshot_chunks(2, &vote, snapshot.clone())
        .unwrap()
        .into_iter();
    let header = chunks.next().unwrap().header.unwrap();
    let data: Vec<u8> = chunks.flat_map(|chunk| chunk.data.to_vec()).collect();
    let (received_vote, received) = snapshot_from_wire(header.clone(), &data).unwrap();
    assert_eq!((received_vote, &received.meta), (vote, &snapshot.meta));

    let (log_store, mut other, feed) = open(&target).await;
    let old = Command::RegisterBroker(RegisterBroker {
        broker_id: BrokerId(99),
        incarnation_id: Uuid::from_u128(1),
        rpc_address: "old:1".to_owned(),
        rack: None,
        storage_id: Uuid::from_u128(2),
        held: None,
    });
    let log_id = codec::log_id(LogPosition { term: 1, index: 0 });
    let proposal = Proposal::encode(&old).unwrap();
    apply_all(
        &mut other,
        vec![Entry::new(log_id, EntryPayload::Normal(proposal))],
    )
    .await;
    other
        .install_snapshot(&received.meta, received.snapshot)
        .await
        .unwrap();
    assert_eq!(dump(&mut other).await, snapshot.snapshot);
    assert!(matches!(feed.missing_since(1), Missing::Image(_)));
    let (_log, mut other, feed) = reopen(&target, (log_store, other)).await;
    assert_eq!(dump(&mut other).await, snapshot.snapshot);

    let mut restored = snapshot.snapshot.clone();
    restored.pending_restore = Some(PendingRestore {
        backup_id: Uuid::from_u128(7),
        backup_revision: restored.revision,
    });
    other
        .install_snapshot(&received.meta, restored)
        .await
        .unwrap();
    // What is only restored is shown to nobody before a leader has begun anew.
    assert!(feed.is_held_back());
    assert_eq!(feed.image().revision, 0);

    let mut newer = snapshot.snapshot;
    newer.schema_version += 1;
    let data = serde_json::to_vec(&newer).unwrap();
    assert!(
        snapshot_from_wire(header, &data)
            .unwrap_err()
            .message()
            .contains("schema version")
    );
}

#[tokio::test]
async fn entries_beyond_the_cache_are_read_from_the_database() {
    let folder = tempfile::tempdir().unwrap();
    let (mut log_store, machine, _feed) = open(&folder).await;
    let large: Arc<str> = "x".repeat(8 * 1024 * 1024).into();
    for index in 0..8 {
        let log_id = codec::log_id(LogPosition { term: 1, index });
        let entry = Entry::new(log_id, EntryPayload::Normal(Proposal(large.clone())));
        log_store.append([entry], IOFlushed::noop()).await.unwrap();
    }
    let indexes = |entries: Vec<Entry>| -> Vec<u64> {
        entries.iter().map(|entry| entry.log_id.index).collect()
    };
    let all = log_store.try_get_log_entries(0..=9).await.unwrap();
    assert_eq!(indexes(all), (0..8).collect::<Vec<_>>());
    let some = log_store.try_get_log_entries(1..3).await.unwrap();
    assert_eq!(indexes(some), [1, 2]);
    let limited = log_store.limited_get_log_entries(2, 8).await.unwrap();
    assert_eq!(
        indexes(limited),
        [2],
        "a message is bounded in bytes, but never empty"
    );
    drop(machine);
}

#[tokio::test]
async fn a_data_folder_serves_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let _open = open(&folder).await;
    let second = Db::open(folder.path()).await;
    assert!(second.unwrap_err().to_string().contains("in use"));
}
