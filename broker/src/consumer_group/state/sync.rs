//! SyncGroup: the leader's assignments go to the log, then to the members.
//!
//! Invariant: no member gets an assignment before it is in the log.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{
    Effect, Group, GroupError, GroupState, JoinRefused, Joined, Now, Out, Purpose, Reply, Sync,
    Synced,
};

impl<W> Group<W> {
    /// The answer comes as an effect, maybe of a later call.
    pub fn sync(&mut self, now: Now, request: Sync, waiter: W, out: &mut Out<W>) {
        if let Err(error) = self.check_sync(&request) {
            return out.push(Effect::Reply(waiter, Reply::Sync(Err(error))));
        }
        let synced = Synced {
            protocol_type: self.protocol_type.clone(),
            protocol_name: self.protocol_name.clone(),
            assignment: Bytes::new(),
        };
        let Some(member) = self.members.get_mut(&request.member_id) else {
            return;
        };
        member.sync_pending = false;
        if self.state == GroupState::Stable {
            let synced = Synced {
                assignment: member.assignment.clone(),
                ..synced
            };
            out.push(Effect::Reply(waiter, Reply::Sync(Ok(synced))));
            return self.refresh(now, &request.member_id);
        }
        if let Some(earlier) = member.awaiting_sync.replace(waiter) {
            let error = GroupError::RebalanceInProgress;
            out.push(Effect::Reply(earlier, Reply::Sync(Err(error))));
        }
        let is_leader = self.leader.as_ref() == Some(&request.member_id);
        if is_leader
            && self
                .storing
                .as_ref()
                .is_none_or(|(g, _)| *g != self.generation)
        {
            self.store_assignments(now, request, out);
        }
    }

    pub(super) fn check_sync(&self, request: &Sync) -> Result<(), GroupError> {
        self.check_member(&request.member_id, request.group_instance_id.as_deref())?;
        if request.generation != self.generation {
            return Err(GroupError::IllegalGeneration);
        }
        let differs =
            |asked: &Option<String>, own: &Option<String>| asked.is_some() && asked != own;
        if differs(&request.protocol_type, &self.protocol_type)
            || differs(&request.protocol_name, &self.protocol_name)
        {
            return Err(GroupError::InconsistentProtocol);
        }
        match self.state {
            GroupState::Empty => Err(GroupError::UnknownMember),
            GroupState::PreparingRebalance => Err(GroupError::RebalanceInProgress),
            GroupState::CompletingRebalance | GroupState::Stable => Ok(()),
        }
    }

    pub(super) fn store_assignments(&mut self, now: Now, request: Sync, out: &mut Out<W>) {
        let size: usize = request
            .assignments
            .iter()
            .map(|(_, bytes)| bytes.len())
            .sum();
        if size > self.config.group_size_max_bytes {
            let waiter = self
                .members
                .get_mut(&request.member_id)
                .and_then(|m| m.awaiting_sync.take());
            self.refresh(now, &request.member_id);
            if let Some(waiter) = waiter {
                let error = GroupError::MetadataTooLarge;
                out.push(Effect::Reply(waiter, Reply::Sync(Err(error))));
            }
            return;
        }
        // A member that the leader left out has an empty assignment; an id that is not a member's
        // is left out.
        let assignments: BTreeMap<String, Bytes> = request
            .assignments
            .into_iter()
            .filter(|(id, _)| self.members.contains_key(id))
            .collect();
        let mut value = self.to_value(|id, _| assignments.get(id).cloned().unwrap_or_default());
        value.current_state_timestamp_ms = now.wall_ms;
        self.storing = Some((self.generation, assignments));
        out.push(Effect::Store(
            Purpose::Assignments {
                generation: self.generation,
            },
            value,
        ));
    }

    /// The outcome of an `Effect::Store`.
    pub fn stored(
        &mut self,
        now: Now,
        purpose: Purpose,
        outcome: Result<(), GroupError>,
        out: &mut Out<W>,
    ) {
        match purpose {
            Purpose::Empty => {}
            Purpose::Assignments { generation } => {
                // While the write was under way the group may have gone on: then somebody else
                // has answered those who waited.
                let Some((storing, assignments)) = self.storing.take() else {
                    return;
                };
                if storing != generation || self.state != GroupState::CompletingRebalance {
                    self.storing = Some((storing, assignments)).filter(|_| storing != generation);
                    return;
                }
                match outcome {
                    Ok(()) => self.become_stable(now, assignments, out),
                    Err(error) => {
                        self.answer_syncs(error, out);
                        self.prepare_rebalance(now, out);
                    }
                }
            }
            Purpose::StaticMember {
                generation,
                member_id,
                skip_assignment,
                told_leader,
            } => {
                let as_it_was = self.state == GroupState::Stable && self.generation == generation;
                let waiter = self.members.get_mut(&member_id).and_then(|m| {
                    if as_it_was {
                        m.awaiting_join.take()
                    } else {
                        None
                    }
                });
                // Not as it was: the member waits for the rebalance, as the others do.
                let Some(waiter) = waiter else { return };
                self.refresh(now, &member_id);
                let reply = match outcome {
                    Ok(()) => {
                        let skip = skip_assignment && told_leader == member_id;
                        let joined = self.joined(&member_id, skip, skip);
                        Ok(Joined {
                            leader: told_leader,
                            ..joined
                        })
                    }
                    // The new id was never told; the client asks again and is replaced again.
                    Err(error) => Err(JoinRefused {
                        error,
                        member_id: String::new(),
                    }),
                };
                out.push(Effect::Reply(waiter, Reply::Join(reply)));
            }
        }
    }

    pub(super) fn become_stable(
        &mut self,
        now: Now,
        mut assignments: BTreeMap<String, Bytes>,
        out: &mut Out<W>,
    ) {
        self.enter(now, GroupState::Stable);
        for (id, member) in &mut self.members {
            member.assignment = assignments.remove(id).unwrap_or_default();
            if let Some(waiter) = member.awaiting_sync.take() {
                member.deadline = Some(now.moment + member.session_timeout);
                let synced = Synced {
                    protocol_type: self.protocol_type.clone(),
                    protocol_name: self.protocol_name.clone(),
                    assignment: member.assignment.clone(),
                };
                out.push(Effect::Reply(waiter, Reply::Sync(Ok(synced))));
            }
        }
    }

    pub(super) fn answer_syncs(&mut self, error: GroupError, out: &mut Out<W>) {
        for member in self.members.values_mut() {
            member.assignment = Bytes::new();
            if let Some(waiter) = member.awaiting_sync.take() {
                out.push(Effect::Reply(waiter, Reply::Sync(Err(error))));
            }
        }
    }
}
