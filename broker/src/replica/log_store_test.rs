//! openraft's own storage suite on the log store and the state machine, over a real folder; and
//! what the suite cannot know: offsets.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds, RangeInclusive};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use chronik_storage::{PartitionLog, RealDisk, Storage, StorageConfig};
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::batches;
use openraft::StorageError;
use openraft::entry::EntryPayload;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage, RaftLogStorageExt};
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::codec;
use super::log_store::LogStore;
use super::purge::Upkeep;
use super::raft_config::{Batches, Entry, EntryData, LogId, TypeConfig, Vote};
use super::state_machine::{ReplicaState, StateMachine};
use super::test_batches::{value, with_records};

pub fn open_storage(dir: &TempDir) -> Storage {
    let config = StorageConfig {
        dir: dir.path().to_owned(),
        // However full the machine's disk is.
        reserve_bytes: Some(0),
        ..StorageConfig::default()
    };
    Storage::open(config, Arc::new(RealDisk)).unwrap()
}

/// Closes the storage before its folder goes.
struct Folder {
    storage: Storage,
    _dir: TempDir,
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.storage.close().unwrap();
    }
}

/// The suite purges logs that are empty or not committed, which no replica does and the storage
/// refuses: here that is only remembered. All else is the real store.
#[derive(Clone)]
struct SuiteStore {
    inner: LogStore,
    purged: Arc<Mutex<Option<LogId>>>,
}

impl SuiteStore {
    fn first(&self) -> u64 {
        self.purged
            .lock()
            .unwrap()
            .map_or(0, |purged| purged.index + 1)
    }

    fn visible(&self, range: impl RangeBounds<u64>) -> (Bound<u64>, Bound<u64>) {
        let first = self.first();
        let start = match range.start_bound() {
            Bound::Included(index) => first.max(*index),
            Bound::Excluded(index) => first.max(*index + 1),
            Bound::Unbounded => first,
        };
        (Bound::Included(start), range.end_bound().cloned())
    }
}

impl RaftLogReader<TypeConfig> for SuiteStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<Entry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        let range = self.visible(range);
        self.inner.try_get_log_entries(range).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let start = start.max(self.first());
        self.inner.limited_get_log_entries(start, end).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        self.inner.read_vote().await
    }

    async fn get_key_log_ids(&mut self, range: RangeInclusive<LogId>) -> io::Result<Vec<LogId>> {
        self.inner.get_key_log_ids(range).await
    }
}

impl RaftLogStorage<TypeConfig> for SuiteStore {
    type LogReader = SuiteStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let state = self.inner.get_log_state().await?;
        let last_purged_log_id = *self.purged.lock().unwrap();
        Ok(LogState {
            last_purged_log_id,
            last_log_id: state.last_log_id.max(last_purged_log_id),
        })
    }

    async fn get_log_reader(&mut self) -> SuiteStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.inner.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.inner.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        self.inner.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        self.inner.append(entries, callback).await
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        self.inner.truncate_after(last_log_id).await
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        let mut purged = self.purged.lock().unwrap();
        *purged = (*purged).max(Some(log_id));
        Ok(())
    }
}

struct Builder;

impl StoreBuilder<TypeConfig, SuiteStore, StateMachine, Folder> for Builder {
    async fn build(&self) -> Result<(Folder, SuiteStore, StateMachine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let storage = open_storage(&dir);
        let log = storage.open_log(RaftGroupId(1)).unwrap();
        let state = Arc::new(ReplicaState::load(log.clone(), Upkeep::default()).unwrap());
        let store = SuiteStore {
            inner: LogStore::new(
                log,
                state.traces.clone(),
                Arc::default(),
                CancellationToken::new(),
            ),
            purged: Arc::default(),
        };
        Ok((
            Folder { storage, _dir: dir },
            store,
            StateMachine::new(state),
        ))
    }
}

#[tokio::test]
async fn openraft_storage_suite() {
    Suite::test_all(Builder).await.unwrap();
}

fn normal(term: u64, index: u64, bytes: Vec<u8>) -> Entry {
    let payload = EntryPayload::Normal(EntryData::Batches(Batches::stamped(
        Bytes::from(bytes),
        None,
    )));
    Entry {
        log_id: codec::log_id(term, index),
        payload,
    }
}

fn blank(term: u64, index: u64) -> Entry {
    Entry {
        log_id: codec::log_id(term, index),
        payload: EntryPayload::Blank,
    }
}

#[tokio::test]
async fn purged_entries_are_gone_for_raft_and_their_records_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (storage, log, mut store) = new_log(&dir);
    for index in 0..6 {
        let bytes = stamped(value("x"), index as i64, 1);
        store
            .blocking_append([normal(1, index, bytes)])
            .await
            .unwrap();
    }
    store
        .save_committed(Some(codec::log_id(1, 5)))
        .await
        .unwrap();
    // Not before the state as of there is saved.
    assert!(store.purge(codec::log_id(1, 3)).await.is_err());
    log.save_replica_state(4, Bytes::from_static(b"state"));
    store.purge(codec::log_id(1, 3)).await.unwrap();
    let state = store.get_log_state().await.unwrap();
    assert_eq!(state.last_purged_log_id, Some(codec::log_id(1, 3)));
    assert_eq!(state.last_log_id, Some(codec::log_id(1, 5)));
    assert!(store.limited_get_log_entries(3, 6).await.is_err());
    assert_eq!(store.try_get_log_entries(4..6).await.unwrap().len(), 2);
    let read = log.read(Offset(0), Offset(6), 1 << 20).unwrap();
    assert_eq!(read.len(), 6);
    storage.close().unwrap();
}

fn stamped(mut bytes: Vec<u8>, offset: i64, epoch: i32) -> Vec<u8> {
    let epoch = chronik_types::epoch::LeaderEpoch(epoch);
    chronik_types::record_batch::stamp(&mut bytes, Offset(offset), epoch);
    bytes
}

fn new_log(dir: &TempDir) -> (Storage, PartitionLog, LogStore) {
    let storage = open_storage(dir);
    let log = storage.open_log(RaftGroupId(1)).unwrap();
    (
        storage,
        log.clone(),
        LogStore::new(
            log,
            Arc::default(),
            Arc::default(),
            CancellationToken::new(),
        ),
    )
}

#[tokio::test]
async fn entries_from_a_leader_must_continue_the_offsets() {
    let dir = tempfile::tempdir().unwrap();
    let (storage, log, mut store) = new_log(&dir);
    let three = with_records(&[(1, b"a"), (2, b"b"), (3, b"c")]);
    store
        .blocking_append([blank(1, 0), normal(1, 1, stamped(three, 0, 1))])
        .await
        .unwrap();
    assert_eq!(log.log_end_offset(), Offset(3));
    let gap = store
        .blocking_append([normal(1, 2, stamped(value("d"), 4, 1))])
        .await;
    assert!(gap.is_err());
    store
        .blocking_append([normal(1, 2, stamped(value("d"), 3, 1))])
        .await
        .unwrap();
    assert_eq!(log.log_end_offset(), Offset(4));
    storage.close().unwrap();
}

#[tokio::test]
async fn replication_reads_are_bounded_by_bytes_and_apply_reads_everything() {
    use futures::StreamExt;

    let dir = tempfile::tempdir().unwrap();
    let (storage, _log, mut store) = new_log(&dir);
    let body = "x".repeat(300 * 1024);
    for index in 0..8 {
        let bytes = stamped(value(&body), index as i64, 1);
        store
            .blocking_append([normal(1, index, bytes)])
            .await
            .unwrap();
    }
    let part = store.limited_get_log_entries(0, 8).await.unwrap();
    assert!((1..8).contains(&part.len()), "{}", part.len());
    let all = store.try_get_log_entries(0..8).await.unwrap();
    assert_eq!(all.len(), 8);
    let mut reader = store.get_log_reader().await;
    let streamed: Vec<_> = reader.entries_stream(0..8).await.collect().await;
    assert_eq!(streamed.len(), 8);
    for (offset, entry) in streamed.into_iter().enumerate() {
        let EntryPayload::Normal(EntryData::Batches(batches_of)) = entry.unwrap().payload else {
            panic!("no data")
        };
        let (_, header) = batches(&batches_of.bytes).next().unwrap().unwrap();
        assert_eq!(header.base_offset, Offset(offset as i64));
    }
    storage.close().unwrap();
}

#[tokio::test]
async fn an_append_waits_until_the_storage_has_room() {
    let dir = tempfile::tempdir().unwrap();
    let config = StorageConfig {
        dir: dir.path().to_owned(),
        // However full the machine's disk is.
        reserve_bytes: Some(0),
        memory_max_bytes: 64 * 1024,
        ..StorageConfig::default()
    };
    let storage = Storage::open(config, Arc::new(RealDisk)).unwrap();
    let log = |group| storage.open_log(RaftGroupId(group)).unwrap();
    let mut full = LogStore::new(
        log(1),
        Arc::default(),
        Arc::default(),
        CancellationToken::new(),
    );
    let mut waits = LogStore::new(
        log(2),
        Arc::default(),
        Arc::default(),
        CancellationToken::new(),
    );
    let body = "x".repeat(60 * 1024);
    full.blocking_append([normal(1, 0, stamped(value(&body), 0, 1))])
        .await
        .unwrap();
    let closing = CancellationToken::new();
    let mut closed = LogStore::new(log(3), Arc::default(), Arc::default(), closing.clone());
    let append = closed.blocking_append([normal(1, 0, stamped(value(&body), 0, 1))]);
    closing.cancel();
    let limit = std::time::Duration::from_secs(20);
    let refused = tokio::time::timeout(limit, append).await.unwrap();
    assert!(refused.is_err(), "who is closed waits for no room");
    let append = waits.blocking_append([normal(1, 0, stamped(value(&body), 0, 1))]);
    tokio::pin!(append);
    let early = tokio::time::timeout(std::time::Duration::from_millis(50), &mut append).await;
    assert!(early.is_err(), "there is no room yet");
    // What is committed goes to a segment and gives its room to others.
    full.save_committed(Some(codec::log_id(1, 0)))
        .await
        .unwrap();
    tokio::time::timeout(limit, append).await.unwrap().unwrap();
    assert_eq!(log(2).log_end_offset(), Offset(1));
    storage.close().unwrap();
}
