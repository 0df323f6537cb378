//! Assignments: handed out when the log has them, and only in the generation they were made for.

use super::*;

#[test]
fn a_late_sync_gets_the_assignment_and_an_old_one_is_refused() {
    check(
        "join a new=A
         join b new=B
         time 6
         > a: A in gen=1 range leader=A A B
         > b: B in gen=1 range leader=A
         sync a id=A gen=1 give=A:p0,B:p1,X:p2
         > write gen=1 A:p0 B:p1
         stored ok
         > a: assigned 'p0'
         sync b id=B gen=0
         > b: IllegalGeneration
         sync b id=B gen=1 protocol=other
         > b: InconsistentProtocol
         sync b id=B gen=1
         > b: assigned 'p1'",
    );
}

#[test]
fn who_never_asks_for_its_assignment_is_out() {
    check(
        "join a new=A rebalance=20 session=30
         join b new=B rebalance=20 session=30
         time 6
         > a: A in gen=1 range leader=A A B
         > b: B in gen=1 range leader=A
         sync a id=A gen=1 give=A:p0
         > write gen=1 A:p0 B:
         stored ok
         > a: assigned 'p0'
         time 20
         show
         > PreparingRebalance gen=1 [A]",
    );
}

#[test]
fn a_sync_whose_write_has_an_unknown_outcome_fails_and_the_group_rebalances() {
    check(
        "join a new=A
         join b new=B
         time 6
         > a: A in gen=1 range leader=A A B
         > b: B in gen=1 range leader=A
         sync b id=B gen=1
         sync a id=A gen=1 give=A:p0,B:p1
         > write gen=1 A:p0 B:p1
         stored timeout
         > a: TimedOut
         > b: TimedOut
         show
         > PreparingRebalance gen=1 [A B]",
    );
}

#[test]
fn a_write_that_was_overtaken_by_a_rebalance_changes_nothing() {
    check(
        "join a new=A
         join b new=B
         time 6
         > a: A in gen=1 range leader=A A B
         > b: B in gen=1 range leader=A
         sync a id=A gen=1 give=A:p0,B:p1
         > write gen=1 A:p0 B:p1
         join c new=C
         > a: RebalanceInProgress
         stored ok
         show
         > PreparingRebalance gen=1 [A B C]
         join a id=A
         join b id=B
         > a: A in gen=2 range leader=A A B C
         > b: B in gen=2 range leader=A
         > c: C in gen=2 range leader=A",
    );
}

#[test]
fn a_second_sync_of_the_leader_waits_for_the_same_write() {
    check(
        "join a new=A
         time 3
         > a: A in gen=1 range leader=A A
         sync a id=A gen=1 give=A:p0
         > write gen=1 A:p0
         sync a2 id=A gen=1 give=A:p9
         > a: RebalanceInProgress
         stored ok
         > a2: assigned 'p0'",
    );
}
