//! A checkpoint says all it was given, and damage to it is noticed.

use super::*;

fn checkpoint() -> Checkpoint {
    let mut segment = Segment::new(Offset(5), 3);
    segment.log_bytes = 77;
    let group = GroupCheckpoint {
        group: RaftGroupId(9),
        first_index: 3,
        flushed_next: 8,
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
