//! What the leadership driver asks of one replica's Raft group.

use std::time::Duration;

use chronik_types::id::ReplicaId;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::TransferLeaderRequest;
use tokio::time::timeout;

use crate::replica::Replica;

/// The vote that a replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldVote {
    pub term: u64,
    pub voted_for: ReplicaId,
    /// The replica voted for is known to lead.
    pub committed: bool,
}

pub fn held_vote(replica: &Replica) -> HeldVote {
    let vote = replica.raft().server_metrics().borrow_watched().vote;
    HeldVote {
        term: vote.leader_id.term,
        voted_for: vote.leader_id.voted_for,
        committed: vote.committed,
    }
}

/// Campaigns as if the dead leader had handed leadership to this replica: leases do not hold it up.
/// Votes and logs are checked as in any election, so it is safe even if the leader lives.
pub async fn take_over(replica: &Replica, limit: Duration) {
    let vote = replica.raft().server_metrics().borrow_watched().vote;
    let request = TransferLeaderRequest::new(vote, replica.replica_id(), None);
    // It waits for this replica's vote to be on disk, which may be unknown after a restart.
    let taken = timeout(limit, replica.raft().handle_transfer_leader(request)).await;
    if !matches!(taken, Ok(Ok(Ok(())))) {
        // An error says that the replica has stopped; its owner sees that too.
        let _ = replica.raft().trigger().elect(false).await;
    }
}

/// An ordinary election, after a round that asks whether it could be won.
pub async fn elect(replica: &Replica) {
    let _ = replica.raft().trigger().elect(true).await;
}

/// Tells a follower that can be reached again who leads, and sends what it missed without waiting
/// out the backoff.
pub async fn greet(replica: &Replica, follower: ReplicaId) {
    let _ = replica.raft().trigger().reset_backoff([follower]).await;
    let _ = replica.raft().trigger().heartbeat().await;
}
