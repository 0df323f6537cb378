//! The formats, against bytes written by hand.

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
            |(id, instance, client, rebalance, session, subscription, assignment)| MemberValue {
                member_id: id,
                group_instance_id: instance,
                client_host: format!("/{client}"),
                client_id: client,
                rebalance_timeout_ms: rebalance,
                session_timeout_ms: session,
                subscription,
                assignment,
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
