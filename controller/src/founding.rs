//! As whom a controller takes part in the Raft group: whether one with an empty disk founds the
//! group, or comes into one that exists. Pure; `joining` asks the peers and does what is decided.
//!
//! Invariant: a node id stands for one disk. An empty disk takes part under the id of a founder only
//! if it is one of the very disks that the group was founded with, so that no vote or entry that was
//! ever counted under that id can have been lost with another disk. All else are new members.
//! docs/decisions/0014 has the argument.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

const CONTROLLER_ID_BITS: u32 = 16;
/// Largest `controller-id`.
pub const CONTROLLER_ID_MAX: u64 = (1 << CONTROLLER_ID_BITS) - 1;
/// Incarnations are below this, so that a node id fits a signed 64-bit number.
pub const INCARNATION_END: u64 = 1 << 47;

/// A member of the controllers' Raft group: one stay of one controller on one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(u64);

impl NodeId {
    /// `None`: one of the two is out of range.
    pub fn new(controller_id: u64, incarnation: u64) -> Option<Self> {
        let fits = controller_id <= CONTROLLER_ID_MAX && incarnation < INCARNATION_END;
        fits.then_some(Self(incarnation << CONTROLLER_ID_BITS | controller_id))
    }

    /// A founder of the group. The configuration has checked the id.
    pub fn founder(controller_id: u64) -> Self {
        Self(controller_id & CONTROLLER_ID_MAX)
    }

    /// As Raft knows it.
    pub fn of_raft(number: u64) -> Self {
        Self(number)
    }

    pub fn to_raft(self) -> u64 {
        self.0
    }

    pub fn controller_id(self) -> u64 {
        self.0 & CONTROLLER_ID_MAX
    }

    /// 0: the group was founded with it.
    pub fn incarnation(self) -> u64 {
        self.0 >> CONTROLLER_ID_BITS
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.incarnation() {
            0 => write!(f, "{}", self.controller_id()),
            incarnation => write!(f, "{}/{incarnation:x}", self.controller_id()),
        }
    }
}

/// A controller and the disk it was founded on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Founder {
    pub controller_id: u64,
    pub disk_id: Uuid,
}

/// What a controller's disk says of who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Made with the database.
    pub disk_id: Uuid,
    /// As whom it takes part; none: it does not, and never has.
    pub node_id: Option<NodeId>,
    /// The disks that the group was founded with, as far as it was told.
    pub founders: Vec<Founder>,
}

impl Identity {
    pub fn of_new_disk(disk_id: Uuid) -> Self {
        Self {
            disk_id,
            node_id: None,
            founders: Vec::new(),
        }
    }
}

/// What a controller tells of itself to one that asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub identity: Identity,
    /// What it would found a group on: the restored backup it holds; empty: nothing.
    pub base: String,
    /// Ids of the controllers in its configuration.
    pub group: BTreeSet<u64>,
}

/// What a controller that does not take part yet is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Take part as a founder.
    Found(Vec<Founder>),
    /// Take part as a new member, and ask to be let in for the one that was there before.
    Replace(Vec<Founder>),
    Wait(Obstacle),
}

/// Why nothing can be decided yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// Peers that have not answered.
    Missing(Vec<u64>),
    /// Answers that do not go together: a person has to look.
    Conflict(String),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(missing) => {
                let ids: Vec<String> = missing.iter().map(u64::to_string).collect();
                write!(f, "no answer yet from controllers {}", ids.join(", "))
            }
            Self::Conflict(why) => f.write_str(why),
        }
    }
}

/// Decides from what the peers told. `own` does not take part yet.
pub fn decide(own_id: u64, own: &Standing, answers: &BTreeMap<u64, Standing>) -> Decision {
    for (peer, answer) in answers {
        if answer.group != own.group {
            return conflict(format!(
                "controller {peer} has controllers {:?} in its configuration, this one has {:?}",
                answer.group, own.group
            ));
        }
    }
    let us = Founder {
        controller_id: own_id,
        disk_id: own.identity.disk_id,
    };
    let mut members = answers
        .iter()
        .filter(|(_, answer)| answer.identity.node_id.is_some());
    let is_ours = |member: &Standing| member.identity.founders.contains(&us);
    if let Some((peer, member)) = members.clone().find(|(_, member)| !is_ours(member)) {
        if !own.base.is_empty() {
            return conflict(format!(
                "this controller holds a restored backup, and controller {peer} belongs to a group \
                 already: restore all controllers while all are stopped, or give this one an empty \
                 data folder"
            ));
        }
        return Decision::Replace(member.identity.founders.clone());
    }
    let peers = own.group.iter().filter(|id| **id != own_id);
    let missing: Vec<u64> = peers
        .filter(|id| !answers.contains_key(id))
        .copied()
        .collect();
    // One that is missing may know of a group that this disk is not of.
    if let Some((_, member)) = members.next() {
        return match missing.is_empty() {
            true => Decision::Found(member.identity.founders.clone()),
            false => Decision::Wait(Obstacle::Missing(missing)),
        };
    }
    if let Some((peer, other)) = answers.iter().find(|(_, a)| a.base != own.base) {
        let name = |base: &str| match base {
            "" => "nothing".to_owned(),
            base => format!("backup {base}"),
        };
        return conflict(format!(
            "this controller was restored from {}, controller {peer} from {}: all have to be \
             restored from the same file",
            name(&own.base),
            name(&other.base)
        ));
    }
    if !missing.is_empty() {
        return Decision::Wait(Obstacle::Missing(missing));
    }
    let mut founders: Vec<Founder> = answers
        .iter()
        .map(|(controller_id, answer)| Founder {
            controller_id: *controller_id,
            disk_id: answer.identity.disk_id,
        })
        .collect();
    founders.push(us);
    founders.sort_unstable();
    Decision::Found(founders)
}

fn conflict(why: String) -> Decision {
    Decision::Wait(Obstacle::Conflict(why))
}

#[cfg(test)]
#[path = "founding_test.rs"]
mod tests;
