//! Which segments go for which, by what both replicas have removed, purged and compacted.

use super::*;
use crate::entry::Purged;
use crate::error::StorageError;
use chronik_types::id::RaftGroupId;

/// Offsets are ten times the indexes.
fn segment(first_index: u64, next_index: u64) -> Segment {
    let id = SegmentId {
        base_offset: Offset(10 * first_index as i64),
        generation: 0,
    };
    Segment {
        next_index,
        next_offset: Offset(10 * next_index as i64),
        is_sealed: true,
        log_bytes: 1000,
        ..Segment::new(id, first_index, 0)
    }
}

fn compacted(first_index: u64, next_index: u64) -> Segment {
    Segment {
        is_compacted: true,
        ..segment(first_index, next_index)
    }
}

const TERM: TermStart = TermStart {
    term: 3,
    first_index: 0,
    first_offset: Offset(0),
};

struct Case {
    own: LogState,
    theirs: LogManifest,
}

impl Case {
    /// Segments by where each begins and the last ends, and which of the own ones are damaged.
    fn new(own: &[Segment], damaged: &[usize], theirs: &[Segment]) -> Case {
        let mut state = LogState {
            first_index: own[0].first_index,
            segments: own.to_vec(),
            term_starts: vec![TERM],
            ..LogState::default()
        };
        for at in damaged {
            let error = StorageError::corrupt("x".as_ref(), 0, "why");
            assert!(state.note_damage(RaftGroupId(1), own[*at].id(), &error));
        }
        let last = theirs.last().unwrap();
        let theirs = LogManifest {
            log_start_offset: theirs[0].base_offset,
            next_offset: last.next_offset,
            last_index: last.next_index - 1,
            last_term: TERM.term,
            term_starts: vec![TERM],
            cleaned_offset: Offset::ZERO,
            segments: theirs.iter().map(ManifestSegment::of).collect(),
        };
        Case { own: state, theirs }
    }

    fn purged(mut self, index: u64) -> Case {
        let next_offset = Offset(10 * index as i64 + 10);
        let term = TERM.term;
        self.own.durable_purged = Some(Purged {
            index,
            term,
            next_offset,
        });
        self
    }

    fn cleaned(mut self, own: i64, theirs: i64) -> Case {
        self.own.cleaned_offset = Offset(own);
        self.theirs.cleaned_offset = Offset(theirs);
        self
    }

    fn check(&self, expected: Option<(Range<usize>, Range<usize>)>) {
        assert_eq!(self.own.choose(&self.theirs).ok(), expected);
    }
}

fn of(bounds: &[u64]) -> Vec<Segment> {
    let pairs = bounds.windows(2);
    pairs.map(|pair| segment(pair[0], pair[1])).collect()
}

#[test]
fn as_few_as_possible_between_bounds_that_both_have() {
    let check = |own: &[u64], damaged: &[usize], theirs: &[u64], expected| {
        Case::new(&of(own), damaged, &of(theirs)).check(expected);
    };
    check(&[0, 5, 10, 15], &[1], &[0, 5, 10, 15], Some((1..2, 1..2)));
    check(&[0, 5, 10, 15], &[0], &[0, 5, 15], Some((0..1, 0..1)));
    check(&[0, 5, 10, 15], &[1], &[0, 5, 15], Some((1..3, 1..2)));
    check(
        &[0, 5, 10, 15],
        &[1],
        &[0, 3, 7, 10, 15],
        Some((0..2, 0..3)),
    );
    check(
        &[0, 5, 10, 15, 20],
        &[1, 2],
        &[0, 5, 12, 15, 20],
        Some((1..3, 1..3)),
    );
    check(&[0, 5, 10, 15], &[2], &[0, 2, 15], Some((0..3, 0..2)));
    // What is damaged lies beyond the other's end, or no bound but the start is shared.
    check(&[0, 5, 10, 15], &[2], &[0, 5, 10], None);
    check(&[0, 5, 10, 15], &[1], &[0, 7, 13], None);
    check(&[0, 5, 10, 15], &[], &[0, 5, 10], None);
}

#[test]
fn the_front_need_not_be_the_same_below_the_log_start_and_what_raft_reads() {
    let case = |start: i64| {
        let mut case = Case::new(&of(&[0, 5, 10, 15]), &[0], &of(&[3, 7, 10, 15])).purged(8);
        case.own.durable_log_start = Offset(start);
        case
    };
    case(29).check(None);
    case(30).check(Some((0..2, 0..2)));
    case(69).check(Some((0..2, 0..2)));
    case(70).check(Some((0..2, 1..2)));
    // Raft still reads entry 2.
    let mut unpurged = case(30).purged(1);
    unpurged.check(None);
    unpurged = unpurged.purged(2);
    unpurged.check(Some((0..2, 0..2)));
    // The other keeps more than this one.
    let more = Case::new(&of(&[5, 10, 15]), &[0], &of(&[3, 7, 10, 15])).purged(8);
    more.check(Some((0..1, 0..2)));
}

#[test]
fn raft_keeps_every_entry_that_it_may_read() {
    let own = of(&[0, 5, 10, 15]);
    let theirs = [compacted(0, 5), compacted(5, 10), segment(10, 15)];
    let case = Case::new(&own, &[1], &theirs).cleaned(0, 100);
    case.check(None);
    let case = case.purged(8);
    case.check(None);
    case.purged(9).check(Some((0..2, 0..2)));
    // Entries without records between two segments are not there.
    let mut gap = of(&[0, 5, 10, 15]);
    gap[1].first_index = 6;
    let case = Case::new(&own, &[0, 1], &gap);
    case.check(None);
    case.purged(4).check(None);
    Case::new(&own, &[0, 1], &gap)
        .purged(5)
        .check(Some((0..2, 0..2)));
}

#[test]
fn what_compaction_removed_does_not_come_back_behind_it() {
    let own = [
        compacted(0, 5),
        compacted(5, 10),
        segment(10, 15),
        segment(15, 20),
    ];
    let theirs = of(&[0, 5, 10, 15, 20]);
    let purged = |damaged: usize| Case::new(&own, &[damaged], &theirs).purged(19);
    // All that was compacted here goes together.
    purged(0).cleaned(100, 0).check(Some((0..2, 0..2)));
    purged(1).cleaned(120, 0).check(Some((0..3, 0..3)));
    purged(2).cleaned(100, 100).check(Some((2..3, 2..3)));
    purged(2).cleaned(100, 140).check(Some((0..3, 0..3)));
    purged(2).cleaned(100, 500).check(None);
}

#[test]
fn a_log_of_other_terms_is_refused() {
    let own = of(&[0, 5, 10]);
    let start = |term, first_index| TermStart {
        term,
        first_index,
        first_offset: Offset(10 * first_index as i64),
    };
    let check = |ours: &[TermStart], their: &[TermStart], fits: bool| {
        let mut case = Case::new(&own, &[1], &own);
        case.own.term_starts = ours.to_vec();
        case.theirs.term_starts = their.to_vec();
        case.check(fits.then_some((1..2, 1..2)));
    };
    check(
        &[start(1, 0), start(2, 4)],
        &[start(1, 0), start(2, 4)],
        true,
    );
    check(&[start(1, 0), start(2, 4)], &[start(2, 4)], true);
    check(&[start(2, 4)], &[start(1, 0), start(2, 4)], true);
    check(
        &[start(1, 0), start(2, 4)],
        &[start(1, 0), start(2, 5)],
        false,
    );
    check(&[start(1, 0), start(2, 4)], &[start(1, 0)], false);
    check(&[start(1, 0)], &[start(1, 0), start(3, 7)], false);
    check(&[start(1, 0)], &[], false);
}

#[test]
fn names_stay_in_order() {
    let own = of(&[0, 5, 10]);
    // The last own segment ends in an entry without records, which is a segment of its own there.
    let mut longer = own.clone();
    longer[1].next_index = 11;
    let mut blank = segment(10, 11);
    (blank.next_offset, blank.log_bytes) = (blank.base_offset, 0);
    let theirs = [segment(0, 5), segment(5, 10), blank];
    Case::new(&longer, &[1], &theirs).check(Some((1..2, 1..3)));
    let mut goes_on = longer.clone();
    goes_on.push(Segment {
        first_index: 11,
        ..segment(10, 15)
    });
    Case::new(&goes_on, &[1], &theirs).check(None);
}

#[test]
fn a_log_is_as_clean_as_the_other_only_if_its_front_is_from_there() {
    let own = of(&[0, 5, 10, 15]);
    let check = |place: Range<usize>, clean: i64, theirs: i64, expected: Option<i64>| {
        let case = Case::new(&own, &[], &own).purged(14).cleaned(clean, theirs);
        let replacement = Replacement {
            old: Vec::new(),
            new: own[place.clone()].to_vec(),
            cleaned_offset: Offset(theirs),
            origin: Origin::Replica,
        };
        let cleaned = case.own.cleaned_with(&place, &replacement);
        assert_eq!(cleaned, expected.map(Offset));
    };
    check(0..2, 100, 30, Some(30));
    check(1..2, 50, 30, Some(50));
    // Compaction went on since the segments were chosen.
    check(1..2, 60, 0, None);
}
