//! Opening, closing and removing one replica, and telling leadership about it.
//!
//! Invariant: others find a replica only while it runs, and its log is deleted only after it
//! stopped. A group gets first voters only where the log is empty and all were assigned together.

use chronik_storage::{PartitionLog, Storage, StorageError};
use chronik_types::id::RaftGroupId;
use tokio::sync::watch;
use tracing::{info, warn};

use super::ReconcileOptions;
use super::assignment::Wanted;
use crate::leadership::GroupEvent;
use crate::peers::Peers;
use crate::replica::{OpenError, PartitionState, ReplicaOptions};

/// Stops the replica, if it runs.
pub(super) async fn close_one(options: &ReconcileOptions, group: RaftGroupId) {
    if let Some(replica) = options.replicas.remove(group) {
        options.groups.send(GroupEvent::Closed(group)).ok();
        replica.shutdown().await;
    }
    options.peers.heard().forget(group);
}

/// Stops the replica, if it runs, and deletes its log.
pub(super) async fn remove_one(
    options: &ReconcileOptions,
    group: RaftGroupId,
) -> Option<RaftGroupId> {
    close_one(options, group).await;
    let storage = options.storage.clone();
    let deleted = tokio::task::spawn_blocking(move || storage.delete_log(group)).await;
    match deleted {
        Ok(Ok(())) => {
            info!(
                raft_group_id = group.0,
                "the log of a partition that is gone is deleted"
            );
            Some(group)
        }
        Ok(Err(error)) => {
            warn!(raft_group_id = group.0, %error, "a log cannot be deleted; tried again");
            None
        }
        Err(_) => None,
    }
}

pub(super) type OpenedLog = Result<PartitionLog, StorageError>;

pub(super) async fn open_logs(
    storage: &Storage,
    groups: Vec<RaftGroupId>,
) -> Vec<(RaftGroupId, OpenedLog)> {
    let storage = storage.clone();
    let open = move || {
        let open = |group: RaftGroupId| (group, storage.open_log(group));
        groups.into_iter().map(open).collect()
    };
    // It fails only where the runtime is shutting down.
    tokio::task::spawn_blocking(open).await.unwrap_or_default()
}

pub(super) async fn open_one(
    options: &ReconcileOptions,
    group: RaftGroupId,
    wanted: &Wanted,
    log: OpenedLog,
) -> Result<watch::Sender<PartitionState>, OpenError> {
    let log = log?;
    let state = watch::Sender::new(wanted.state.clone());
    let is_new = log.last_entry_id().is_none();
    let replica = Peers::open_replica(ReplicaOptions {
        replica_id: wanted.replica_id,
        log,
        network: options.peers.network(group, wanted.replica_id),
        raft_config: options.raft_config.clone(),
        state: state.subscribe(),
        upkeep: options.upkeep.clone(),
    })?;
    // One that has a log has its first membership too, and opens when it is needed.
    if is_new
        && wanted.is_founder()
        && let Err(error) = replica
            .initialize(wanted.replicas.iter().copied().collect())
            .await
    {
        replica.shutdown().await;
        return Err(error);
    }
    options.replicas.insert(group, replica.clone());
    let assigned = wanted.assigned(group);
    options
        .groups
        .send(GroupEvent::Opened(assigned, replica))
        .ok();
    Ok(state)
}
