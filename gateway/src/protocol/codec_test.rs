//! The hand-made codecs against a second implementation of the protocol, byte for byte, in every
//! version.

use bytes::{Bytes, BytesMut};
use kafka_protocol::messages as kp;
use kafka_protocol::protocol::{Decodable, Encodable, StrBytes as KpStr};
use proptest::collection::vec;
use proptest::prelude::*;
use uuid::Uuid;

use super::fetch::{FetchResponse, NodeEndpoint, PartitionFetched, TopicFetched};
use super::produce::{PartitionProduce, ProduceRequest, TopicKey, TopicProduce};
use super::versions::Api;

fn name() -> impl Strategy<Value = String> {
    "[a-z.é]{1,12}"
}

fn produce_request() -> impl Strategy<Value = ProduceRequest> {
    let partition = (any::<i32>(), proptest::option::of(vec(any::<u8>(), 0..300))).prop_map(
        |(index, records)| PartitionProduce {
            index,
            records: records.map(Bytes::from),
        },
    );
    let topic = (name(), any::<u128>(), vec(partition, 0..4));
    let topics = vec(topic, 0..4);
    (proptest::option::of(name()), -1i16..2, any::<i32>(), topics).prop_map(
        |(transactional_id, acks, timeout_ms, topics)| ProduceRequest {
            transactional_id: transactional_id.map(|id| id.as_str().into()),
            acks,
            timeout_ms,
            topics: topics
                .into_iter()
                .map(|(name, id, partitions)| TopicProduce {
                    // Both kinds; the version decides which one is used.
                    topic: if id % 2 == 0 {
                        TopicKey::Name(name.as_str().into())
                    } else {
                        TopicKey::Id(Uuid::from_u128(id))
                    },
                    partitions,
                })
                .collect(),
        },
    )
}

/// Makes all topic keys of the kind that a version has.
fn fit(mut request: ProduceRequest, version: i16) -> ProduceRequest {
    for (number, topic) in request.topics.iter_mut().enumerate() {
        topic.topic = match (&topic.topic, version >= 13) {
            (TopicKey::Name(_), true) => TopicKey::Id(Uuid::from_u128(number as u128)),
            (TopicKey::Id(id), false) => TopicKey::Name(format!("t{id}").as_str().into()),
            (key, _) => key.clone(),
        };
    }
    request
}

fn kp_produce(request: &ProduceRequest) -> kp::ProduceRequest {
    let topics = request
        .topics
        .iter()
        .map(|topic| {
            let partitions = topic
                .partitions
                .iter()
                .map(|p| {
                    kp::produce_request::PartitionProduceData::default()
                        .with_index(p.index)
                        .with_records(p.records.clone())
                })
                .collect();
            let data =
                kp::produce_request::TopicProduceData::default().with_partition_data(partitions);
            match &topic.topic {
                TopicKey::Name(name) => {
                    data.with_name(kp::TopicName(KpStr::from_string(name.to_string())))
                }
                TopicKey::Id(id) => data.with_topic_id(*id),
            }
        })
        .collect();
    kp::ProduceRequest::default()
        .with_transactional_id(
            request
                .transactional_id
                .as_ref()
                .map(|id| kp::TransactionalId(KpStr::from_string(id.to_string()))),
        )
        .with_acks(request.acks)
        .with_timeout_ms(request.timeout_ms)
        .with_topic_data(topics)
}

fn partition_fetched() -> impl Strategy<Value = PartitionFetched> {
    let numbers = (
        any::<i32>(),
        any::<i16>(),
        any::<i64>(),
        any::<i64>(),
        any::<i64>(),
    );
    // Sizes on both sides of the limit under which records are copied.
    let piece = prop_oneof![vec(any::<u8>(), 0..64), vec(any::<u8>(), 3000..3100)];
    (
        numbers,
        proptest::option::of((0i32..9, 0i64..9)),
        proptest::option::of((0i32..9, 0i32..9)),
        any::<bool>(),
        vec(piece.prop_map(Bytes::from), 0..4),
    )
        .prop_map(
            |(numbers, diverging_epoch, current_leader, read_committed, records)| {
                PartitionFetched {
                    index: numbers.0,
                    error_code: numbers.1,
                    high_watermark: numbers.2,
                    last_stable_offset: numbers.3,
                    log_start_offset: numbers.4,
                    diverging_epoch,
                    current_leader,
                    read_committed,
                    records,
                }
            },
        )
}

fn fetch_response() -> impl Strategy<Value = FetchResponse> {
    let topic = (name(), any::<u128>(), vec(partition_fetched(), 0..4)).prop_map(
        |(name, id, partitions)| TopicFetched {
            name: name.as_str().into(),
            topic_id: Uuid::from_u128(id),
            partitions,
        },
    );
    let endpoint = (0i32..9, name(), any::<u16>(), proptest::option::of(name())).prop_map(
        |(broker_id, host, port, rack)| NodeEndpoint {
            broker_id,
            host,
            port,
            rack,
        },
    );
    (
        any::<i16>(),
        any::<i32>(),
        vec(topic, 0..4),
        vec(endpoint, 0..3),
    )
        .prop_map(
            |(error_code, session_id, topics, node_endpoints)| FetchResponse {
                error_code,
                session_id,
                topics,
                node_endpoints,
            },
        )
}

/// The same response as the other implementation has it, with only what the version can carry.
fn kp_fetch(response: &FetchResponse, version: i16) -> kp::FetchResponse {
    use kp::fetch_response as f;
    let partition = |p: &PartitionFetched| {
        let mut data = f::PartitionData::default()
            .with_partition_index(p.index)
            .with_error_code(p.error_code)
            .with_high_watermark(p.high_watermark)
            .with_last_stable_offset(p.last_stable_offset)
            .with_log_start_offset(p.log_start_offset)
            .with_preferred_read_replica(kp::BrokerId(-1))
            .with_aborted_transactions(p.read_committed.then(Vec::new))
            .with_records(Some(Bytes::from(p.records.concat())));
        if version >= 12 {
            if let Some((epoch, end_offset)) = p.diverging_epoch {
                data = data.with_diverging_epoch(
                    f::EpochEndOffset::default()
                        .with_epoch(epoch)
                        .with_end_offset(end_offset),
                );
            }
            if let Some((leader, epoch)) = p.current_leader {
                data = data.with_current_leader(
                    f::LeaderIdAndEpoch::default()
                        .with_leader_id(kp::BrokerId(leader))
                        .with_leader_epoch(epoch),
                );
            }
        }
        data
    };
    let topics = response.topics.iter().map(|topic| {
        let data = f::FetchableTopicResponse::default()
            .with_partitions(topic.partitions.iter().map(partition).collect());
        if version >= 13 {
            data.with_topic_id(topic.topic_id)
        } else {
            data.with_topic(kp::TopicName(KpStr::from_string(topic.name.to_string())))
        }
    });
    let mut wire = kp::FetchResponse::default().with_responses(topics.collect());
    if version >= 7 {
        wire = wire
            .with_error_code(response.error_code)
            .with_session_id(response.session_id);
    }
    if version >= 16 {
        let endpoint = |e: &NodeEndpoint| {
            f::NodeEndpoint::default()
                .with_node_id(kp::BrokerId(e.broker_id))
                .with_host(KpStr::from_string(e.host.clone()))
                .with_port(i32::from(e.port))
                .with_rack(e.rack.clone().map(KpStr::from_string))
        };
        wire = wire.with_node_endpoints(response.node_endpoints.iter().map(endpoint).collect());
    }
    wire
}

proptest! {
    #[test]
    fn produce_requests_decode_as_the_second_implementation_encodes_them(
        request in produce_request(),
    ) {
        for version in 3..=13 {
            let request = fit(request.clone(), version);
            let mut bytes = BytesMut::new();
            kp_produce(&request).encode(&mut bytes, version).unwrap();
            prop_assert_eq!(ProduceRequest::decode(bytes.freeze(), version), Ok(request));
        }
    }

    #[test]
    fn fetch_responses_encode_as_the_second_implementation_does(response in fetch_response()) {
        for version in 4..=18 {
            let wire = kp_fetch(&response, version);
            let mut expected = BytesMut::new();
            wire.encode(&mut expected, version).unwrap();
            let ours = response.clone().encode(version, 7).pieces.concat();
            let header = if Api::Fetch.is_flexible(version) { 5 } else { 4 };
            prop_assert_eq!(&ours[4 + header..], &expected[..], "version {}", version);
            let size = u32::from_be_bytes(ours[..4].try_into().unwrap());
            prop_assert_eq!(size as usize, ours.len() - 4);
            let mut body = Bytes::copy_from_slice(&ours[4 + header..]);
            prop_assert!(kp::FetchResponse::decode(&mut body, version).is_ok());
        }
    }

    #[test]
    fn any_bytes_are_a_produce_request_or_an_error(
        bytes in vec(any::<u8>(), 0..256),
        version in 0i16..14,
    ) {
        let _ = ProduceRequest::decode(Bytes::from(bytes), version);
    }

    #[test]
    fn damaged_produce_requests_do_no_harm(
        request in produce_request(),
        at in any::<proptest::sample::Index>(),
        byte in any::<u8>(),
    ) {
        for version in 3..=13 {
            let mut bytes = BytesMut::new();
            kp_produce(&fit(request.clone(), version)).encode(&mut bytes, version).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = ProduceRequest::decode(bytes.freeze(), version);
        }
    }
}

#[test]
fn records_are_slices_of_the_frame() {
    let request = ProduceRequest {
        transactional_id: None,
        acks: -1,
        timeout_ms: 1,
        topics: vec![TopicProduce {
            topic: TopicKey::Name("t".into()),
            partitions: vec![PartitionProduce {
                index: 0,
                records: Some(vec![7; 100].into()),
            }],
        }],
    };
    let mut bytes = BytesMut::new();
    kp_produce(&request).encode(&mut bytes, 9).unwrap();
    let frame = bytes.freeze();
    let decoded = ProduceRequest::decode(frame.clone(), 9).unwrap();
    let records = decoded.topics[0].partitions[0].records.as_ref().unwrap();
    assert!(frame.as_ptr_range().contains(&records.as_ptr()));
}

#[test]
fn large_records_are_not_copied() {
    let records = Bytes::from(vec![7; 100_000]);
    let mut partition = PartitionFetched::failed(0, 0);
    partition.records = vec![records.clone()];
    let response = FetchResponse {
        topics: vec![TopicFetched {
            partitions: vec![partition],
            ..TopicFetched::default()
        }],
        ..FetchResponse::default()
    };
    let pieces = response.encode(12, 1).pieces;
    assert!(
        pieces
            .iter()
            .any(|piece| piece.as_ptr() == records.as_ptr())
    );
}

#[test]
fn a_produce_request_of_twenty_bytes_with_a_huge_array_is_refused() {
    for version in 0..=13 {
        let mut body = vec![0u8; 20];
        for at in 0..14 {
            let mut body = body.clone();
            body[at..at + 5].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x07]);
            let _ = ProduceRequest::decode(Bytes::from(body), version);
        }
        // null transactional id, acks, timeout, then the array's length.
        body = if version >= 9 {
            vec![0, 0, 1, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0x0f]
        } else if version >= 3 {
            vec![0xff, 0xff, 0, 1, 0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff]
        } else {
            vec![0, 1, 0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff]
        };
        body.resize(20, 0);
        assert!(
            ProduceRequest::decode(Bytes::from(body), version).is_err(),
            "{version}"
        );
    }
}
