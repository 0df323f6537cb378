//! The records of `__consumer_offsets`, in Apache Kafka's formats: `OffsetCommitKey` (versions 0
//! and 1), `OffsetCommitValue` (0 to 4), `GroupMetadataKey` (2), `GroupMetadataValue` (0 to 3; 4
//! is read too). Kafka's own tools can read what is written here.
//!
//! Invariant: parsing any bytes ends in a value or an error, and allocates no more than a small
//! multiple of the bytes that are there.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::batch::Record;

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

fn put_string(out: &mut BytesMut, string: &str) {
    put_nullable_string(out, Some(string));
}

fn put_nullable_string(out: &mut BytesMut, string: Option<&str>) {
    match string {
        Some(string) => {
            let length =
                i16::try_from(string.len()).expect("requests with longer strings are refused");
            out.put_i16(length);
            out.extend_from_slice(string.as_bytes());
        }
        None => out.put_i16(-1),
    }
}

fn put_length(out: &mut BytesMut, length: usize) {
    out.put_i32(i32::try_from(length).expect("the size of a group is bounded far below 2 GiB"));
}

/// Unsigned LEB128, as Kafka's variable-length numbers are made of.
pub(super) fn put_uvarint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

pub(super) fn get_uvarint(bytes: &mut impl Buf) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = bytes.try_get_u8().ok()?;
        // The tenth byte has room for one bit only.
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn get_i16(bytes: &mut impl Buf) -> Option<i16> {
    bytes.try_get_i16().ok()
}

fn get_i32(bytes: &mut impl Buf) -> Option<i32> {
    bytes.try_get_i32().ok()
}

fn get_i64(bytes: &mut impl Buf) -> Option<i64> {
    bytes.try_get_i64().ok()
}

fn get_string(bytes: &mut impl Buf) -> Option<String> {
    let length = usize::try_from(get_i16(bytes)?).ok()?;
    get_utf8(bytes, length)
}

fn get_utf8(bytes: &mut impl Buf, length: usize) -> Option<String> {
    if length > bytes.remaining() {
        return None;
    }
    String::from_utf8(bytes.copy_to_bytes(length).into()).ok()
}

/// A string of either encoding; the inner `None` is null.
fn get_versioned_string(bytes: &mut Bytes, flexible: bool) -> Option<Option<String>> {
    let length = if flexible {
        i64::try_from(get_uvarint(bytes)?).ok()?.checked_sub(1)?
    } else {
        i64::from(get_i16(bytes)?)
    };
    match length {
        -1 => Some(None),
        length => get_utf8(bytes, usize::try_from(length).ok()?).map(Some),
    }
}

/// A count of items or bytes of either encoding; the inner `None` is null.
fn get_versioned_length(bytes: &mut Bytes, flexible: bool) -> Option<Option<usize>> {
    let length = if flexible {
        i64::try_from(get_uvarint(bytes)?).ok()?.checked_sub(1)?
    } else {
        i64::from(get_i32(bytes)?)
    };
    match length {
        -1 => Some(None),
        length => usize::try_from(length).ok().map(Some),
    }
}

fn get_bytes(bytes: &mut Bytes, flexible: bool) -> Option<Bytes> {
    let length = get_versioned_length(bytes, flexible)??;
    (length <= bytes.len()).then(|| bytes.split_to(length))
}

fn for_each_tag(bytes: &mut Bytes, mut each: impl FnMut(u64, &[u8])) -> Option<()> {
    for _ in 0..get_uvarint(bytes)? {
        let tag = get_uvarint(bytes)?;
        let length = usize::try_from(get_uvarint(bytes)?).ok()?;
        if length > bytes.len() {
            return None;
        }
        each(tag, &bytes.split_to(length));
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offset_value() -> impl Strategy<Value = OffsetValue> {
        (
            any::<i64>(),
            -1i32..,
            ".{0,20}",
            any::<i64>(),
            any::<bool>(),
            any::<u128>(),
        )
            .prop_map(
                |(offset, leader_epoch, metadata, commit_timestamp_ms, expires, id)| OffsetValue {
                    offset,
                    // Version 1 has no leader epoch and no topic id.
                    leader_epoch: if expires { -1 } else { leader_epoch },
                    metadata,
                    commit_timestamp_ms,
                    expire_timestamp_ms: expires.then_some(77),
                    topic_id: if expires || id % 3 == 0 {
                        Uuid::nil()
                    } else {
                        Uuid::from_u128(id)
                    },
                },
            )
    }

    fn member_value() -> impl Strategy<Value = MemberValue> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..50).prop_map(Bytes::from);
        let instance = proptest::option::of("[a-z]{0,8}");
        (
            ".{0,12}",
            instance,
            ".{0,12}",
            any::<i32>(),
            any::<i32>(),
            bytes(),
            bytes(),
        )
            .prop_map(
                |(id, instance, client, rebalance, session, subscription, assignment)| {
                    MemberValue {
                        member_id: id,
                        group_instance_id: instance,
                        client_host: format!("/{client}"),
                        client_id: client,
                        rebalance_timeout_ms: rebalance,
                        session_timeout_ms: session,
                        subscription,
                        assignment,
                    }
                },
            )
    }

    fn group_value() -> impl Strategy<Value = GroupValue> {
        let members = proptest::collection::vec(member_value(), 0..6);
        let name = || proptest::option::of("[a-z]{0,8}");
        (
            ".{0,12}",
            any::<i32>(),
            name(),
            name(),
            any::<i64>(),
            members,
        )
            .prop_map(
                |(protocol_type, generation, protocol, leader, timestamp, members)| GroupValue {
                    protocol_type,
                    generation,
                    protocol,
                    leader,
                    current_state_timestamp_ms: timestamp,
                    members,
                },
            )
    }

    #[test]
    fn offset_records_have_kafkas_bytes() {
        assert_eq!(
            &offset_key("g", "to", 7)[..],
            [0, 1, 0, 1, b'g', 0, 2, b't', b'o', 0, 0, 0, 7]
        );
        let mut value = OffsetValue {
            offset: 5,
            leader_epoch: 2,
            metadata: "m".to_owned(),
            commit_timestamp_ms: 9,
            expire_timestamp_ms: None,
            topic_id: Uuid::nil(),
        };
        let v3 = [
            0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 2, 0, 1, b'm', 0, 0, 0, 0, 0, 0, 0, 9,
        ];
        assert_eq!(&value.encode()[..], v3);
        value.topic_id = Uuid::from_bytes([0xab; 16]);
        let mut v4 = vec![0, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 2, 2, b'm'];
        v4.extend([0, 0, 0, 0, 0, 0, 0, 9, 1, 0, 16]);
        v4.extend([0xab; 16]);
        assert_eq!(&value.encode()[..], v4);
    }

    #[test]
    fn group_records_have_kafkas_bytes() {
        assert_eq!(&group_key("g")[..], [0, 2, 0, 1, b'g']);
        let empty = GroupValue {
            protocol_type: "c".to_owned(),
            generation: 3,
            protocol: None,
            leader: None,
            current_state_timestamp_ms: 9,
            members: Vec::new(),
        };
        let v3 = [
            0, 3, 0, 1, b'c', 0, 0, 0, 3, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0,
        ];
        assert_eq!(&empty.encode()[..], v3);
    }

    #[test]
    fn old_and_unknown_versions_are_told_apart() {
        let v0: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
        let value = OffsetValue::parse(&Bytes::from_static(v0)).unwrap();
        assert_eq!(
            (value.offset, value.leader_epoch, value.commit_timestamp_ms),
            (5, -1, 9)
        );
        let v9 = Bytes::from_static(&[0, 9, 0]);
        assert!(matches!(
            OffsetValue::parse(&v9),
            Err(UnreadableRecord::UnknownVersion { version: 9, .. })
        ));
        assert_eq!(
            Key::parse(&[0, 3, 0, 1, b'g']),
            Ok(Key::Unknown { version: 3 })
        );
    }

    proptest! {
        #[test]
        fn keys_round_trip(group in ".{0,30}", topic in ".{0,30}", partition in any::<i32>()) {
            let key = Key::parse(&offset_key(&group, &topic, partition));
            prop_assert_eq!(key, Ok(Key::Offset { group: group.clone(), topic, partition }));
            prop_assert_eq!(Key::parse(&group_key(&group)), Ok(Key::Group { group }));
        }

        #[test]
        fn offsets_round_trip_and_survive_truncation(value in offset_value()) {
            let bytes = value.encode();
            prop_assert_eq!(OffsetValue::parse(&bytes), Ok(value));
            for length in 0..bytes.len() {
                prop_assert!(OffsetValue::parse(&bytes.slice(..length)).is_err());
            }
        }

        #[test]
        fn groups_round_trip_and_survive_truncation(value in group_value()) {
            let bytes = value.encode();
            prop_assert!(bytes.len() <= value.size_bytes_max());
            prop_assert_eq!(GroupValue::parse(&bytes), Ok(value));
            for length in 0..bytes.len() {
                prop_assert!(GroupValue::parse(&bytes.slice(..length)).is_err());
            }
        }

        #[test]
        fn any_bytes_parse_or_fail_without_panic(
            version in -1i16..6,
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = Bytes::from([&version.to_be_bytes()[..], &bytes].concat());
            let _ = Key::parse(&bytes);
            let _ = OffsetValue::parse(&bytes);
            let _ = GroupValue::parse(&bytes);
        }
    }
}
