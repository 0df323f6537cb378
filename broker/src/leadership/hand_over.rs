//! Hands leadership over in order: to a leader that the controllers ask for, by a replica that shall
//! vote no more, and before a broker stops.
//!
//! Invariant: once a hand-over has begun it is not given up while the replica still leads and anybody
//! can take over, since a leader that is handing over refuses writes; another follower is asked when
//! one does not come.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use chronik_types::id::{BrokerId, ReplicaId};
use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::warn;

use crate::controller_client::ClusterView;
use crate::peers::LinkTable;
use crate::peers::membership::Members;
use crate::replica::Replica;

/// How long others are asked to take over one partition.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one follower may take to win its election.
const FOLLOWER_TIMEOUT: Duration = Duration::from_millis(700);
/// Entries that a follower may be behind when it is asked to take over.
const LAG_MAX: u64 = 64;
/// Hand-overs at the same time.
const PARALLEL_MAX: usize = 64;

/// Asks one follower after the other to lead until this replica leads no more. `next` names the
/// follower of each attempt; none: nobody can take it. False: it still leads after `limit`.
pub async fn hand_over(
    replica: &Replica,
    next: impl Fn(usize) -> Option<ReplicaId>,
    limit: Duration,
) -> bool {
    let deadline = Instant::now() + limit;
    let mut leadership = replica.leadership();
    for attempt in 0.. {
        if !leadership.borrow().is_leader {
            return true;
        }
        let Some(follower) = next(attempt).filter(|_| Instant::now() < deadline) else {
            break;
        };
        if replica.transfer_leadership(follower).await.is_err() {
            // It does not lead any more, or has stopped.
            return true;
        }
        let gone = leadership.wait_for(|now| !now.is_leader);
        if timeout(FOLLOWER_TIMEOUT, gone).await.is_ok() {
            return true;
        }
    }
    false
}

/// One of `wanted` takes over: those that have the log first, in their order. If none of them comes,
/// anybody is better than nobody.
pub async fn hand_over_to(replica: &Replica, wanted: &[ReplicaId]) {
    let next = |attempt: usize| {
        let progress = replica.progress()?;
        let (mut all, behind): (Vec<ReplicaId>, Vec<ReplicaId>) = wanted
            .iter()
            .filter(|id| **id != replica.replica_id())
            .partition(|id| is_caught_up(replica, **id));
        all.extend(behind);
        let voters = Members::of(replica)?.all_voters();
        let others = progress.followers.iter().map(|follower| follower.replica);
        let others = others.filter(|id| voters.contains(id) && !wanted.contains(id));
        all.extend(others);
        let index = attempt.checked_rem(all.len())?;
        all.get(index).copied()
    };
    if !hand_over(replica, next, HAND_OVER_TIMEOUT).await {
        warn!(
            raft_group_id = replica.group_id().0,
            "no other replica takes the leadership over"
        );
    }
}

/// Whether a follower is so near to the log end that it can take over within moments.
pub fn is_caught_up(replica: &Replica, follower: ReplicaId) -> bool {
    let Some(progress) = replica.progress() else {
        return false;
    };
    let matched = progress
        .followers
        .iter()
        .find(|other| other.replica == follower);
    let Some(matched) = matched.and_then(|other| other.matched) else {
        return false;
    };
    progress
        .last_index
        .is_none_or(|last| last.saturating_sub(matched) <= LAG_MAX)
}

/// Who could take over from a broker that stops, as it is known now.
pub struct Successors {
    pub links: watch::Receiver<LinkTable>,
    pub view: watch::Receiver<ClusterView>,
}

impl Successors {
    /// Followers to hand over to: connected and not stopping themselves; in-sync ones first, of
    /// those the sound ones, and of those the furthest.
    fn of(&self, replica: &Replica, isr: &[BrokerId]) -> Vec<ReplicaId> {
        let Some(progress) = replica.progress() else {
            return Vec::new();
        };
        let image = self.view.borrow().image.clone();
        let links = self.links.borrow().clone();
        let is_stopping = |broker| {
            image
                .brokers
                .get(&broker)
                .is_some_and(|broker| broker.fenced)
        };
        let mut followers = progress.followers;
        followers.retain(|follower| {
            let broker = follower.replica.broker_id;
            links.status(broker).is_up() && !is_stopping(broker)
        });
        followers.sort_by_key(|follower| {
            let in_sync = isr.contains(&follower.replica.broker_id);
            let is_sound = !replica.is_rebuilding(follower.replica.broker_id);
            Reverse((in_sync, is_sound, follower.matched))
        });
        followers
            .into_iter()
            .map(|follower| follower.replica)
            .collect()
    }
}

/// Hands over every partition that is led here, within `limit`. Returns how many are still led.
pub async fn hand_over_all(
    led: Vec<(Arc<Replica>, Vec<BrokerId>)>,
    successors: &Successors,
    limit: Duration,
) -> usize {
    let deadline = Instant::now() + limit;
    futures::stream::iter(led)
        .map(|(replica, isr)| async move {
            let next = |attempt: usize| {
                let all = successors.of(&replica, &isr);
                let index = attempt.checked_rem(all.len())?;
                all.get(index).copied()
            };
            let left = deadline.saturating_duration_since(Instant::now());
            hand_over(&replica, next, left).await
        })
        .buffer_unordered(PARALLEL_MAX)
        .filter(|gone| std::future::ready(!gone))
        .count()
        .await
}
