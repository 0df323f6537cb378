//! Who votes among the controllers: a new disk of a controller takes the place of the one before.
//!
//! Invariant: at most one node per controller votes for good. Each step looks at the membership in
//! force and does what is next, so that it may be asked again, by anybody, after any crash.

use std::collections::BTreeSet;
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::type_config::async_runtime::WatchReceiver;

use super::introduction;
use super::node::{ControllersRaft, Leadership, RaftNode};
use super::type_config::{Membership, TypeConfig};
use crate::founding::NodeId;

/// A new member may lack so many entries when it begins to vote.
const LAG_ENTRIES_MAX: u64 = 100;
/// Longest wait for a majority to take a change of the membership.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// What became of a request to be let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    NotLeader,
    /// A step was done, or could not be done yet: ask again.
    UnderWay,
    /// It votes, and nobody else under its controller's id.
    Done,
    Refused(String),
}

/// What is to be done next to let somebody in.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    AddLearner,
    /// It has to learn the log first.
    AwaitLog,
    ChangeVoters(BTreeSet<u64>),
    /// Former nodes of the controller that do not vote.
    RemoveLearners(BTreeSet<u64>),
}

impl RaftNode {
    /// One step towards `joiner` voting in place of its controller's former nodes.
    pub async fn admit(&self, joiner: NodeId) -> Admission {
        let _one_at_a_time = self.membership_lock().lock().await;
        let Some((_, raft)) = self.member() else {
            return Admission::NotLeader;
        };
        if !matches!(*self.leadership().borrow(), Leadership::Local { .. }) {
            return Admission::NotLeader;
        }
        let step = next_step(&membership(raft), joiner, has_log(raft, joiner));
        if step == Step::Nothing {
            return Admission::Done;
        }
        // A request that was long under way may come from a disk that is gone by now.
        if let Err(why) = self.confirm(joiner).await {
            return Admission::Refused(why);
        }
        let done = match step {
            Step::Nothing | Step::AwaitLog => return Admission::UnderWay,
            Step::AddLearner => {
                tracing::info!(node = %joiner, "a controller with a new disk learns the log");
                change(raft.add_learner(joiner.to_raft(), (), false)).await
            }
            Step::ChangeVoters(voters) => {
                tracing::info!(node = %joiner, ?voters, "a controller with a new disk votes");
                change(raft.change_membership(voters, false)).await
            }
            Step::RemoveLearners(gone) => {
                let remove = ChangeMembers::RemoveNodes(gone);
                change(raft.change_membership(remove, false)).await
            }
        };
        match done {
            Changed::Yes | Changed::NotNow => Admission::UnderWay,
            Changed::NotLeader => Admission::NotLeader,
        }
    }

    /// Whether this node votes, and alone for its controller, as far as it knows.
    pub fn is_settled(&self) -> bool {
        self.member().is_some_and(|(own_id, raft)| {
            next_step(&membership(raft), own_id, true) == Step::Nothing
        })
    }

    /// Asks back at the address that all controllers are configured with.
    async fn confirm(&self, joiner: NodeId) -> Result<(), String> {
        let id = joiner.controller_id();
        let Some(channel) = self.peers().channel(id) else {
            return Err(format!(
                "controller {id} is not in the leader's configuration"
            ));
        };
        match introduction::describe(channel, self.controller_id(), id).await {
            Ok(found) if found.standing.identity.node_id == Some(joiner) => Ok(()),
            Ok(_) => Err(format!(
                "another process answers at the address of controller {id}"
            )),
            Err(status) => Err(format!(
                "controller {id} does not answer: {}",
                status.message()
            )),
        }
    }
}

fn membership(raft: &ControllersRaft) -> Membership {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    metrics.membership_config.membership().clone()
}

/// Whether the leader's log is nearly all there.
fn has_log(raft: &ControllersRaft, joiner: NodeId) -> bool {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let replication = metrics.replication.as_ref();
    let matching = replication.and_then(|all| all.get(&joiner.to_raft()).copied().flatten());
    matching.is_some_and(|log_id| {
        log_id.index.saturating_add(LAG_ENTRIES_MAX) >= metrics.last_log_index.unwrap_or(0)
    })
}

fn next_step(membership: &Membership, joiner: NodeId, has_log: bool) -> Step {
    let id = joiner.to_raft();
    let is_former = |other: u64| {
        other != id && NodeId::of_raft(other).controller_id() == joiner.controller_id()
    };
    let sets = membership.get_joint_config();
    let target = sets.last().cloned().unwrap_or_default();
    let nodes: BTreeSet<u64> = membership.nodes().map(|(node, ())| *node).collect();
    if !nodes.contains(&id) {
        return Step::AddLearner;
    }
    if !target.contains(&id) && !has_log {
        return Step::AwaitLog;
    }
    let mut voters: BTreeSet<u64> = target.iter().copied().filter(|o| !is_former(*o)).collect();
    voters.insert(id);
    // A change that was left half done has two sets of voters.
    if voters != target || sets.len() > 1 {
        return Step::ChangeVoters(voters);
    }
    let gone: BTreeSet<u64> = nodes
        .into_iter()
        .filter(|other| is_former(*other))
        .collect();
    match gone.is_empty() {
        true => Step::Nothing,
        false => Step::RemoveLearners(gone),
    }
}

enum Changed {
    Yes,
    NotNow,
    NotLeader,
}

type Change<T> = Result<T, RaftError<TypeConfig, ClientWriteError<TypeConfig>>>;

async fn change<T>(change: impl Future<Output = Change<T>>) -> Changed {
    match tokio::time::timeout(CHANGE_TIMEOUT, change).await {
        Ok(Ok(_)) => Changed::Yes,
        Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => Changed::NotLeader,
        Ok(Err(RaftError::Fatal(_))) => Changed::NotLeader,
        Ok(Err(RaftError::APIError(error))) => {
            tracing::info!(%error, "the controllers' membership cannot be changed yet");
            Changed::NotNow
        }
        Err(_) => Changed::NotNow,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(voters: &[&[u64]], learners: &[u64], joiner: NodeId, has_log: bool) -> Step {
        let voters: Vec<BTreeSet<u64>> = voters
            .iter()
            .map(|set| set.iter().copied().collect())
            .collect();
        let nodes: BTreeSet<u64> = learners.iter().copied().collect();
        next_step(
            &Membership::new_with_defaults(voters, nodes),
            joiner,
            has_log,
        )
    }

    #[test]
    fn a_new_disk_learns_then_votes_and_the_old_one_goes() {
        let joiner = NodeId::new(2, 5).unwrap();
        let id = joiner.to_raft();
        let voters = || BTreeSet::from([1, 3, id]);
        assert_eq!(check(&[&[1, 2, 3]], &[], joiner, false), Step::AddLearner);
        assert_eq!(check(&[&[1, 2, 3]], &[id], joiner, false), Step::AwaitLog);
        let change = || Step::ChangeVoters(voters());
        assert_eq!(check(&[&[1, 2, 3]], &[id], joiner, true), change());
        // The leader died between the two entries of the change.
        let half_done = check(&[&[1, 2, 3], &[1, 3, id]], &[], joiner, false);
        assert_eq!(half_done, change());
        assert_eq!(check(&[&[1, 3, id]], &[], joiner, false), Step::Nothing);
        // The disk before this one was lost while it was still learning.
        let before = NodeId::new(2, 4).unwrap().to_raft();
        let removed = check(&[&[1, 3, id]], &[before], joiner, true);
        assert_eq!(removed, Step::RemoveLearners([before].into()));
        let founder = NodeId::founder(2);
        assert_eq!(check(&[&[1, 2, 3]], &[], founder, false), Step::Nothing);
    }
}
