//! Byte forms of what Raft keeps beside the record batches: vote, membership, and the replica's
//! state. All are ours, so that a change of openraft's types never changes what is on disk.
//!
//! Invariant: decoding any bytes gives a value or an error, never a panic; encoding then decoding
//! gives the same value. Integers are big endian; the first byte of each form is its version.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use chronik_types::id::{BrokerId, ReplicaId};
use chronik_types::offset::Offset;
use openraft::vote::RaftLeaderId;

use super::raft_config::{CommittedLeaderId, Control, LeaderId, LogId, Membership, Vote};

const VERSION: u8 = 1;
/// A group has few configs (two while its membership changes) and few members.
const CONFIGS_MAX: usize = 8;
const MEMBERS_MAX: usize = 1024;

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("{what} ends early")]
    Truncated { what: &'static str },
    #[error("{what} has version {version}")]
    UnknownVersion { what: &'static str, version: u8 },
    #[error("{what} has {count} items")]
    TooMany { what: &'static str, count: usize },
    #[error("{what} is not valid")]
    Invalid { what: &'static str },
}

/// Reads fixed-size values with a check of the length.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Starts after the version byte, which must be ours.
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Result<Self, DecodeError> {
        Ok(Self::with_version(what, bytes, VERSION..=VERSION)?.0)
    }

    /// Starts after the version byte, which must be one of `known`.
    pub(super) fn with_version(
        what: &'static str,
        bytes: &'a [u8],
        known: RangeInclusive<u8>,
    ) -> Result<(Self, u8), DecodeError> {
        let mut reader = Reader { bytes, what };
        let version = reader.u8()?;
        if known.contains(&version) {
            Ok((reader, version))
        } else {
            Err(DecodeError::UnknownVersion { what, version })
        }
    }

    fn need(&self, size: usize) -> Result<(), DecodeError> {
        if self.bytes.len() < size {
            return Err(DecodeError::Truncated { what: self.what });
        }
        Ok(())
    }

    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.need(1)?;
        Ok(self.bytes.get_u8())
    }

    pub(super) fn i16(&mut self) -> Result<i16, DecodeError> {
        self.need(2)?;
        Ok(self.bytes.get_i16())
    }

    pub(super) fn i32(&mut self) -> Result<i32, DecodeError> {
        self.need(4)?;
        Ok(self.bytes.get_i32())
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.need(8)?;
        Ok(self.bytes.get_u64())
    }

    pub(super) fn i64(&mut self) -> Result<i64, DecodeError> {
        self.need(8)?;
        Ok(self.bytes.get_i64())
    }

    /// A count of items, at most `max`.
    pub(super) fn count(&mut self, max: usize) -> Result<usize, DecodeError> {
        self.need(4)?;
        let count = self.bytes.get_u32() as usize;
        if count > max {
            return Err(DecodeError::TooMany {
                what: self.what,
                count,
            });
        }
        Ok(count)
    }

    pub(super) fn bytes(&mut self, size: usize) -> Result<&'a [u8], DecodeError> {
        self.need(size)?;
        let (taken, rest) = self.bytes.split_at(size);
        self.bytes = rest;
        Ok(taken)
    }

    pub(super) fn invalid(&self) -> DecodeError {
        DecodeError::Invalid { what: self.what }
    }

    /// Checks that nothing is left.
    pub(super) fn end(self) -> Result<(), DecodeError> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(self.invalid())
        }
    }

    fn replica_id(&mut self) -> Result<ReplicaId, DecodeError> {
        Ok(ReplicaId {
            broker_id: BrokerId(self.i32()?),
            incarnation: self.u64()?,
        })
    }
}

/// A length as the forms write it; all lengths here are bounded far below 4 GiB.
pub(super) fn put_count(out: &mut impl BufMut, count: usize) {
    out.put_u32(u32::try_from(count).unwrap_or(u32::MAX));
}

pub(super) fn put_version(out: &mut impl BufMut) {
    out.put_u8(VERSION);
}

fn put_replica_id(out: &mut impl BufMut, id: ReplicaId) {
    out.put_i32(id.broker_id.0);
    out.put_u64(id.incarnation);
}

/// The log id of `index` in `term`.
pub fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId { term }, index)
}

/// The term of a log id.
pub fn term(log_id: &LogId) -> u64 {
    log_id.leader_id.term
}

pub fn encode_vote(vote: &Vote) -> Bytes {
    let mut out = BytesMut::with_capacity(22);
    put_version(&mut out);
    out.put_u64(vote.leader_id.term);
    put_replica_id(&mut out, *vote.leader_id.node_id());
    out.put_u8(u8::from(vote.committed));
    out.freeze()
}

pub fn decode_vote(bytes: &[u8]) -> Result<Vote, DecodeError> {
    let mut reader = Reader::new("vote", bytes)?;
    let leader_id = LeaderId::new(reader.u64()?, reader.replica_id()?);
    let committed = match reader.u8()? {
        0 => false,
        1 => true,
        _ => return Err(reader.invalid()),
    };
    reader.end()?;
    Ok(Vote {
        leader_id,
        committed,
    })
}

pub fn encode_membership(membership: &Membership) -> Bytes {
    let mut out = BytesMut::new();
    put_version(&mut out);
    put_count(&mut out, membership.get_joint_config().len());
    for config in membership.get_joint_config() {
        put_count(&mut out, config.len());
        for id in config {
            put_replica_id(&mut out, *id);
        }
    }
    put_count(&mut out, membership.nodes().count());
    for (id, ()) in membership.nodes() {
        put_replica_id(&mut out, *id);
    }
    out.freeze()
}

pub fn decode_membership(bytes: &[u8]) -> Result<Membership, DecodeError> {
    let mut reader = Reader::new("membership", bytes)?;
    let mut configs = Vec::new();
    for _ in 0..reader.count(CONFIGS_MAX)? {
        let mut config = BTreeSet::new();
        for _ in 0..reader.count(MEMBERS_MAX)? {
            config.insert(reader.replica_id()?);
        }
        configs.push(config);
    }
    let mut nodes = BTreeSet::new();
    for _ in 0..reader.count(MEMBERS_MAX)? {
        nodes.insert(reader.replica_id()?);
    }
    // Every voter is a node; openraft refuses a membership where that does not hold.
    if configs.iter().flatten().any(|voter| !nodes.contains(voter)) {
        return Err(reader.invalid());
    }
    reader.end()?;
    Ok(Membership::new_with_defaults(configs, nodes))
}

const CONTROL_LOG_START: u8 = 1;

pub fn encode_control(control: Control) -> Bytes {
    let mut out = BytesMut::with_capacity(10);
    put_version(&mut out);
    match control {
        Control::LogStart(offset) => {
            out.put_u8(CONTROL_LOG_START);
            out.put_i64(offset.0);
        }
    }
    out.freeze()
}

pub fn decode_control(bytes: &[u8]) -> Result<Control, DecodeError> {
    let mut reader = Reader::new("control entry", bytes)?;
    let control = match reader.u8()? {
        CONTROL_LOG_START => {
            let offset = Offset(reader.i64()?);
            if offset < Offset::ZERO {
                return Err(reader.invalid());
            }
            Control::LogStart(offset)
        }
        _ => return Err(reader.invalid()),
    };
    reader.end()?;
    Ok(control)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replica(broker: i32, incarnation: u64) -> ReplicaId {
        ReplicaId {
            broker_id: BrokerId(broker),
            incarnation,
        }
    }

    #[test]
    fn votes_round_trip() {
        for committed in [false, true] {
            let vote = Vote {
                leader_id: LeaderId::new(7, replica(3, 99)),
                committed,
            };
            assert_eq!(decode_vote(&encode_vote(&vote)), Ok(vote));
        }
    }

    #[test]
    fn memberships_round_trip() {
        let a = BTreeSet::from([replica(1, 1), replica(2, 1), replica(3, 5)]);
        let b = BTreeSet::from([replica(1, 1), replica(4, 8)]);
        for configs in [vec![], vec![a.clone()], vec![a, b]] {
            let learner = BTreeSet::from([replica(9, 9)]);
            let membership = Membership::new_with_defaults(configs, learner);
            assert_eq!(
                decode_membership(&encode_membership(&membership)),
                Ok(membership)
            );
        }
    }

    #[test]
    fn controls_round_trip() {
        let control = Control::LogStart(Offset(77));
        assert_eq!(decode_control(&encode_control(control)), Ok(control));
        let negative = encode_control(Control::LogStart(Offset(-1)));
        assert!(decode_control(&negative).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode_vote(&bytes);
            let _ = decode_membership(&bytes);
            let _ = decode_control(&bytes);
            let versioned = [&[VERSION], &bytes[..]].concat();
            let _ = decode_vote(&versioned);
            let _ = decode_membership(&versioned);
            let _ = decode_control(&versioned);
        }
    }
}
