//! Hands partitions over to the leaders that the controllers ask for.
//!
//! Invariant: nobody here decides by himself that another broker should lead. A hand-over is begun only
//! towards a replica that is up, caught up and sound.

use std::time::Duration;

use tokio::time::Instant;
use tracing::info;

use super::{Driver, TaskEvent};
use crate::leadership::hand_over::{hand_over_to, is_caught_up};
use crate::peers::membership::Members;

/// Leaders handed over on the controllers' wish in one pass, and the time between passes.
const HAND_BACKS_MAX: usize = 96;
pub(super) const HAND_BACK_INTERVAL: Duration = Duration::from_millis(300);
/// How long who has handed over does not campaign: its successor is at it.
pub(super) const YIELD_TIME: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn plan_hand_back(&mut self, delay: Duration) {
        if self.next_hand_back.is_none() {
            self.next_hand_back = Some(Instant::now() + delay);
        }
    }

    /// Begins some of the hand-overs that are wanted; the others come with the next pass.
    pub(super) fn hand_back(&mut self, now: Instant) {
        if *self.options.draining.borrow() {
            return;
        }
        let image = self.options.view.borrow().image.clone();
        let mut count = 0usize;
        for partition in image.topics.values().flat_map(|topic| &topic.partitions) {
            let Some(wanted) = partition.wanted_leader else {
                continue;
            };
            let id = partition.raft_group_id;
            let Some(group) = self.groups.get_mut(&id) else {
                continue;
            };
            let leads = group.leadership.is_leader && group.leadership.ready;
            let members = Members::of(&group.replica);
            let voters = members.map(|members| members.all_voters());
            let successor = voters
                .unwrap_or_default()
                .into_iter()
                .find(|id| id.broker_id == wanted);
            let Some(successor) = successor.filter(|_| leads) else {
                continue;
            };
            let me = group.replica.replica_id();
            if group.handing_back || group.changing_voters.is_some() || successor == me {
                continue;
            }
            let is_up = self.links.status(wanted).is_up() && !self.fenced.contains(&wanted);
            let is_sound = !group.replica.is_rebuilding(wanted);
            let is_ready = is_up && is_sound && is_caught_up(&group.replica, successor);
            if count == HAND_BACKS_MAX || !is_ready {
                self.next_hand_back = Some(now + HAND_BACK_INTERVAL);
                continue;
            }
            count = count.saturating_add(1);
            group.handing_back = true;
            group.yields_until = Some(now + YIELD_TIME);
            let (replica, events) = (group.replica.clone(), self.events.clone());
            info!(
                raft_group_id = id.0,
                to = wanted.0,
                "hands a partition over as the controllers ask"
            );
            self.tasks.spawn(async move {
                hand_over_to(&replica, &[successor]).await;
                events.send(TaskEvent::HandedBack(id)).ok();
            });
        }
    }
}
