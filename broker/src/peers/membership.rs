//! Brings a Raft group's voters in line with the assignment: what a leader does when a replica was
//! replaced by a new incarnation, as after the loss of a disk.
//!
//! Invariant: a new replica votes only after it has the log, and an old one is dropped in the same
//! change; so the group is never weaker than its assignment says. Safe to run again at any point.

use std::collections::BTreeSet;
use std::time::Duration;

use chronik_types::id::ReplicaId;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::time::timeout;

use crate::replica::Replica;

/// Entries that a new replica may be behind when it becomes a voter.
const LAG_MAX: u64 = 64;
/// How long one change of membership may wait for its majority.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the voters are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("raft refused: {0}")]
    Raft(String),
    #[error("no majority in time")]
    TimedOut,
    #[error("the replica leads no more")]
    NotLeader,
}

/// Whether exactly these replicas vote, with no change under way.
pub fn has_voters(replica: &Replica, wanted: &BTreeSet<ReplicaId>) -> bool {
    let Some(raft) = replica.raft() else {
        return false;
    };
    let metrics = raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let configs = metrics.membership_config.membership().get_joint_config();
    configs.len() == 1 && configs[0] == *wanted
}

/// Makes `wanted` the group's voters: new ones learn first. Waits as long as that takes, while this
/// replica leads.
pub async fn change_voters(
    replica: &Replica,
    wanted: &BTreeSet<ReplicaId>,
) -> Result<(), MembershipError> {
    let raft = replica.raft().ok_or(MembershipError::NotLeader)?;
    let members: BTreeSet<ReplicaId> = {
        let metrics = raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics
            .membership_config
            .membership()
            .nodes()
            .map(|(id, ())| *id)
            .collect()
    };
    let new: Vec<ReplicaId> = wanted.difference(&members).copied().collect();
    if !new.is_empty()
        && let Err(error) = replica.purge_for_new_replica().await
    {
        // It then gets the log entry by entry.
        tracing::debug!(raft_group_id = %replica.group_id(), %error, "the log is not purged");
    }
    for learner in &new {
        within(raft.add_learner(*learner, (), false)).await?;
    }
    let mut metrics = raft.data_metrics();
    while !are_caught_up(replica, wanted)? {
        metrics
            .changed()
            .await
            .map_err(|_| MembershipError::NotLeader)?;
        metrics.borrow_and_update();
    }
    within(raft.change_membership(wanted.clone(), false)).await
}

async fn within<T, E: std::fmt::Display>(
    change: impl Future<Output = Result<T, E>>,
) -> Result<(), MembershipError> {
    match timeout(CHANGE_TIMEOUT, change).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(MembershipError::Raft(error.to_string())),
        Err(_) => Err(MembershipError::TimedOut),
    }
}

/// Whether every wanted replica is near enough to the log end. An old voter that is down may be
/// replaced, but only by one that has the log.
fn are_caught_up(replica: &Replica, wanted: &BTreeSet<ReplicaId>) -> Result<bool, MembershipError> {
    let progress = replica.progress().ok_or(MembershipError::NotLeader)?;
    let last = progress.last_index.unwrap_or(0);
    let behind = |id: &ReplicaId| {
        let follower = progress
            .followers
            .iter()
            .find(|follower| follower.replica == *id);
        let matched = follower.and_then(|follower| follower.matched);
        matched.is_none_or(|matched| last.saturating_sub(matched) > LAG_MAX)
    };
    let voters = {
        let raft = replica.raft().ok_or(MembershipError::NotLeader)?;
        let metrics = raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics
            .membership_config
            .membership()
            .voter_ids()
            .collect::<BTreeSet<_>>()
    };
    // Replicas that vote already need not be up for the change; new ones must have the log.
    Ok(!wanted
        .iter()
        .any(|id| *id != replica.replica_id() && !voters.contains(id) && behind(id)))
}
