//! Hands leadership over in order: for the preferred leader, and before a broker stops.
//!
//! Invariant: once a hand-over has begun it is not given up while the replica still leads, since a
//! leader that is handing over refuses writes; another follower is asked when one does not come.

use std::sync::Arc;
use std::time::Duration;

use chronik_types::id::{BrokerId, ReplicaId};
use futures::StreamExt;
use tokio::time::{Instant, timeout};
use tracing::warn;

use crate::peers::LinkTable;
use crate::replica::Replica;

/// How long one follower may take to win its election.
const FOLLOWER_TIMEOUT: Duration = Duration::from_millis(700);
/// Hand-overs at the same time.
const PARALLEL_MAX: usize = 64;

/// Asks one candidate after the other to lead until this replica leads no more. False: it still
/// does after `limit`.
pub async fn hand_over(replica: &Replica, candidates: &[ReplicaId], limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let mut leadership = replica.leadership();
    let others = others(replica, candidates);
    for candidate in candidates.iter().chain(others.iter().cycle()) {
        if !leadership.borrow().is_leader {
            return true;
        }
        if Instant::now() >= deadline {
            break;
        }
        if replica.transfer_leadership(*candidate).await.is_err() {
            // It does not lead any more, or has stopped.
            return true;
        }
        let gone = leadership.wait_for(|now| !now.is_leader);
        if timeout(FOLLOWER_TIMEOUT, gone).await.is_ok() {
            return true;
        }
    }
    let gone = !leadership.borrow().is_leader;
    if !gone {
        warn!(
            raft_group_id = replica.group_id().0,
            "no other replica takes the leadership over"
        );
    }
    gone
}

/// All followers, the candidates first: where those fail, anybody is better than nobody.
fn others(replica: &Replica, candidates: &[ReplicaId]) -> Vec<ReplicaId> {
    let followers = replica
        .progress()
        .map(|progress| progress.followers)
        .unwrap_or_default();
    let mut all = candidates.to_vec();
    all.extend(
        followers
            .iter()
            .map(|f| f.replica)
            .filter(|f| !candidates.contains(f)),
    );
    all
}

/// Followers to hand over to, the furthest first; in-sync ones that are connected, if any.
fn successors(replica: &Replica, isr: &[BrokerId], links: &LinkTable) -> Vec<ReplicaId> {
    let followers = replica
        .progress()
        .map(|progress| progress.followers)
        .unwrap_or_default();
    let mut followers: Vec<_> = followers
        .into_iter()
        .filter(|follower| links.status(follower.replica.broker_id).is_up())
        .collect();
    followers.sort_by_key(|follower| {
        let in_sync = isr.contains(&follower.replica.broker_id);
        std::cmp::Reverse((in_sync, follower.matched))
    });
    followers
        .into_iter()
        .map(|follower| follower.replica)
        .collect()
}

/// Hands over every partition that is led here, within `limit`. Returns how many are still led.
pub async fn hand_over_all(
    led: Vec<(Arc<Replica>, Vec<BrokerId>)>,
    links: &LinkTable,
    limit: Duration,
) -> usize {
    let deadline = Instant::now() + limit;
    futures::stream::iter(led)
        .map(|(replica, isr)| async move {
            let successors = successors(&replica, &isr, links);
            if successors.is_empty() {
                // Nobody could take it; a hand-over would only stop writes earlier.
                return false;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            hand_over(&replica, &successors, left).await
        })
        .buffer_unordered(PARALLEL_MAX)
        .filter(|gone| std::future::ready(!gone))
        .count()
        .await
}
