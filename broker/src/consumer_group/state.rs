//! The classic consumer group protocol as a pure state machine: requests and the current time in,
//! answers and writes out. No I/O, no clock, no randomness.
//!
//! Behaviour is Apache Kafka's (group coordinator of 4.x): KIP-62 rebalance timeouts, KIP-134
//! initial delay, KIP-345 static members, KIP-394 known member ids, KIP-814 skipped assignments.
//!
//! Invariant: a generation's members and assignments are handed out only after the log has them;
//! every waiter is answered exactly once or dropped with its group.
//!
//! ```text
//!            join                all joined, or time is up          leader's sync is in the log
//!   Empty ---------> Preparing -------------------------> Completing ------------> Stable
//!     ^              Rebalance <-------------------------- Rebalance                 |
//!     |                | ^      a member joins, leaves, or times out                 |
//!     +----------------+ +-----------------------------------------------------------+
//!       nobody is left
//! ```

mod join;
mod messages;
mod rebalance;
mod sync;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::config::GroupConfig;
use super::member::Member;
use super::records::GroupValue;

pub use messages::*;

/// How long a member that was never answered may stay away (Kafka's constant).
const NEW_MEMBER_JOIN_TIMEOUT: Duration = Duration::from_secs(300);
/// A rebalance whose members are all silent is looked at again no sooner than this.
const POSTPONED_REBALANCE_MIN: Duration = Duration::from_secs(1);

/// The first rebalance of a group that was empty waits for a while, and for longer while members
/// keep coming (KIP-134).
#[derive(Debug)]
struct InitialRebalance {
    remaining: Duration,
    new_member_added: bool,
}

/// One classic group. Owned by the coordinator of its partition.
#[derive(Debug)]
pub struct Group<W> {
    config: Arc<GroupConfig>,
    state: GroupState,
    state_changed_wall_ms: i64,
    generation: i32,
    protocol_type: Option<String>,
    protocol_name: Option<String>,
    leader: Option<String>,
    members: BTreeMap<String, Member<W>>,
    /// Member ids by group instance id.
    static_members: HashMap<String, String>,
    /// Ids given out that nobody joined with yet (KIP-394), and when they expire.
    pending_members: BTreeMap<String, Moment>,
    initial_rebalance: Option<InitialRebalance>,
    /// When the join phase ends even if members are missing.
    join_deadline: Option<Moment>,
    /// When members that did not ask for their assignment are removed.
    sync_deadline: Option<Moment>,
    /// Generation and assignments on their way to the log.
    storing: Option<(i32, BTreeMap<String, Bytes>)>,
}

type Out<W> = Vec<Effect<W>>;

impl<W> Group<W> {
    pub fn new(config: Arc<GroupConfig>, wall_ms: i64) -> Group<W> {
        Group {
            config,
            state: GroupState::Empty,
            state_changed_wall_ms: wall_ms,
            generation: 0,
            protocol_type: None,
            protocol_name: None,
            leader: None,
            members: BTreeMap::new(),
            static_members: HashMap::new(),
            pending_members: BTreeMap::new(),
            initial_rebalance: None,
            join_deadline: None,
            sync_deadline: None,
            storing: None,
        }
    }

    /// The group as its record says: stable, or empty. Members live until their session times out.
    pub fn from_value(config: Arc<GroupConfig>, value: GroupValue, now: Moment) -> Group<W> {
        let mut group = Group::new(config, value.current_state_timestamp_ms);
        let protocol = value.protocol.as_deref().unwrap_or_default();
        for member in value.members {
            if let Some(instance) = &member.group_instance_id {
                group
                    .static_members
                    .insert(instance.clone(), member.member_id.clone());
            }
            let id = member.member_id.clone();
            group
                .members
                .insert(id, Member::from_value(member, protocol, now));
        }
        group.generation = value.generation;
        group.protocol_type = Some(value.protocol_type).filter(|name| !name.is_empty());
        if !group.members.is_empty() {
            group.state = GroupState::Stable;
            group.leader = value.leader;
            group.protocol_name = value.protocol;
        }
        group
    }

    pub fn state(&self) -> GroupState {
        self.state
    }

    pub fn generation(&self) -> i32 {
        self.generation
    }

    /// None: no member ever joined; offsets only.
    pub fn protocol_type(&self) -> Option<&str> {
        self.protocol_type.as_deref()
    }

    pub fn protocol_name(&self) -> Option<&str> {
        self.protocol_name.as_deref()
    }

    pub fn state_changed_wall_ms(&self) -> i64 {
        self.state_changed_wall_ms
    }

    pub fn member_count(&self) -> usize {
        self.members.len()
    }

    /// Nobody is in it, and nobody is about to be.
    pub fn is_unused(&self) -> bool {
        self.state == GroupState::Empty && self.pending_members.is_empty()
    }

    /// The members; their subscriptions and assignments only where they are settled.
    pub fn describe(&self) -> Vec<MemberDescription> {
        let stable = self.state == GroupState::Stable;
        let describe = |(id, member): (&String, &Member<W>)| MemberDescription {
            member_id: id.clone(),
            group_instance_id: member.group_instance_id.clone(),
            client_id: member.client_id.clone(),
            client_host: member.client_host.clone(),
            metadata: if stable {
                member.metadata(self.protocol_name())
            } else {
                Bytes::new()
            },
            assignment: if stable {
                member.assignment.clone()
            } else {
                Bytes::new()
            },
        };
        self.members.iter().map(describe).collect()
    }

    /// The record of the group with the given assignments.
    fn to_value(&self, assignment: impl Fn(&str, &Member<W>) -> Bytes) -> GroupValue {
        let protocol = self.protocol_name();
        let members = self.members.iter();
        GroupValue {
            protocol_type: self.protocol_type.clone().unwrap_or_default(),
            generation: self.generation,
            protocol: self.protocol_name.clone(),
            leader: self.leader.clone(),
            current_state_timestamp_ms: self.state_changed_wall_ms,
            members: members
                .map(|(id, m)| m.to_value(id, protocol, assignment(id, m)))
                .collect(),
        }
    }

    pub fn heartbeat(
        &mut self,
        now: Now,
        generation: i32,
        member_id: &str,
        instance: Option<&str>,
    ) -> Result<(), GroupError> {
        self.check_member(member_id, instance)?;
        if generation != self.generation {
            return Err(GroupError::IllegalGeneration);
        }
        match self.state {
            GroupState::Empty => Err(GroupError::UnknownMember),
            GroupState::PreparingRebalance => {
                self.refresh(now, member_id);
                Err(GroupError::RebalanceInProgress)
            }
            GroupState::CompletingRebalance | GroupState::Stable => {
                self.refresh(now, member_id);
                Ok(())
            }
        }
    }

    /// A member leaves, by its id; or by its group instance id alone, as an operator removes it.
    pub fn leave(
        &mut self,
        now: Now,
        member_id: &str,
        instance: Option<&str>,
        out: &mut Out<W>,
    ) -> Result<(), GroupError> {
        if self.pending_members.contains_key(member_id) {
            if instance.is_some() {
                return Err(GroupError::UnknownMember);
            }
            self.pending_members.remove(member_id);
            self.complete_if_all_joined(now, out);
            return Ok(());
        }
        let id = match instance {
            Some(instance) if member_id.is_empty() => self
                .static_members
                .get(instance)
                .cloned()
                .ok_or(GroupError::UnknownMember)?,
            _ => {
                self.check_member(member_id, instance)?;
                member_id.to_owned()
            }
        };
        self.remove_and_rebalance(now, &id, out);
        Ok(())
    }

    /// Whether a commit under that membership is taken.
    pub fn check_commit(
        &mut self,
        now: Now,
        generation: i32,
        member_id: &str,
        instance: Option<&str>,
    ) -> Result<(), GroupError> {
        let from_outside = generation < 0 && member_id.is_empty() && instance.is_none();
        if generation < 0 && self.state == GroupState::Empty {
            return Ok(());
        }
        if from_outside {
            return Err(GroupError::UnknownMember);
        }
        self.check_member(member_id, instance)?;
        if generation != self.generation {
            return Err(GroupError::IllegalGeneration);
        }
        if self.state == GroupState::CompletingRebalance {
            return Err(GroupError::RebalanceInProgress);
        }
        self.refresh(now, member_id);
        Ok(())
    }
}
