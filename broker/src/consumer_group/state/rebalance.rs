//! What time does to a group, and the rebalance itself.
//!
//! Invariant: a rebalance ends: by everybody's return, or by its deadline.

use std::time::Duration;

use bytes::Bytes;

use super::super::member::{Member, elect_protocol};
use super::{
    Effect, Group, GroupError, GroupState, InitialRebalance, JoinRefused, Moment,
    NEW_MEMBER_JOIN_TIMEOUT, Now, Out, POSTPONED_REBALANCE_MIN, Purpose, Reply,
};

impl<W> Group<W> {
    /// When `on_time` has something to do next.
    pub fn next_deadline(&self) -> Option<Moment> {
        let members = self.members.values().filter_map(|member| member.deadline);
        let pending = self.pending_members.values().copied();
        let own = self.join_deadline.into_iter().chain(self.sync_deadline);
        members.chain(pending).chain(own).min()
    }

    /// Does what is due at `now`.
    pub fn on_time(&mut self, now: Now, out: &mut Out<W>) {
        let due = |deadline: &Moment| *deadline <= now.moment;
        let pending = self.pending_members.len();
        self.pending_members.retain(|_, deadline| !due(deadline));
        if self.pending_members.len() != pending {
            self.complete_if_all_joined(now, out);
        }
        let mut expired = Vec::new();
        for (id, member) in self
            .members
            .iter_mut()
            .filter(|(_, m)| m.deadline.as_ref().is_some_and(due))
        {
            if member.is_awaiting() && !member.is_new {
                // It waits for us; its session starts again with the answer.
                member.deadline = None;
            } else {
                expired.push(id.clone());
            }
        }
        for id in expired {
            self.remove_and_rebalance(now, &id, out);
        }
        if self.join_deadline.as_ref().is_some_and(due) {
            self.on_join_deadline(now, out);
        }
        if self.sync_deadline.as_ref().is_some_and(due) {
            self.on_sync_deadline(now, out);
        }
    }

    pub(super) fn on_join_deadline(&mut self, now: Now, out: &mut Out<W>) {
        let delay = self.config.initial_rebalance_delay();
        match &mut self.initial_rebalance {
            Some(initial) if initial.new_member_added && !initial.remaining.is_zero() => {
                let wait = delay.min(initial.remaining);
                initial.new_member_added = false;
                initial.remaining -= wait;
                self.join_deadline = Some(now.moment + wait);
            }
            _ => self.complete_join(now, out),
        }
    }

    pub(super) fn on_sync_deadline(&mut self, now: Now, out: &mut Out<W>) {
        self.sync_deadline = None;
        let missing: Vec<String> = self
            .members
            .iter()
            .filter(|(_, member)| member.sync_pending)
            .map(|(id, _)| id.clone())
            .collect();
        if missing.is_empty() {
            return;
        }
        for id in missing {
            self.remove(&id, out);
        }
        self.prepare_rebalance(now, out);
    }

    pub(super) fn enter(&mut self, now: Now, state: GroupState) {
        self.state = state;
        self.state_changed_wall_ms = now.wall_ms;
    }

    /// The member's session starts again.
    pub(super) fn refresh(&mut self, now: Now, id: &str) {
        if let Some(member) = self.members.get_mut(id) {
            let timeout = if member.is_new {
                NEW_MEMBER_JOIN_TIMEOUT
            } else {
                member.session_timeout
            };
            member.deadline = Some(now.moment + timeout);
        }
    }

    pub(super) fn rebalance_timeout(&self) -> Duration {
        self.members
            .values()
            .map(|member| member.rebalance_timeout)
            .max()
            .unwrap_or_default()
    }

    pub(super) fn all_joined(&self) -> bool {
        self.pending_members.is_empty()
            && self
                .members
                .values()
                .all(|member| member.awaiting_join.is_some())
    }

    pub(super) fn prepare_or_complete(&mut self, now: Now, out: &mut Out<W>) {
        if self.state == GroupState::PreparingRebalance {
            self.complete_if_all_joined(now, out);
        } else {
            self.prepare_rebalance(now, out);
        }
    }

    pub(super) fn complete_if_all_joined(&mut self, now: Now, out: &mut Out<W>) {
        // The first rebalance of an empty group always waits for its time.
        if self.state == GroupState::PreparingRebalance
            && self.initial_rebalance.is_none()
            && self.all_joined()
        {
            self.complete_join(now, out);
        }
    }

    pub(super) fn prepare_rebalance(&mut self, now: Now, out: &mut Out<W>) {
        if self.state == GroupState::CompletingRebalance {
            self.answer_syncs(GroupError::RebalanceInProgress, out);
        }
        for member in self.members.values_mut() {
            member.sync_pending = false;
        }
        self.sync_deadline = None;
        self.storing = None;
        let was_empty = self.state == GroupState::Empty;
        self.enter(now, GroupState::PreparingRebalance);
        let timeout = self.rebalance_timeout();
        if was_empty {
            let delay = self.config.initial_rebalance_delay();
            let remaining = timeout.saturating_sub(delay);
            self.initial_rebalance = Some(InitialRebalance {
                remaining,
                new_member_added: false,
            });
            self.join_deadline = Some(now.moment + delay);
        } else {
            self.join_deadline = Some(now.moment + timeout);
            self.complete_if_all_joined(now, out);
        }
    }

    /// Ends the join phase: who is not back is out, unless it is static and its session runs.
    pub(super) fn complete_join(&mut self, now: Now, out: &mut Out<W>) {
        let missing: Vec<String> = self
            .members
            .iter()
            .filter(|(_, member)| member.awaiting_join.is_none() && !member.is_static())
            .map(|(id, _)| id.clone())
            .collect();
        for id in missing {
            self.remove(&id, out);
        }
        if !self.elect_joined_leader() && !self.members.is_empty() {
            let wait = self.rebalance_timeout().max(POSTPONED_REBALANCE_MIN);
            self.join_deadline = Some(now.moment + wait);
            return;
        }
        self.join_deadline = None;
        self.initial_rebalance = None;
        // Wraps to 0 rather than overflow; -1 means "outside the group".
        self.generation = self.generation.checked_add(1).unwrap_or(0);
        if self.members.is_empty() {
            self.protocol_name = None;
            self.leader = None;
            self.enter(now, GroupState::Empty);
            let value = self.to_value(|_, _| Bytes::new());
            return out.push(Effect::Store(Purpose::Empty, value));
        }
        self.protocol_name = elect_protocol(&self.members, self.leader.as_deref());
        self.enter(now, GroupState::CompletingRebalance);
        self.sync_deadline = Some(now.moment + self.rebalance_timeout());
        self.answer_joins(now, out);
    }

    /// The leader stays if it is back; else the first that is. False: nobody is.
    pub(super) fn elect_joined_leader(&mut self) -> bool {
        let joined = |member: &Member<W>| member.awaiting_join.is_some();
        let leader = self.leader.as_ref().and_then(|id| self.members.get(id));
        if leader.is_some_and(joined) {
            return true;
        }
        let first = self.members.iter().find(|(_, member)| joined(member));
        match first.map(|(id, _)| id.clone()) {
            Some(id) => {
                self.leader = Some(id);
                true
            }
            None => false,
        }
    }

    pub(super) fn answer_joins(&mut self, now: Now, out: &mut Out<W>) {
        let ids: Vec<String> = self.members.keys().cloned().collect();
        for id in ids {
            let is_leader = self.leader.as_ref() == Some(&id);
            let joined = self.joined(&id, is_leader, false);
            let Some(member) = self.members.get_mut(&id) else {
                continue;
            };
            member.deadline = Some(now.moment + member.session_timeout);
            member.is_new = false;
            member.sync_pending = true;
            if let Some(waiter) = member.awaiting_join.take() {
                out.push(Effect::Reply(waiter, Reply::Join(Ok(joined))));
            }
        }
    }

    pub(super) fn remove_and_rebalance(&mut self, now: Now, id: &str, out: &mut Out<W>) {
        if !self.remove(id, out) {
            return;
        }
        match self.state {
            GroupState::Empty => {}
            GroupState::PreparingRebalance => self.complete_if_all_joined(now, out),
            GroupState::CompletingRebalance | GroupState::Stable => {
                self.prepare_rebalance(now, out);
            }
        }
    }

    /// Takes a member out and answers its open calls, so that a client which lives joins again.
    pub(super) fn remove(&mut self, id: &str, out: &mut Out<W>) -> bool {
        let Some(mut member) = self.members.remove(id) else {
            return false;
        };
        if let Some(waiter) = member.awaiting_join.take() {
            let refused = JoinRefused {
                error: GroupError::UnknownMember,
                member_id: id.to_owned(),
            };
            out.push(Effect::Reply(waiter, Reply::Join(Err(refused))));
        }
        if let Some(waiter) = member.awaiting_sync.take() {
            out.push(Effect::Reply(
                waiter,
                Reply::Sync(Err(GroupError::UnknownMember)),
            ));
        }
        if let Some(instance) = &member.group_instance_id {
            self.static_members.remove(instance);
        }
        if self.leader.as_deref() == Some(id) {
            self.leader = self.members.keys().next().cloned();
        }
        true
    }
}
