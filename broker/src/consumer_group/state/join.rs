//! JoinGroup: new members, members that come back, and static members that take over.
//!
//! Invariant: a member is never answered with a generation that it is not part of.

use bytes::Bytes;

use super::super::member::{Member, elect_protocol};
use super::{
    Effect, Group, GroupError, GroupState, Join, JoinRefused, Joined, JoinedMember,
    NEW_MEMBER_JOIN_TIMEOUT, Now, Out, Purpose, Reply,
};

impl<W> Group<W> {
    /// The answer comes as an effect, maybe of a later call.
    pub fn join(&mut self, now: Now, request: Join, waiter: W, out: &mut Out<W>) {
        let refuse = |error| {
            let member_id = request.member_id.clone();
            Reply::Join(Err(JoinRefused { error, member_id }))
        };
        if !self.has_room_for(&request.member_id) {
            self.remove_and_rebalance(now, &request.member_id.clone(), out);
            return out.push(Effect::Reply(waiter, refuse(GroupError::GroupFull)));
        }
        if !self.supports(&request) {
            return out.push(Effect::Reply(
                waiter,
                refuse(GroupError::InconsistentProtocol),
            ));
        }
        if !self.fits(&request) {
            return out.push(Effect::Reply(waiter, refuse(GroupError::MetadataTooLarge)));
        }
        if request.member_id.is_empty() {
            return self.join_new(now, request, waiter, out);
        }
        if self.pending_members.contains_key(&request.member_id) {
            if request.group_instance_id.is_some() {
                return out.push(Effect::Reply(waiter, refuse(GroupError::UnknownMember)));
            }
            let id = request.member_id.clone();
            return self.add_member(now, id, request, waiter, out);
        }
        match self.check_member(&request.member_id, request.group_instance_id.as_deref()) {
            Err(error) => out.push(Effect::Reply(waiter, refuse(error))),
            Ok(()) => self.rejoin(now, request, waiter, out),
        }
    }

    pub(super) fn has_room_for(&self, member_id: &str) -> bool {
        let member = self.members.get(member_id);
        let max = self.config.members_max;
        match self.state {
            GroupState::Empty => self.pending_members.len() <= max,
            GroupState::PreparingRebalance => {
                let waits = member.is_some_and(|member| member.awaiting_join.is_some());
                let waiting = self
                    .members
                    .values()
                    .filter(|m| m.awaiting_join.is_some())
                    .count();
                waits || waiting < max && self.pending_members.len() <= max
            }
            GroupState::CompletingRebalance | GroupState::Stable => {
                member.is_some() || self.members.len() < max && self.pending_members.len() <= max
            }
        }
    }

    /// The member has a protocol that everybody has.
    pub(super) fn supports(&self, request: &Join) -> bool {
        if self.members.is_empty() {
            return !request.protocol_type.is_empty() && !request.protocols.is_empty();
        }
        self.protocol_type.as_ref() == Some(&request.protocol_type)
            && request
                .protocols
                .iter()
                .any(|(name, _)| self.members.values().all(|member| member.supports(name)))
    }

    /// All members together stay within what one record may hold.
    pub(super) fn fits(&self, request: &Join) -> bool {
        let others = self
            .members
            .iter()
            .filter(|(id, _)| **id != request.member_id);
        let size: usize = others
            .map(|(id, member)| id.len() + member.size_bytes())
            .sum();
        size.saturating_add(request.size_bytes()) <= self.config.group_size_max_bytes
    }

    pub(super) fn check_member(
        &self,
        member_id: &str,
        instance: Option<&str>,
    ) -> Result<(), GroupError> {
        if let Some(instance) = instance {
            match self.static_members.get(instance) {
                None => return Err(GroupError::UnknownMember),
                Some(current) if current != member_id => return Err(GroupError::FencedInstance),
                Some(_) => {}
            }
        }
        if self.members.contains_key(member_id) {
            Ok(())
        } else {
            Err(GroupError::UnknownMember)
        }
    }

    pub(super) fn join_new(&mut self, now: Now, request: Join, waiter: W, out: &mut Out<W>) {
        let id = request.new_member_id.clone();
        if let Some(instance) = &request.group_instance_id {
            return match self.static_members.get(instance).cloned() {
                Some(old_id) => self.replace_static_member(now, old_id, request, waiter, out),
                None => self.add_member(now, id, request, waiter, out),
            };
        }
        if request.require_known_member_id {
            self.pending_members
                .insert(id.clone(), now.moment + request.session_timeout);
            let refused = JoinRefused {
                error: GroupError::MemberIdRequired,
                member_id: id,
            };
            return out.push(Effect::Reply(waiter, Reply::Join(Err(refused))));
        }
        self.add_member(now, id, request, waiter, out);
    }

    pub(super) fn add_member(
        &mut self,
        now: Now,
        id: String,
        request: Join,
        waiter: W,
        out: &mut Out<W>,
    ) {
        if let Some(initial) = &mut self.initial_rebalance {
            initial.new_member_added = true;
        }
        self.pending_members.remove(&id);
        if self.members.is_empty() {
            self.protocol_type = Some(request.protocol_type.clone());
        }
        if let Some(instance) = &request.group_instance_id {
            self.static_members.insert(instance.clone(), id.clone());
        }
        let member = Member {
            group_instance_id: request.group_instance_id,
            client_id: request.client_id,
            client_host: request.client_host,
            session_timeout: request.session_timeout,
            rebalance_timeout: request.rebalance_timeout,
            protocols: request.protocols,
            assignment: Bytes::new(),
            deadline: Some(now.moment + NEW_MEMBER_JOIN_TIMEOUT),
            is_new: true,
            sync_pending: false,
            awaiting_join: Some(waiter),
            awaiting_sync: None,
        };
        self.leader.get_or_insert_with(|| id.clone());
        self.members.insert(id, member);
        self.prepare_or_complete(now, out);
    }

    pub(super) fn rejoin(&mut self, now: Now, request: Join, waiter: W, out: &mut Out<W>) {
        let id = request.member_id.clone();
        let is_leader = self.leader.as_ref() == Some(&id);
        let unchanged = self
            .members
            .get(&id)
            .is_some_and(|member| member.protocols == request.protocols);
        match self.state {
            // A retry of somebody who missed the answer: the generation stands.
            GroupState::CompletingRebalance if unchanged => {
                let joined = self.joined(&id, is_leader, false);
                self.refresh(now, &id);
                out.push(Effect::Reply(waiter, Reply::Join(Ok(joined))));
            }
            GroupState::Stable if unchanged && !is_leader => {
                let joined = self.joined(&id, false, false);
                self.refresh(now, &id);
                out.push(Effect::Reply(waiter, Reply::Join(Ok(joined))));
            }
            GroupState::Empty => {
                let refused = JoinRefused {
                    error: GroupError::UnknownMember,
                    member_id: id,
                };
                out.push(Effect::Reply(waiter, Reply::Join(Err(refused))));
            }
            GroupState::PreparingRebalance
            | GroupState::CompletingRebalance
            | GroupState::Stable => {
                self.update_member(&id, request, waiter, out);
                self.prepare_or_complete(now, out);
            }
        }
    }

    pub(super) fn update_member(&mut self, id: &str, request: Join, waiter: W, out: &mut Out<W>) {
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        member.protocols = request.protocols;
        member.session_timeout = request.session_timeout;
        member.rebalance_timeout = request.rebalance_timeout;
        member.client_id = request.client_id;
        member.client_host = request.client_host;
        if let Some(earlier) = member.awaiting_join.replace(waiter) {
            let refused = JoinRefused {
                error: GroupError::RebalanceInProgress,
                member_id: id.to_owned(),
            };
            out.push(Effect::Reply(earlier, Reply::Join(Err(refused))));
        }
    }

    /// A static member has restarted: it takes its place over under a new id (KIP-345).
    pub(super) fn replace_static_member(
        &mut self,
        now: Now,
        old_id: String,
        request: Join,
        waiter: W,
        out: &mut Out<W>,
    ) {
        let new_id = request.new_member_id.clone();
        let skip_assignment = request.supports_skip_assignment;
        let old_leader = self.leader.clone().unwrap_or_default();
        let Some(mut member) = self.members.remove(&old_id) else {
            return;
        };
        if let Some(waiter) = member.awaiting_join.take() {
            let fenced = JoinRefused {
                error: GroupError::FencedInstance,
                member_id: old_id.clone(),
            };
            out.push(Effect::Reply(waiter, Reply::Join(Err(fenced))));
        }
        if let Some(waiter) = member.awaiting_sync.take() {
            out.push(Effect::Reply(
                waiter,
                Reply::Sync(Err(GroupError::FencedInstance)),
            ));
        }
        if let Some(instance) = &member.group_instance_id {
            self.static_members.insert(instance.clone(), new_id.clone());
        }
        if self.leader.as_ref() == Some(&old_id) {
            self.leader = Some(new_id.clone());
        }
        self.members.insert(new_id.clone(), member);
        self.update_member(&new_id, request, waiter, out);
        self.refresh(now, &new_id);
        let same_protocol = self.protocol_name.is_some()
            && elect_protocol(&self.members, self.leader.as_deref()) == self.protocol_name;
        if self.state == GroupState::Stable && same_protocol {
            let value = self.to_value(|_, member| member.assignment.clone());
            let purpose = Purpose::StaticMember {
                generation: self.generation,
                member_id: new_id.clone(),
                skip_assignment,
                told_leader: if skip_assignment {
                    self.leader.clone().unwrap_or_default()
                } else {
                    old_leader
                },
            };
            return out.push(Effect::Store(purpose, value));
        }
        self.prepare_or_complete(now, out);
    }

    pub(super) fn joined(&self, id: &str, with_members: bool, skip_assignment: bool) -> Joined {
        let protocol = self.protocol_name();
        let view = |(id, member): (&String, &Member<W>)| JoinedMember {
            member_id: id.clone(),
            group_instance_id: member.group_instance_id.clone(),
            metadata: member.metadata(protocol),
        };
        Joined {
            generation: self.generation,
            protocol_type: self.protocol_type.clone(),
            protocol_name: self.protocol_name.clone(),
            leader: self.leader.clone().unwrap_or_default(),
            member_id: id.to_owned(),
            members: if with_members {
                self.members.iter().map(view).collect()
            } else {
                vec![]
            },
            skip_assignment,
        }
    }
}
