//! Stage 1 of a produce: which batches a partition takes at all, whatever its state.
//!
//! Invariant: pure. What passes is well-formed down to the records' bytes, which are decoded only for
//! compacted topics.

use bytes::Bytes;
use chronik_storage::records;
use chronik_types::record_batch::{self, InvalidBatch};

use super::error::AppendError;
use super::producer_state::Sequence;

/// What the sequencer needs to know of accepted records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    pub record_count: i64,
    /// Of an idempotent producer's batch.
    pub sequence: Option<Sequence>,
}

/// Checks what a producer sent for one partition.
pub fn admit(records: &[u8], max_message_bytes: usize) -> Result<Admitted, AppendError> {
    let mut admitted = Admitted {
        record_count: 0,
        sequence: None,
    };
    let mut batch_count = 0usize;
    for batch in record_batch::batches(records) {
        let (at, header) = batch?;
        let size_bytes = header.size_bytes();
        if size_bytes > max_message_bytes {
            return Err(AppendError::TooLarge {
                size_bytes,
                max_bytes: max_message_bytes,
            });
        }
        header.verify_crc(&records[at..])?;
        header.verify_from_producer()?;
        if header.is_control() {
            return Err(AppendError::ControlBatch);
        }
        if header.is_transactional() {
            return Err(AppendError::TransactionsUnsupported);
        }
        if let Some(sequence) = Sequence::of(&header) {
            if header.producer_epoch.0 < 0 || header.base_sequence < 0 {
                return Err(AppendError::InvalidProducerFields {
                    epoch: header.producer_epoch,
                    base_sequence: header.base_sequence,
                });
            }
            admitted.sequence = Some(sequence);
        }
        batch_count += 1;
        admitted.record_count = admitted
            .record_count
            .saturating_add(header.record_count.into());
    }
    match batch_count {
        0 => Err(AppendError::Empty),
        // One answer carries one offset: a retry of several batches could be half a duplicate.
        2.. if admitted.sequence.is_some() => Err(AppendError::SeveralIdempotentBatches),
        _ => Ok(admitted),
    }
}

/// What a compacted topic asks besides of admitted records (Kafka's LogValidator): every record has a
/// key. One without would go with the next compaction, and one that cannot be read would end compaction.
pub fn check_keys(admitted: &Bytes) -> Result<(), AppendError> {
    for batch in record_batch::batches(admitted) {
        let (at, header) = batch?;
        let unreadable = |error: std::io::Error| AppendError::UnreadableRecords(error.to_string());
        let body = records::body_of(&header, &admitted.slice(at..)).map_err(unreadable)?;
        let found = records::records_of(&header, &body).map_err(unreadable)?;
        if found.iter().any(|record| record.key.is_none()) {
            return Err(AppendError::MissingKey);
        }
    }
    Ok(())
}

/// Whether the bytes were damaged, rather than refused for what they say.
pub fn is_corrupt(invalid: &InvalidBatch) -> bool {
    matches!(
        invalid,
        InvalidBatch::Truncated { .. } | InvalidBatch::ChecksumMismatch { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    use crate::replica::test_batches::{Spec, batch, idempotent, put_varint, record_bytes, value};

    const MAX: usize = 1024;

    #[test]
    fn good_batches_are_counted() {
        let admitted = admit(&[value("a"), value("b")].concat(), MAX).unwrap();
        assert_eq!(
            admitted,
            Admitted {
                record_count: 2,
                sequence: None
            }
        );
        let admitted = admit(&idempotent(5, 1, 7, 3), MAX).unwrap();
        let sequence = admitted.sequence.unwrap();
        assert_eq!(
            (admitted.record_count, sequence.first, sequence.last),
            (3, 7, 9)
        );
    }

    #[test]
    fn what_a_producer_must_not_send_is_refused() {
        let spec = |attributes| {
            batch(
                Spec {
                    attributes,
                    ..Spec::default()
                },
                b"x",
            )
        };
        assert_eq!(admit(&[], MAX), Err(AppendError::Empty));
        assert_eq!(admit(&spec(0x20), MAX), Err(AppendError::ControlBatch));
        assert_eq!(
            admit(&spec(0x10), MAX),
            Err(AppendError::TransactionsUnsupported)
        );
        assert!(matches!(
            admit(&value(&"x".repeat(MAX)), MAX),
            Err(AppendError::TooLarge { .. })
        ));
        let two = [idempotent(5, 1, 0, 1), idempotent(5, 1, 1, 1)].concat();
        assert_eq!(admit(&two, MAX), Err(AppendError::SeveralIdempotentBatches));
        assert!(matches!(
            admit(&idempotent(5, -1, 0, 1), MAX),
            Err(AppendError::InvalidProducerFields { .. })
        ));
    }

    #[test]
    fn every_record_of_a_compacted_topic_has_a_key_that_can_be_read() {
        let of = |attributes, body: &[u8]| {
            let spec = Spec {
                attributes,
                ..Spec::default()
            };
            check_keys(&batch(spec, body).into())
        };
        let mut keyed = Vec::new();
        // Attributes, timestamp, offset; key and value with their lengths; no headers.
        let record = [&[0, 0, 0, 2][..], b"k", &[2], b"v", &[0]].concat();
        put_varint(&mut keyed, record.len() as i64);
        keyed.extend(record);
        let keyless = record_bytes(&[(1_000, b"v")]);
        let zipped = |body: &[u8]| {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(body).unwrap();
            gzip.finish().unwrap()
        };
        assert_eq!(of(0, &keyed), Ok(()));
        assert_eq!(of(0, &keyless), Err(AppendError::MissingKey));
        assert_eq!(of(1, &zipped(&keyed)), Ok(()));
        assert_eq!(of(1, &zipped(&keyless)), Err(AppendError::MissingKey));
        assert!(matches!(
            of(1, b"not gzip"),
            Err(AppendError::UnreadableRecords(_))
        ));
    }

    #[test]
    fn damage_is_found() {
        let mut bytes = value("hello");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let error = admit(&bytes, MAX).unwrap_err();
        assert!(
            matches!(&error, AppendError::InvalidBatch(invalid) if is_corrupt(invalid)),
            "{error}"
        );
        let short = &value("hello")[..70];
        assert!(matches!(
            admit(short, MAX),
            Err(AppendError::InvalidBatch(InvalidBatch::Truncated { .. }))
        ));
    }
}
