//! The rules of KIP-98, case by case and against random sequences.

use chronik_types::epoch::ProducerEpoch;
use chronik_types::id::ProducerId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{BatchHeader, sequence_plus};
use proptest::prelude::*;

use super::error::AppendError;
use super::producer_state::*;
use super::test_batches::idempotent;

const P: ProducerId = ProducerId(7);

fn sequence(epoch: i16, first: i32, count: i32) -> Sequence {
    let last = sequence_plus(first, count - 1);
    Sequence {
        producer_id: P,
        epoch: ProducerEpoch(epoch),
        first,
        last,
    }
}

fn apply(table: &mut ProducerTable, epoch: i16, first: i32, count: i32, offset: i64) {
    let mut bytes = idempotent(P.0, epoch, first, count);
    chronik_types::record_batch::stamp(&mut bytes, Offset(offset), Default::default());
    table.apply(&BatchHeader::parse(&bytes).unwrap(), 0);
}

#[test]
fn the_next_sequence_is_appended_and_a_gap_is_out_of_order() {
    let mut table = ProducerTable::default();
    apply(&mut table, 0, 0, 3, 10);
    assert_eq!(table.check(&sequence(0, 3, 2)), Ok(Verdict::Append));
    assert_eq!(
        table.check(&sequence(0, 4, 1)),
        Err(AppendError::OutOfOrderSequence {
            producer_id: P,
            sequence: 4,
            expected: 3
        })
    );
}

#[test]
fn the_last_five_batches_are_answered_with_their_offsets() {
    let mut table = ProducerTable::default();
    for n in 0..6 {
        apply(&mut table, 0, n, 1, 100 + i64::from(n));
    }
    assert_eq!(
        table.check(&sequence(0, 1, 1)),
        Ok(Verdict::Duplicate(Offset(101)))
    );
    assert_eq!(
        table.check(&sequence(0, 5, 1)),
        Ok(Verdict::Duplicate(Offset(105)))
    );
    // The sixth last is no longer known.
    assert!(matches!(
        table.check(&sequence(0, 0, 1)),
        Err(AppendError::OutOfOrderSequence { .. })
    ));
}

#[test]
fn an_older_epoch_is_fenced_and_a_newer_one_starts_at_zero() {
    let mut table = ProducerTable::default();
    apply(&mut table, 3, 0, 1, 0);
    assert!(matches!(
        table.check(&sequence(2, 1, 1)),
        Err(AppendError::InvalidProducerEpoch {
            current: ProducerEpoch(3),
            ..
        })
    ));
    assert_eq!(table.check(&sequence(4, 0, 1)), Ok(Verdict::Append));
    assert!(matches!(
        table.check(&sequence(4, 1, 1)),
        Err(AppendError::OutOfOrderSequence { expected: 0, .. })
    ));
}

#[test]
fn an_unknown_producer_may_begin_anywhere() {
    assert_eq!(
        ProducerTable::default().check(&sequence(0, 42, 1)),
        Ok(Verdict::Append)
    );
}

#[test]
fn sequences_wrap_after_the_largest() {
    let mut table = ProducerTable::default();
    apply(&mut table, 0, i32::MAX - 1, 3, 0);
    assert_eq!(table.check(&sequence(0, 1, 1)), Ok(Verdict::Append));
}

#[test]
fn batches_of_one_entry_build_on_each_other() {
    let table = ProducerTable::default();
    let mut staging = Staging::new(&table);
    assert_eq!(staging.check(&sequence(0, 0, 2)), Ok(StagedVerdict::Append));
    assert_eq!(staging.check(&sequence(0, 2, 1)), Ok(StagedVerdict::Append));
    assert_eq!(
        staging.check(&sequence(0, 0, 2)),
        Ok(StagedVerdict::AfterThisEntry)
    );
}

#[test]
fn the_table_is_bounded_and_forgets_the_silent() {
    let mut table = ProducerTable::default();
    for n in 0..PRODUCERS_MAX as i64 + 1 {
        let mut bytes = idempotent(n, 0, 0, 1);
        chronik_types::record_batch::stamp(&mut bytes, Offset(n), Default::default());
        table.apply(&BatchHeader::parse(&bytes).unwrap(), n);
    }
    assert!(table.len() <= PRODUCERS_MAX, "{}", table.len());
    // Only who is not known may begin anywhere.
    let begin_anywhere = |table: &ProducerTable, id| {
        let sequence = Sequence {
            producer_id: ProducerId(id),
            ..sequence(0, 42, 1)
        };
        table.check(&sequence) == Ok(Verdict::Append)
    };
    assert!(begin_anywhere(&table, 0));
    assert!(!begin_anywhere(&table, PRODUCERS_MAX as i64));
    table.expire(PRODUCER_EXPIRATION_MS + PRODUCERS_MAX as i64);
    assert_eq!(table.len(), 1);
}

#[test]
fn tables_round_trip() {
    let mut table = ProducerTable::default();
    for n in 0..7 {
        apply(&mut table, 1, n, 1, i64::from(n));
    }
    assert_eq!(ProducerTable::decode(&table.encode()), Ok(table));
}

proptest! {
    #[test]
    fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
        let _ = ProducerTable::decode(&bytes);
        let _ = ProducerTable::decode(&[&[1], &bytes[..]].concat());
    }

    /// Whatever is sent, what is appended is without gap or repetition.
    #[test]
    fn what_is_appended_is_contiguous(firsts in proptest::collection::vec(0i32..12, 1..60)) {
        let mut table = ProducerTable::default();
        let mut log = Vec::new();
        for first in firsts {
            // The first batch ever may begin anywhere.
            let unknown = table.is_empty();
            if table.check(&sequence(0, first, 2)) == Ok(Verdict::Append) {
                if let Some(last) = log.last() {
                    prop_assert_eq!(last + 2, first);
                } else {
                    prop_assert!(unknown);
                }
                apply(&mut table, 0, first, 2, log.len() as i64 * 2);
                log.push(first);
            }
        }
    }
}
