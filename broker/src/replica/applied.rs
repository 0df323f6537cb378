//! What a replica has made of its log up to one index: the part of its state that is saved with the
//! log, and that a manifest carries to other replicas.
//!
//! Invariant: a function of the committed log alone, so it is the same on every replica that applied
//! up to the same index.

use bytes::{BufMut, Bytes, BytesMut};
use chronik_types::offset::Offset;

use super::codec::{self, DecodeError, Reader, put_count};
use super::producer_state::ProducerTable;
use super::raft_config::{LogId, StoredMembership};

/// Written since there is a log start offset.
const VERSION: u8 = 2;
/// Without a log start offset: that was 0.
const VERSION_WITHOUT_LOG_START: u8 = 1;

/// The state as of one log index.
#[derive(Debug, Clone, Default)]
pub struct Applied {
    pub log_id: Option<LogId>,
    pub membership: StoredMembership,
    pub high_watermark: Offset,
    /// Agreed between the replicas through the log. At most the high watermark.
    pub log_start_offset: Offset,
    pub producers: ProducerTable,
}

impl Applied {
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(VERSION);
        put_log_id(&mut out, &self.log_id);
        out.put_i64(self.high_watermark.0);
        put_log_id(&mut out, self.membership.log_id());
        for part in [
            codec::encode_membership(self.membership.membership()),
            self.producers.encode(),
        ] {
            put_count(&mut out, part.len());
            out.put(part);
        }
        out.put_i64(self.log_start_offset.0);
        out.freeze()
    }

    pub fn decode(bytes: &[u8]) -> Result<Applied, DecodeError> {
        let versions = VERSION_WITHOUT_LOG_START..=VERSION;
        let (mut reader, version) = Reader::with_version("replica state", bytes, versions)?;
        let log_id = read_log_id(&mut reader)?;
        let high_watermark = Offset(reader.i64()?);
        let membership_log_id = read_log_id(&mut reader)?;
        let size = reader.count(bytes.len())?;
        let membership = codec::decode_membership(reader.bytes(size)?)?;
        let size = reader.count(bytes.len())?;
        let producers = ProducerTable::decode(reader.bytes(size)?)?;
        let log_start_offset = match version {
            VERSION_WITHOUT_LOG_START => Offset::ZERO,
            _ => Offset(reader.i64()?),
        };
        if high_watermark < Offset::ZERO
            || !(Offset::ZERO..=high_watermark).contains(&log_start_offset)
        {
            return Err(reader.invalid());
        }
        reader.end()?;
        let membership = StoredMembership::new(membership_log_id, membership);
        Ok(Applied {
            log_id,
            membership,
            high_watermark,
            log_start_offset,
            producers,
        })
    }
}

fn put_log_id(out: &mut impl BufMut, log_id: &Option<LogId>) {
    out.put_u8(u8::from(log_id.is_some()));
    if let Some(log_id) = log_id {
        out.put_u64(codec::term(log_id));
        out.put_u64(log_id.index);
    }
}

fn read_log_id(reader: &mut Reader<'_>) -> Result<Option<LogId>, DecodeError> {
    match reader.u8()? {
        0 => Ok(None),
        1 => {
            let (term, index) = (reader.u64()?, reader.u64()?);
            Ok(Some(codec::log_id(term, index)))
        }
        _ => Err(reader.invalid()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use chronik_types::id::{BrokerId, ReplicaId};

    use super::*;
    use crate::replica::raft_config::Membership;

    fn applied() -> Applied {
        let voter = ReplicaId {
            broker_id: BrokerId(1),
            incarnation: 3,
        };
        let membership = Membership::new_with_defaults(vec![BTreeSet::from([voter])], []);
        Applied {
            log_id: Some(codec::log_id(4, 77)),
            membership: StoredMembership::new(Some(codec::log_id(1, 0)), membership),
            high_watermark: Offset(1234),
            log_start_offset: Offset(1000),
            producers: ProducerTable::default(),
        }
    }

    #[test]
    fn the_state_round_trips_and_survives_truncation() {
        let applied = applied();
        let bytes = applied.encode();
        let decoded = Applied::decode(&bytes).unwrap();
        assert_eq!(decoded.log_id, applied.log_id);
        assert_eq!(decoded.membership, applied.membership);
        assert_eq!(decoded.high_watermark, applied.high_watermark);
        assert_eq!(decoded.log_start_offset, applied.log_start_offset);
        for end in 0..bytes.len() {
            assert!(Applied::decode(&bytes[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn a_state_of_the_first_version_is_read() {
        let bytes = applied().encode();
        let mut old = bytes[..bytes.len() - 8].to_vec();
        old[0] = VERSION_WITHOUT_LOG_START;
        let decoded = Applied::decode(&old).unwrap();
        assert_eq!(decoded.high_watermark, Offset(1234));
        assert_eq!(decoded.log_start_offset, Offset::ZERO);
    }

    #[test]
    fn a_log_start_above_the_high_watermark_is_refused() {
        let mut bytes = applied().encode().to_vec();
        let at = bytes.len() - 8;
        bytes[at..].copy_from_slice(&1235i64.to_be_bytes());
        assert!(Applied::decode(&bytes).is_err());
    }
}
