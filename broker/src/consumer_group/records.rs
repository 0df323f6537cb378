//! The records of `__consumer_offsets`, in Apache Kafka's formats: `OffsetCommitKey` (versions 0
//! and 1), `OffsetCommitValue` (0 to 4), `GroupMetadataKey` (2), `GroupMetadataValue` (0 to 3; 4
//! is read too). Kafka's own tools can read what is written here.
//!
//! Invariant: parsing any bytes ends in a value or an error, and allocates no more than a small
//! multiple of the bytes that are there.

#[cfg(test)]
mod records_test;

use bytes::{BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::batch::Record;
use super::fields::{
    for_each_tag, get_bytes, get_i16, get_i32, get_i64, get_string, get_versioned_length,
    get_versioned_string, put_length, put_nullable_string, put_string, put_uvarint,
};

/// Longest string of a format whose lengths have 16 bits.
pub const STRING_MAX_BYTES: usize = i16::MAX as usize;

/// What a record is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    Offset {
        group: String,
        topic: String,
        partition: i32,
    },
    Group {
        group: String,
    },
    /// A key of a later format, such as the ones of KIP-848.
    Unknown {
        version: i16,
    },
}

/// One committed offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffsetValue {
    pub offset: i64,
    /// -1: not known.
    pub leader_epoch: i32,
    pub metadata: String,
    pub commit_timestamp_ms: i64,
    /// Only where the client chose its own retention (OffsetCommit up to v4).
    pub expire_timestamp_ms: Option<i64>,
    /// Nil where the client committed by name.
    pub topic_id: Uuid,
}

/// A member as it is kept in the group's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberValue {
    pub member_id: String,
    pub group_instance_id: Option<String>,
    pub client_id: String,
    pub client_host: String,
    pub rebalance_timeout_ms: i32,
    pub session_timeout_ms: i32,
    pub subscription: Bytes,
    pub assignment: Bytes,
}

/// A group after a rebalance, or an empty one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupValue {
    pub protocol_type: String,
    pub generation: i32,
    pub protocol: Option<String>,
    pub leader: Option<String>,
    /// -1: not known.
    pub current_state_timestamp_ms: i64,
    pub members: Vec<MemberValue>,
}

/// Why a record cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnreadableRecord {
    #[error("{0} is malformed")]
    Malformed(&'static str),
    #[error("{what} has version {version}, which is not known")]
    UnknownVersion { what: &'static str, version: i16 },
}

/// Key of a committed offset. All strings are at most `STRING_MAX_BYTES` long.
pub fn offset_key(group: &str, topic: &str, partition: i32) -> Bytes {
    let mut out = BytesMut::with_capacity(10 + group.len() + topic.len());
    out.put_i16(1);
    put_string(&mut out, group);
    put_string(&mut out, topic);
    out.put_i32(partition);
    out.freeze()
}

/// Key of a group.
pub fn group_key(group: &str) -> Bytes {
    let mut out = BytesMut::with_capacity(4 + group.len());
    out.put_i16(2);
    put_string(&mut out, group);
    out.freeze()
}

impl Key {
    pub fn parse(mut bytes: &[u8]) -> Result<Key, UnreadableRecord> {
        let bytes = &mut bytes;
        let malformed = UnreadableRecord::Malformed("record key");
        let mut parse = || {
            Some(match get_i16(bytes)? {
                0 | 1 => Key::Offset {
                    group: get_string(bytes)?,
                    topic: get_string(bytes)?,
                    partition: get_i32(bytes)?,
                },
                2 => Key::Group {
                    group: get_string(bytes)?,
                },
                version => Key::Unknown { version },
            })
        };
        parse().ok_or(malformed)
    }
}

impl OffsetValue {
    /// Version 3; 1 where it expires at its own time; 4 where it has a topic id: as Kafka chooses.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64 + self.metadata.len());
        match self.expire_timestamp_ms {
            Some(expire_timestamp_ms) => {
                out.put_i16(1);
                out.put_i64(self.offset);
                put_string(&mut out, &self.metadata);
                out.put_i64(self.commit_timestamp_ms);
                out.put_i64(expire_timestamp_ms);
            }
            None if self.topic_id.is_nil() => {
                out.put_i16(3);
                out.put_i64(self.offset);
                out.put_i32(self.leader_epoch);
                put_string(&mut out, &self.metadata);
                out.put_i64(self.commit_timestamp_ms);
            }
            None => {
                out.put_i16(4);
                out.put_i64(self.offset);
                out.put_i32(self.leader_epoch);
                put_uvarint(&mut out, self.metadata.len() as u64 + 1);
                out.extend_from_slice(self.metadata.as_bytes());
                out.put_i64(self.commit_timestamp_ms);
                out.put_u8(1); // tagged fields
                out.put_u8(0); // tag of the topic id
                out.put_u8(16);
                out.extend_from_slice(self.topic_id.as_bytes());
            }
        }
        out.freeze()
    }

    pub fn parse(bytes: &Bytes) -> Result<OffsetValue, UnreadableRecord> {
        const WHAT: &str = "committed offset";
        let mut bytes = bytes.clone();
        let bytes = &mut bytes;
        let version = get_i16(bytes).ok_or(UnreadableRecord::Malformed(WHAT))?;
        if !(0..=4).contains(&version) {
            return Err(UnreadableRecord::UnknownVersion {
                what: WHAT,
                version,
            });
        }
        let mut parse = || {
            let offset = get_i64(bytes)?;
            let leader_epoch = if version >= 3 { get_i32(bytes)? } else { -1 };
            let metadata = get_versioned_string(bytes, version >= 4)??;
            let commit_timestamp_ms = get_i64(bytes)?;
            let expire = if version == 1 { get_i64(bytes)? } else { -1 };
            let mut topic_id = Uuid::nil();
            if version >= 4 {
                for_each_tag(bytes, |tag, value| {
                    if let (0, Ok(id)) = (tag, Uuid::from_slice(value)) {
                        topic_id = id;
                    }
                })?;
            }
            Some(OffsetValue {
                offset,
                leader_epoch,
                metadata,
                commit_timestamp_ms,
                expire_timestamp_ms: (expire >= 0).then_some(expire),
                topic_id,
            })
        };
        parse().ok_or(UnreadableRecord::Malformed(WHAT))
    }
}

impl GroupValue {
    /// Version 3. The caller has bounded the strings and the number of members.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.size_bytes_max());
        out.put_i16(3);
        put_string(&mut out, &self.protocol_type);
        out.put_i32(self.generation);
        put_nullable_string(&mut out, self.protocol.as_deref());
        put_nullable_string(&mut out, self.leader.as_deref());
        out.put_i64(self.current_state_timestamp_ms);
        put_length(&mut out, self.members.len());
        for member in &self.members {
            put_string(&mut out, &member.member_id);
            put_nullable_string(&mut out, member.group_instance_id.as_deref());
            put_string(&mut out, &member.client_id);
            put_string(&mut out, &member.client_host);
            out.put_i32(member.rebalance_timeout_ms);
            out.put_i32(member.session_timeout_ms);
            for bytes in [&member.subscription, &member.assignment] {
                put_length(&mut out, bytes.len());
                out.extend_from_slice(bytes);
            }
        }
        out.freeze()
    }

    /// Upper bound of the encoded bytes.
    pub fn size_bytes_max(&self) -> usize {
        let optional = |s: &Option<String>| s.as_ref().map_or(0, String::len);
        let members: usize = self.members.iter().map(MemberValue::size_bytes_max).sum();
        32 + self.protocol_type.len() + optional(&self.protocol) + optional(&self.leader) + members
    }

    pub fn parse(bytes: &Bytes) -> Result<GroupValue, UnreadableRecord> {
        const WHAT: &str = "group metadata";
        let mut bytes = bytes.clone();
        let bytes = &mut bytes;
        let version = get_i16(bytes).ok_or(UnreadableRecord::Malformed(WHAT))?;
        if !(0..=4).contains(&version) {
            return Err(UnreadableRecord::UnknownVersion {
                what: WHAT,
                version,
            });
        }
        parse_group(bytes, version).ok_or(UnreadableRecord::Malformed(WHAT))
    }
}

impl MemberValue {
    fn size_bytes_max(&self) -> usize {
        let strings = self.member_id.len() + self.client_id.len() + self.client_host.len();
        let instance = self.group_instance_id.as_ref().map_or(0, String::len);
        32 + strings + instance + self.subscription.len() + self.assignment.len()
    }
}

fn parse_group(bytes: &mut Bytes, version: i16) -> Option<GroupValue> {
    let flexible = version >= 4;
    let protocol_type = get_versioned_string(bytes, flexible)??;
    let generation = get_i32(bytes)?;
    let protocol = get_versioned_string(bytes, flexible)?;
    let leader = get_versioned_string(bytes, flexible)?;
    let current_state_timestamp_ms = if version >= 2 { get_i64(bytes)? } else { -1 };
    let count = get_versioned_length(bytes, flexible)??;
    let mut members = Vec::new();
    for _ in 0..count {
        members.push(parse_member(bytes, version)?);
    }
    if flexible {
        for_each_tag(bytes, |_, _| {})?;
    }
    Some(GroupValue {
        protocol_type,
        generation,
        protocol,
        leader,
        current_state_timestamp_ms,
        members,
    })
}

fn parse_member(bytes: &mut Bytes, version: i16) -> Option<MemberValue> {
    let flexible = version >= 4;
    let member_id = get_versioned_string(bytes, flexible)??;
    let group_instance_id = if version >= 3 {
        get_versioned_string(bytes, flexible)?
    } else {
        None
    };
    let client_id = get_versioned_string(bytes, flexible)??;
    let client_host = get_versioned_string(bytes, flexible)??;
    let rebalance_timeout_ms = if version >= 1 {
        Some(get_i32(bytes)?)
    } else {
        None
    };
    let session_timeout_ms = get_i32(bytes)?;
    let subscription = get_bytes(bytes, flexible)?;
    let assignment = get_bytes(bytes, flexible)?;
    if flexible {
        for_each_tag(bytes, |_, _| {})?;
    }
    Some(MemberValue {
        member_id,
        group_instance_id,
        client_id,
        client_host,
        // Version 0 had one timeout for both.
        rebalance_timeout_ms: rebalance_timeout_ms.unwrap_or(session_timeout_ms),
        session_timeout_ms,
        subscription,
        assignment,
    })
}

/// A whole record of a committed offset; `None` removes it.
pub fn offset_record(
    group: &str,
    topic: &str,
    partition: i32,
    value: Option<&OffsetValue>,
) -> Record {
    Record {
        key: offset_key(group, topic, partition),
        value: value.map(OffsetValue::encode),
    }
}

/// A whole record of a group; `None` removes it.
pub fn group_record(group: &str, value: Option<&GroupValue>) -> Record {
    Record {
        key: group_key(group),
        value: value.map(GroupValue::encode),
    }
}
