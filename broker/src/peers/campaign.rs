//! What the leadership driver asks of one replica's Raft group.

use std::time::Duration;

use chronik_types::id::ReplicaId;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::Fatal;
use openraft::raft::{TransferLeaderRequest, TransferLeaderResponse};
use tokio::time::timeout;

use super::Peers;
use super::stand::{Told, speak};
use crate::replica::Replica;
use crate::replica::raft_config::{Raft, TypeConfig};

/// How long each step of a greeting may take.
const GREET_TIMEOUT: Duration = Duration::from_secs(1);
/// Of a rival that is further ahead this replica hears when its request is refused.
const TERMS_AT_ONCE_MAX: u64 = 4;

/// The vote that a replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldVote {
    pub term: u64,
    pub voted_for: ReplicaId,
    /// The replica voted for is known to lead.
    pub committed: bool,
}

pub fn held_vote(replica: &Replica) -> HeldVote {
    let vote = replica.vote();
    HeldVote {
        term: vote.leader_id.term,
        voted_for: vote.leader_id.voted_for,
        committed: vote.committed,
    }
}

/// Campaigns as if the dead leader had handed leadership to this replica: leases do not hold it up.
/// Votes and logs are checked as in any election, so it is safe even if the leader lives.
pub async fn take_over(replica: &Replica, limit: Duration) {
    // An error says that the replica has stopped; its owner sees that too.
    let Ok(raft) = replica.wake().await else {
        return;
    };
    if !has_flushed(&raft) {
        let _ = raft.trigger().elect(false).await;
        return;
    }
    let vote = raft.server_metrics().borrow_watched().vote;
    let request = TransferLeaderRequest::new(vote, replica.replica_id(), None);
    // It waits for this replica's log to be on disk.
    let taken = timeout(limit, raft.handle_transfer_leader(request)).await;
    if !matches!(taken, Ok(Ok(Ok(())))) {
        let _ = raft.trigger().elect(false).await;
    }
}

/// A Raft that was just opened has written nothing yet, and before it takes over it would wait in vain
/// for something to be written. All that it found is on disk.
pub(super) fn has_flushed(raft: &Raft) -> bool {
    let flushed = raft.watch_log_progress().get();
    flushed.is_some_and(|flushed| flushed.last_log_id.is_some())
}

/// Takes over as a leader asks that hands over to this replica.
pub(super) async fn accept_transfer(
    raft: &Raft,
    request: TransferLeaderRequest<TypeConfig>,
) -> Result<TransferLeaderResponse<TypeConfig>, Fatal<TypeConfig>> {
    let (is_ours, has_all) = {
        let metrics = raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let last = raft.data_metrics().borrow_watched().last_log;
        let is_ours = metrics.id == *request.to_node_id() && metrics.vote == *request.from_leader();
        (is_ours, last >= request.last_log_id().copied())
    };
    if is_ours && has_all && !has_flushed(raft) {
        raft.trigger().elect(false).await?;
        return Ok(Ok(()));
    }
    raft.handle_transfer_leader(request).await
}

/// Campaigns in a term above `rival`, that of a candidate that cannot win. Raft learns no term from a
/// request that it refuses for its log, and each election takes just the next one. Gives the term that it
/// campaigns in at last.
pub async fn outbid(replica: &Replica, rival: u64) -> u64 {
    let Ok(raft) = replica.wake().await else {
        return 0;
    };
    let own = raft.server_metrics().borrow_watched().vote.leader_id.term;
    let elections = rival.saturating_sub(own).min(TERMS_AT_ONCE_MAX) + 1;
    for _ in 0..elections {
        if raft.trigger().elect(false).await.is_err() {
            break;
        }
    }
    own.saturating_add(elections)
}

/// An ordinary election; after a round that asks whether it could be won, if `ask_first`.
pub async fn elect(replica: &Replica, ask_first: bool) {
    let _ = replica.campaign(ask_first).await;
}

/// Tells a follower that can be reached again who leads, and sends what it missed without waiting
/// out the backoff. Takes no more than a few seconds. False: the follower does not answer.
pub async fn greet(peers: &Peers, replica: &Replica, follower: ReplicaId) -> bool {
    let engine = replica.engine();
    if engine.leads_at_rest() {
        // Where its term has only begun, that is over in a moment, or Raft takes care of it (`stand`).
        let mut leadership = replica.leadership();
        let begun = leadership.wait_for(|now| now.ready || !now.is_leader);
        if timeout(GREET_TIMEOUT, begun).await.is_err() {
            return true;
        }
    }
    let network = peers.network(replica.group_id(), replica.replica_id());
    match timeout(GREET_TIMEOUT, speak(&network, replica, follower)).await {
        Ok(Some(Told::Has(_))) => return true,
        // As before it has opened its replica. It is spoken to again (`resting`), and asks when it misses its leader
        // (`server`).
        Ok(Some(Told::Nothing)) | Err(_) => return false,
        Ok(Some(Told::Otherwise) | None) => {}
    }
    let send_all = async {
        if let Some(raft) = replica.leading_raft().await {
            let _ = raft.trigger().reset_backoff([follower]).await;
            let _ = raft.trigger().heartbeat().await;
        }
    };
    // Its Raft may wait for its disk.
    let _ = timeout(GREET_TIMEOUT, send_all).await;
    true
}
