//! Produce, by hand: requests of version 0 to 13 with the records as slices of the frame, and the
//! answer to versions 0 to 2, which are told apart only to be refused in their own form.
//!
//! Invariant: records are never copied and never looked into.

use bytes::{BufMut, Bytes};
use uuid::Uuid;

use super::Malformed;
use super::frame::{Response, begin_response, finish_response};
use super::messages::StrBytes;
use super::versions::Api;
use super::wire::{Reader, put_length, put_string};

/// First version that is served.
pub const VERSION_MIN: i16 = 3;
/// From this version on topics come as ids.
const TOPIC_IDS_FROM: i16 = 13;
/// More partitions than this in one request are refused; they cost memory before they are routed.
const PARTITIONS_MAX: usize = 100_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProduceRequest {
    pub transactional_id: Option<StrBytes>,
    pub acks: i16,
    pub timeout_ms: i32,
    pub topics: Vec<TopicProduce>,
}

/// How a request names a topic.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TopicKey {
    Name(StrBytes),
    Id(Uuid),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicProduce {
    pub topic: TopicKey,
    pub partitions: Vec<PartitionProduce>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionProduce {
    pub index: i32,
    pub records: Option<Bytes>,
}

impl ProduceRequest {
    pub fn decode(body: Bytes, version: i16) -> Result<ProduceRequest, Malformed> {
        let flexible = Api::Produce.is_flexible(version);
        let mut reader = Reader::new(body);
        let transactional_id = if version >= VERSION_MIN {
            reader.nullable_string(flexible)?
        } else {
            None
        };
        let acks = reader.i16()?;
        let timeout_ms = reader.i32()?;
        let topic_count = reader.array(flexible, 2)?;
        let mut topics = Vec::with_capacity(topic_count.min(64));
        let mut partitions_left = PARTITIONS_MAX;
        for _ in 0..topic_count {
            topics.push(decode_topic(&mut reader, version, &mut partitions_left)?);
        }
        reader.skip_tagged_fields(flexible)?;
        Ok(ProduceRequest {
            transactional_id,
            acks,
            timeout_ms,
            topics,
        })
    }
}

/// Answers a request of version 0 to 2: every partition gets `error_code`.
pub fn refuse_old_version(
    request: &ProduceRequest,
    version: i16,
    correlation_id: i32,
    error_code: i16,
) -> Response {
    let mut out = begin_response(correlation_id, false);
    put_length(&mut out, false, request.topics.len());
    for topic in &request.topics {
        if let TopicKey::Name(name) = &topic.topic {
            put_string(&mut out, false, name);
        }
        put_length(&mut out, false, topic.partitions.len());
        for partition in &topic.partitions {
            out.put_i32(partition.index);
            out.put_i16(error_code);
            out.put_i64(-1);
            if version >= 2 {
                out.put_i64(-1);
            }
        }
    }
    if version >= 1 {
        out.put_i32(0);
    }
    finish_response(out)
}

fn decode_topic(
    reader: &mut Reader,
    version: i16,
    partitions_left: &mut usize,
) -> Result<TopicProduce, Malformed> {
    let flexible = Api::Produce.is_flexible(version);
    let topic = if version >= TOPIC_IDS_FROM {
        TopicKey::Id(reader.uuid()?)
    } else {
        TopicKey::Name(reader.string(flexible)?)
    };
    let count = reader.array(flexible, 5)?;
    *partitions_left = partitions_left
        .checked_sub(count)
        .ok_or(Malformed::InvalidLength {
            kind: "partitions",
            length: i64::try_from(count).unwrap_or(i64::MAX),
        })?;
    let mut partitions = Vec::with_capacity(count);
    for _ in 0..count {
        let index = reader.i32()?;
        let records = reader.nullable_bytes(flexible)?;
        reader.skip_tagged_fields(flexible)?;
        partitions.push(PartitionProduce { index, records });
    }
    reader.skip_tagged_fields(flexible)?;
    Ok(TopicProduce { topic, partitions })
}
