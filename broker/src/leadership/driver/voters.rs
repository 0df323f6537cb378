//! Makes the voters of the partitions led here what the assignment wants.
//!
//! Invariant: while replicas are being moved, a leader acts only on an image that shows it as the leader.

use std::collections::BTreeSet;
use std::time::Duration;

use chronik_types::id::{RaftGroupId, ReplicaId};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::hand_back::YIELD_TIME;
use super::{Driver, Group, LedEvent, TaskEvent};
use crate::leadership::hand_over::hand_over_to;
use crate::peers::membership::{Members, MembershipError, change_voters};
use crate::replica::Replica;

const CHANGE_RETRY_DELAY: Duration = Duration::from_secs(2);

impl Driver {
    /// A leader whose group has other voters than its assignment wants changes them. While replicas
    /// are being moved, only once the image shows it as the leader: so an image that is older than
    /// what the leader before it has completed can never be acted on.
    pub(super) fn check_voters(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        let leads = group.leadership.is_leader && group.leadership.ready;
        let is_known = group.moving.is_none_or(|moving| {
            moving.leader == Some(self.options.broker_id)
                && moving.leader_epoch == group.leadership.leader_epoch
        });
        if !leads || group.changing_voters.is_some() || !is_known {
            self.unsettled.remove(&id);
            return;
        }
        let wanted: BTreeSet<ReplicaId> = group.voters.iter().copied().collect();
        let Some(members) = Members::of(&group.replica) else {
            return;
        };
        if members.are(&wanted) {
            self.unsettled.remove(&id);
            if let Some(moving) = group.moving {
                let event = LedEvent::Settled(id, moving.partition_epoch);
                self.options.led.send(event).ok();
            }
            return;
        }
        self.unsettled.insert(id);
        let mut new = wanted.difference(&members.nodes);
        if new.any(|replica| !self.links.status(replica.broker_id).is_up()) {
            // It is looked at again when the links or the image change.
            return;
        }
        if !wanted.contains(&group.replica.replica_id()) {
            // It will hand over in the end, and must not take back what it gave.
            group.yields_until = Some(Instant::now() + CHANGE_RETRY_DELAY + YIELD_TIME);
        }
        let abandoned = group.stop_watching.child_token();
        group.changing_voters = Some(abandoned.clone());
        let (replica, events, changes) = (
            group.replica.clone(),
            self.events.clone(),
            self.changes.clone(),
        );
        let (voters, stop) = (group.voters.clone(), group.stop_watching.clone());
        let change = async move {
            if let Err(error) = settle_voters(&replica, &voters, &changes, &abandoned).await {
                info!(raft_group_id = id.0, %error, "the voters are not changed yet");
                let retry = tokio::time::sleep(CHANGE_RETRY_DELAY);
                tokio::select! {
                    () = retry => {}
                    () = abandoned.cancelled() => {}
                }
            }
            events.send(TaskEvent::VotersChanged(id)).ok();
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = change => {}
            }
        });
    }

    pub(super) fn check_unsettled(&mut self) {
        for group in std::mem::take(&mut self.unsettled) {
            self.check_voters(group);
        }
    }
}

/// Who votes in the group's elections, as far as this replica knows, preferred leader first. A new
/// replica knows nothing yet, and goes by its assignment.
pub(super) fn electorate(group: &Group) -> Vec<ReplicaId> {
    let members = Members::of(&group.replica);
    let voting = members
        .map(|members| members.all_voters())
        .unwrap_or_default();
    if voting.is_empty() {
        return group.replicas.clone();
    }
    let assigned = group.replicas.iter().copied();
    let mut voters: Vec<ReplicaId> = assigned.filter(|id| voting.contains(id)).collect();
    let others = voting.iter().copied();
    voters.extend(others.filter(|id| !group.replicas.contains(id)));
    voters
}

/// Makes the voters what they should be; a leader that shall not vote any more hands over.
async fn settle_voters(
    replica: &Replica,
    voters: &[ReplicaId],
    changes: &Semaphore,
    abandoned: &CancellationToken,
) -> Result<(), MembershipError> {
    let permit = tokio::select! {
        permit = changes.acquire() => permit,
        () = abandoned.cancelled() => return Err(MembershipError::Abandoned),
    };
    // The semaphore is never closed.
    let _permit = permit.ok();
    let group_id = replica.group_id().0;
    info!(raft_group_id = group_id, wanted = ?voters, "changes the voters of a partition");
    let wanted: BTreeSet<ReplicaId> = voters.iter().copied().collect();
    change_voters(replica, &wanted, abandoned).await?;
    if !wanted.contains(&replica.replica_id()) && !abandoned.is_cancelled() {
        info!(
            raft_group_id = group_id,
            "hands a partition over to those that stay"
        );
        hand_over_to(replica, voters).await;
    }
    Ok(())
}
