//! Brings a Raft group's voters in line with the assignment: what a leader does when replicas are
//! moved, or when one was replaced by a new incarnation, as after the loss of a disk.
//!
//! Invariant: a new replica votes only after it has the log, and old ones are dropped in the same
//! change; so the group is never weaker than its assignment says. A leader never drops itself: it
//! hands over first, and its successor drops it. Safe to run again at any point.

use std::collections::BTreeSet;
use std::time::Duration;

use chronik_types::id::ReplicaId;
use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, ForwardReason, RaftError};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::replica::raft_config::Membership;
use crate::replica::{FollowerProgress, Replica};

/// A new replica becomes a voter when it has what the log had at most so long ago, or a little longer: the
/// last round of Raft's dissertation, section 4.2.1, by time. Entries are of any size, so their number says
/// nothing of how long the group would wait for it.
const ROUND: Duration = Duration::from_millis(200);
/// How long one change of membership may wait for its majority.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// A new replica that gets nothing for this long makes room for other groups' changes.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the voters are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("raft refused: {0}")]
    Raft(String),
    #[error("no majority in time")]
    TimedOut,
    #[error("the replica leads no more")]
    NotLeader,
    #[error("a new replica does not get any nearer to the log end")]
    Stalled,
    #[error("something else is wanted by now")]
    Abandoned,
}

/// Who is in a group, as one of its replicas knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// One set, or two while a change is under way.
    pub voters: Vec<BTreeSet<ReplicaId>>,
    /// Voters and learners.
    pub nodes: BTreeSet<ReplicaId>,
    /// This membership is committed, and applied here.
    pub is_applied: bool,
}

impl Members {
    /// None where the replica's Raft does not run, and would have to be asked.
    pub fn of(replica: &Replica) -> Option<Members> {
        let Some(raft) = replica.raft() else {
            let (membership, is_applied) = replica.engine().membership_at_rest()?;
            return Some(Members::new(&membership, is_applied));
        };
        let applied = {
            let metrics = raft.data_metrics();
            let metrics = metrics.borrow_watched();
            metrics.last_applied.as_ref().map(|log_id| log_id.index)
        };
        let metrics = raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let stored = &metrics.membership_config;
        let index = stored.log_id().as_ref().map(|log_id| log_id.index);
        let is_applied = index.is_some() && index <= applied;
        Some(Members::new(stored.membership(), is_applied))
    }

    fn new(membership: &Membership, is_applied: bool) -> Members {
        Members {
            voters: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, ())| *id).collect(),
            is_applied,
        }
    }

    /// Exactly these replicas are voters, for good, and there is nobody else.
    pub fn are(&self, wanted: &BTreeSet<ReplicaId>) -> bool {
        self.is_applied && self.have_voters(wanted) && self.nodes == *wanted
    }

    /// Everybody who votes now.
    pub fn all_voters(&self) -> BTreeSet<ReplicaId> {
        self.voters.iter().flatten().copied().collect()
    }

    fn have_voters(&self, wanted: &BTreeSet<ReplicaId>) -> bool {
        self.voters.len() == 1 && self.voters[0] == *wanted
    }
}

/// Makes `wanted` the group's voters, and this replica too as long as it leads; new ones learn
/// first. Waits as long as they make progress, this replica leads and nobody says `abandoned`; what
/// was begun by then is undone or finished by the next change.
pub async fn change_voters(
    replica: &Replica,
    wanted: &BTreeSet<ReplicaId>,
    abandoned: &CancellationToken,
) -> Result<(), MembershipError> {
    let mut step = wanted.clone();
    step.insert(replica.replica_id());
    let members = || Members::of(replica).ok_or(MembershipError::NotLeader);
    let new: Vec<ReplicaId> = step.difference(&members()?.nodes).copied().collect();
    if !new.is_empty()
        && let Err(error) = replica.purge_for_new_replica().await
    {
        // It then gets the log entry by entry.
        tracing::debug!(raft_group_id = %replica.group_id(), %error, "the log is not purged");
    }
    for learner in &new {
        carry_out(replica, &Change::AddLearner(*learner)).await?;
    }
    tokio::select! {
        biased;
        () = abandoned.cancelled() => return Err(MembershipError::Abandoned),
        result = until_caught_up(replica, &step) => result?,
    }
    if !members()?.have_voters(&step) {
        carry_out(replica, &Change::Voters(step.clone())).await?;
    }
    let strays: BTreeSet<ReplicaId> = members()?.nodes.difference(&step).copied().collect();
    if !strays.is_empty() {
        carry_out(replica, &Change::RemoveLearners(strays)).await?;
    }
    Ok(())
}

/// One step of Raft's.
enum Change {
    AddLearner(ReplicaId),
    Voters(BTreeSet<ReplicaId>),
    RemoveLearners(BTreeSet<ReplicaId>),
}

/// Makes one change. A leader whose group has rested asks its followers first, as before a write.
async fn carry_out(replica: &Replica, change: &Change) -> Result<(), MembershipError> {
    let deadline = Instant::now() + CHANGE_TIMEOUT;
    loop {
        let raft = replica
            .leading_raft()
            .await
            .ok_or(MembershipError::NotLeader)?;
        let changed = async {
            match change {
                Change::AddLearner(learner) => raft.add_learner(*learner, (), false).await,
                Change::Voters(voters) => raft.change_membership(voters.clone(), false).await,
                Change::RemoveLearners(gone) => {
                    let removal = ChangeMembers::RemoveNodes(gone.clone());
                    raft.change_membership(removal, false).await
                }
            }
        };
        let refused = match timeout_at(deadline, changed).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => return Err(MembershipError::TimedOut),
        };
        match refused {
            RaftError::APIError(ClientWriteError::ForwardToLeader(forward))
                if forward.reason == ForwardReason::LeaseExpired =>
            {
                let renewed = replica.renew_lease(deadline).await;
                renewed.map_err(|error| MembershipError::Raft(error.to_string()))?;
            }
            error => return Err(MembershipError::Raft(error.to_string())),
        }
    }
}

async fn until_caught_up(
    replica: &Replica,
    wanted: &BTreeSet<ReplicaId>,
) -> Result<(), MembershipError> {
    let raft = replica
        .leading_raft()
        .await
        .ok_or(MembershipError::NotLeader)?;
    let mut metrics = raft.data_metrics();
    let mut best = Vec::new();
    let mut deadline = Instant::now() + STALL_TIMEOUT;
    let mut ends = RecentEnds::new(log_end(replica)?, Instant::now());
    loop {
        ends.observe(log_end(replica)?, Instant::now());
        let behind = lagging(replica, wanted, ends.older)?;
        if behind.is_empty() {
            return Ok(());
        }
        // The list gets shorter, or somebody in it further.
        let now: Vec<Option<u64>> = behind.iter().map(|follower| follower.matched).collect();
        if now != best {
            best = now;
            deadline = Instant::now() + STALL_TIMEOUT;
        }
        match timeout_at(deadline, metrics.changed()).await {
            Ok(Ok(())) => drop(metrics.borrow_and_update()),
            Ok(Err(_)) => return Err(MembershipError::NotLeader),
            Err(_) => return Err(MembershipError::Stalled),
        }
    }
}

/// Where the log ended a moment ago, for who looks at every change of it.
struct RecentEnds {
    older: u64,
    newer: u64,
    newer_at: Instant,
    /// At the look before.
    last: u64,
}

impl RecentEnds {
    fn new(end: u64, now: Instant) -> RecentEnds {
        RecentEnds {
            older: end,
            newer: end,
            newer_at: now,
            last: end,
        }
    }

    /// `older` is then the end of one to two rounds ago.
    fn observe(&mut self, end: u64, now: Instant) {
        let age = now.saturating_duration_since(self.newer_at);
        if age >= ROUND {
            // Where nobody looked for longer, what was seen last is not that old.
            self.older = match age < ROUND * 2 {
                true => self.newer,
                false => self.last,
            };
            (self.newer, self.newer_at) = (end, now);
        }
        self.last = end;
    }
}

fn log_end(replica: &Replica) -> Result<u64, MembershipError> {
    let progress = replica.progress().ok_or(MembershipError::NotLeader)?;
    Ok(progress.last_index.unwrap_or(0))
}

/// The wanted replicas that have not all up to `end`, and so must not vote yet. Those that vote already
/// need not be up for a change.
fn lagging(
    replica: &Replica,
    wanted: &BTreeSet<ReplicaId>,
    end: u64,
) -> Result<Vec<FollowerProgress>, MembershipError> {
    let progress = replica.progress().ok_or(MembershipError::NotLeader)?;
    let voters = Members::of(replica)
        .ok_or(MembershipError::NotLeader)?
        .all_voters();
    let new = wanted
        .iter()
        .filter(|id| **id != replica.replica_id() && !voters.contains(id));
    let state = |id: &ReplicaId| {
        let known = progress.followers.iter().find(|f| f.replica == *id);
        FollowerProgress {
            replica: *id,
            matched: known.and_then(|follower| follower.matched),
        }
    };
    let has_it =
        |follower: &FollowerProgress| follower.matched.is_some_and(|matched| matched >= end);
    Ok(new
        .map(state)
        .filter(|follower| !has_it(follower))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_replica_is_measured_by_the_end_of_a_moment_ago() {
        let start = Instant::now();
        let mut ends = RecentEnds::new(100, start);
        // A log that grows by 10 with each of the looks, 50 ms apart.
        for look in 1..=20 {
            let now = start + Duration::from_millis(50).saturating_mul(look);
            ends.observe(100 + 10 * u64::from(look), now);
            let end = 100 + 10 * u64::from(look);
            let age = Duration::from_millis(5 * (end - ends.older));
            assert!(age < ROUND * 2, "{age:?}");
            assert!(look <= 4 || age >= ROUND, "{age:?}");
        }
        ends.observe(500, start + Duration::from_secs(1));
        ends.observe(500, start + Duration::from_secs(60));
        assert_eq!(ends.older, 500, "after a time without a look");
    }
}
