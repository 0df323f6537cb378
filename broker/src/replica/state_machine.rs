//! Applies committed entries: high watermark and producer state.

use std::io;

use futures::Stream;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};

use super::raft_config::{LogId, StoredMembership, TypeConfig};

pub struct StateMachine;

type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
type PartitionSnapshot = openraft::alias::SnapshotOf<TypeConfig, bytes::Bytes>;

pub struct SnapshotBuilder;

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = bytes::Bytes;
    async fn build_snapshot(&mut self) -> io::Result<PartitionSnapshot> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = bytes::Bytes;
    type SnapshotBuilder = SnapshotBuilder;
    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Err(io::ErrorKind::Unsupported.into())
    }
    async fn apply<S>(&mut self, _entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + Send,
    {
        Err(io::ErrorKind::Unsupported.into())
    }
    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder
    }
    async fn install_snapshot(&mut self, _: &SnapshotMeta, _: bytes::Bytes) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    async fn get_current_snapshot(&mut self) -> io::Result<Option<PartitionSnapshot>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
