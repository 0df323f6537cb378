//! A checkpoint says all it was given, and damage to it is noticed.

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

use super::*;
use crate::entry::{Purged, TermStart};
use crate::partition_log::state::ReplicaState;
use crate::segment::{Segment, SegmentId};

fn checkpoint() -> Checkpoint {
    let id = SegmentId {
        base_offset: Offset(5),
        generation: 2,
    };
    let mut segment = Segment::new(id, 3, 1234);
    segment.log_bytes = 77;
    segment.is_sealed = true;
    segment.is_compacted = true;
    let group = GroupCheckpoint {
        group: RaftGroupId(9),
        first_index: 3,
        flushed_next: 8,
        flushed_offset: Offset(20),
        purged: Some(Purged {
            index: 6,
            term: 1,
            next_offset: Offset(15),
        }),
        log_start: Offset(6),
        cleaned_offset: Offset(5),
        generation: 1,
        committed_next: 9,
        replay_from_record: 10,
        segments: vec![segment],
        term_starts: vec![TermStart {
            term: 1,
            first_index: 3,
            first_offset: Offset(5),
        }],
        vote: Some(Bytes::from_static(b"vote")),
        replica_state: Some(ReplicaState {
            index: 7,
            state: Bytes::from_static(b"state"),
        }),
    };
    let empty = GroupCheckpoint {
        group: RaftGroupId(10),
        segments: Vec::new(),
        purged: None,
        term_starts: Vec::new(),
        vote: None,
        replica_state: None,
        ..group.clone()
    };
    let wal = WalStart {
        sequence: 4,
        frame: 5,
        record: 6,
        confirmed_frame: 7,
    };
    Checkpoint {
        storage_id: Uuid::new_v4(),
        wal,
        clean_at_record: Some(8),
        groups: vec![group, empty],
    }
}

#[test]
fn a_checkpoint_round_trips() {
    let checkpoint = checkpoint();
    assert_eq!(Checkpoint::decode(&checkpoint.encode()), Ok(checkpoint));
}

#[test]
fn every_flipped_bit_and_every_cut_is_found() {
    let bytes = checkpoint().encode();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Checkpoint::decode(&damaged).is_err(), "bit {bit}");
    }
    for size in 0..bytes.len() {
        assert!(Checkpoint::decode(&bytes[..size]).is_err(), "size {size}");
    }
}

/// Version 1 as it was written: no log start, no purge, plain segments.
fn version_1() -> Vec<u8> {
    let mut out = b"CHRCHKP\x01\0\0\0\0".to_vec();
    out.extend([7; 16]);
    for number in [4u64, 5, 6, 7] {
        out.extend(number.to_le_bytes());
    }
    out.push(0);
    out.extend(0u64.to_le_bytes());
    out.extend(1u32.to_le_bytes());
    for number in [9u64, 3, 8, 9, 10] {
        out.extend(number.to_le_bytes());
    }
    out.extend(2u32.to_le_bytes());
    for (base, next, first, end) in [(5i64, 15i64, 3u64, 6u64), (15, 20, 6, 8)] {
        out.extend(base.to_le_bytes());
        out.extend(next.to_le_bytes());
        for number in [first, end, 77, 3, 0, 0, 77] {
            out.extend(number.to_le_bytes());
        }
        out.extend(1000i64.to_le_bytes());
        out.extend(i64::MIN.to_le_bytes());
    }
    out.extend(0u32.to_le_bytes());
    for _ in 0..2 {
        out.extend(u32::MAX.to_le_bytes());
    }
    let crc = crc32c(&out[PREFIX_SIZE..]);
    out[CRC_AT..PREFIX_SIZE].copy_from_slice(&crc.to_le_bytes());
    out
}

#[test]
fn a_checkpoint_of_the_version_before_is_read() {
    let checkpoint = Checkpoint::decode(&version_1()).unwrap();
    let group = &checkpoint.groups[0];
    assert_eq!((group.first_index, group.flushed_next), (3, 8));
    assert_eq!(
        (group.log_start, group.flushed_offset),
        (Offset(5), Offset(20))
    );
    assert_eq!((group.purged, group.cleaned_offset), (None, Offset(0)));
    let sealed: Vec<_> = group.segments.iter().map(|s| s.is_sealed).collect();
    assert_eq!(sealed, [true, false]);
    assert_eq!(group.segments[0].first_timestamp, 1000);
    assert_eq!(
        Checkpoint::decode(&checkpoint.encode()),
        Ok(checkpoint.clone())
    );
}
