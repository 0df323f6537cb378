//! What this broker knows of the way to each of its peers.

use std::collections::{BTreeMap, BTreeSet};

use chronik_types::id::BrokerId;
use uuid::Uuid;

/// The state of the link to one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// No attempt has succeeded or failed yet.
    Connecting,
    Up,
    /// We reach the peer, but it says that it does not reach us, or cannot write what it hears.
    OneWay,
    /// Connected, but nothing was heard for a while: the peer may be stopped or cut off.
    Silent,
    /// Attempts to connect fail in a way that says nothing about the peer's process.
    Unreachable,
    /// The peer's machine answered that nobody listens: the process is dead.
    Refused,
}

/// The state of a link, and which process of the peer it last reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkStatus {
    pub state: LinkState,
    /// Another incarnation than before means that the peer was restarted.
    pub incarnation: Option<Uuid>,
    /// The process of the peer whose own stream reaches this broker now.
    pub inbound: Option<Uuid>,
}

impl LinkStatus {
    pub const UNKNOWN: LinkStatus = LinkStatus {
        state: LinkState::Connecting,
        incarnation: None,
        inbound: None,
    };

    /// The process of the peer, if that reaches this broker: by its answers, or by a stream of its own
    /// where ours is not answered.
    pub fn speaks_as(&self) -> Option<Uuid> {
        match self.state {
            LinkState::Up => self.incarnation,
            LinkState::Connecting | LinkState::Silent | LinkState::Unreachable => self.inbound,
            LinkState::OneWay | LinkState::Refused => None,
        }
    }

    /// The way is open in both directions.
    pub fn is_up(&self) -> bool {
        self.state == LinkState::Up
    }

    /// What is sent to the peer is answered.
    pub fn is_answered(&self) -> bool {
        matches!(self.state, LinkState::Up | LinkState::OneWay)
    }
}

/// The states of all links, published whole on every change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkTable(pub BTreeMap<BrokerId, LinkStatus>);

impl LinkTable {
    pub fn status(&self, broker: BrokerId) -> LinkStatus {
        self.0.get(&broker).copied().unwrap_or(LinkStatus::UNKNOWN)
    }

    /// Brokers that cannot be reached now.
    pub fn away(&self) -> BTreeSet<BrokerId> {
        let links = self.0.iter();
        let away = links.filter(|(_, status)| !status.is_up());
        away.map(|(broker, _)| *broker).collect()
    }
}
