//! One member of a classic consumer group, and the vote of members for a protocol.
//!
//! Invariant: a member waits for at most one answer of each kind; a second call replaces the first.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;

use super::records::MemberValue;
use super::state::{Join, Moment};

/// Lengths and numbers of a member in the group's record.
const MEMBER_OVERHEAD_BYTES: usize = 32;

/// Owned by its group. `W` is whoever waits for an answer.
#[derive(Debug)]
pub(super) struct Member<W> {
    pub group_instance_id: Option<String>,
    pub client_id: String,
    pub client_host: String,
    pub session_timeout: Duration,
    pub rebalance_timeout: Duration,
    /// The member's assignors with its subscription for each, the one it likes best first.
    pub protocols: Vec<(String, Bytes)>,
    pub assignment: Bytes,
    /// When the member is taken for dead; none while it waits for an answer of ours.
    pub deadline: Option<Moment>,
    /// Never answered yet: it does not know its id, so it cannot send heartbeats.
    pub is_new: bool,
    /// Has not asked for its assignment in this generation yet.
    pub sync_pending: bool,
    pub awaiting_join: Option<W>,
    pub awaiting_sync: Option<W>,
}

impl<W> Member<W> {
    pub fn is_static(&self) -> bool {
        self.group_instance_id.is_some()
    }

    pub fn is_awaiting(&self) -> bool {
        self.awaiting_join.is_some() || self.awaiting_sync.is_some()
    }

    pub fn supports(&self, protocol: &str) -> bool {
        self.protocols.iter().any(|(name, _)| name == protocol)
    }

    /// The subscription for `protocol`; empty where the member does not have it.
    pub fn metadata(&self, protocol: Option<&str>) -> Bytes {
        let found = self
            .protocols
            .iter()
            .find(|(name, _)| Some(name.as_str()) == protocol);
        found
            .map(|(_, metadata)| metadata.clone())
            .unwrap_or_default()
    }

    /// Roughly what the member adds to the group's record, without its id and assignment.
    pub fn size_bytes(&self) -> usize {
        let instance = self.group_instance_id.as_ref().map_or(0, String::len);
        let strings = instance + self.client_id.len() + self.client_host.len();
        MEMBER_OVERHEAD_BYTES + strings + protocols_size_bytes(&self.protocols)
    }

    /// The member as it is written into the group's record.
    pub fn to_value(&self, id: &str, protocol: Option<&str>, assignment: Bytes) -> MemberValue {
        let millis = |d: Duration| i32::try_from(d.as_millis()).unwrap_or(i32::MAX);
        MemberValue {
            member_id: id.to_owned(),
            group_instance_id: self.group_instance_id.clone(),
            client_id: self.client_id.clone(),
            client_host: self.client_host.clone(),
            rebalance_timeout_ms: millis(self.rebalance_timeout),
            session_timeout_ms: millis(self.session_timeout),
            subscription: self.metadata(protocol),
            assignment,
        }
    }

    /// A member as the log has it, alive until its session times out from now on.
    pub fn from_value(value: MemberValue, protocol: &str, now: Moment) -> Member<W> {
        let millis = |ms: i32| Duration::from_millis(u64::try_from(ms).unwrap_or(0));
        let session_timeout = millis(value.session_timeout_ms);
        Member {
            group_instance_id: value.group_instance_id,
            client_id: value.client_id,
            client_host: value.client_host,
            session_timeout,
            rebalance_timeout: millis(value.rebalance_timeout_ms),
            protocols: vec![(protocol.to_owned(), value.subscription)],
            assignment: value.assignment,
            deadline: Some(now + session_timeout),
            is_new: false,
            sync_pending: false,
            awaiting_join: None,
            awaiting_sync: None,
        }
    }
}

impl Join {
    /// Roughly what the member adds to the group's record.
    pub(super) fn size_bytes(&self) -> usize {
        let instance = self.group_instance_id.as_ref().map_or(0, String::len);
        let id = self.member_id.len().max(self.new_member_id.len());
        let strings = id + instance + self.client_id.len() + self.client_host.len();
        MEMBER_OVERHEAD_BYTES + strings + protocols_size_bytes(&self.protocols)
    }
}

fn protocols_size_bytes(protocols: &[(String, Bytes)]) -> usize {
    protocols
        .iter()
        .map(|(name, metadata)| name.len() + metadata.len())
        .sum()
}

/// The protocol that all members support and most of them like best. Equal votes: the first in
/// the list of `tie_breaker`, so that every coordinator would choose alike.
pub(super) fn elect_protocol<W>(
    members: &BTreeMap<String, Member<W>>,
    tie_breaker: Option<&str>,
) -> Option<String> {
    let judge = tie_breaker
        .and_then(|id| members.get(id))
        .or_else(|| members.values().next())?;
    let candidates: Vec<&str> = judge
        .protocols
        .iter()
        .map(|(name, _)| name.as_str())
        .filter(|name| members.values().all(|member| member.supports(name)))
        .collect();
    let mut votes = vec![0usize; candidates.len()];
    for member in members.values() {
        let vote = member
            .protocols
            .iter()
            .find_map(|(name, _)| candidates.iter().position(|candidate| candidate == name));
        if let Some(votes) = vote.and_then(|at| votes.get_mut(at)) {
            *votes += 1;
        }
    }
    let most = votes.iter().copied().max()?;
    let winner = votes.iter().position(|count| *count == most)?;
    candidates.get(winner).map(|name| (*name).to_owned())
}
