//! Rebalances of dynamic members: how long they wait and for whom, who is out afterwards, who
//! leads, and which protocol is taken.

use super::*;

#[test]
fn the_first_rebalance_waits_for_more_members() {
    check(
        "join a new=A
         time 2
         join b new=B
         time 2
         join c new=C
         show
         > PreparingRebalance gen=0 [A B C]
         time 3
         time 3
         > a: A in gen=1 range leader=A A B C
         > b: B in gen=1 range leader=A
         > c: C in gen=1 range leader=A
         show
         > CompletingRebalance gen=1 [A B C]",
    );
}

#[test]
fn the_initial_delay_never_exceeds_the_rebalance_timeout() {
    check(
        "join a new=A rebalance=4
         time 2
         join b new=B rebalance=4
         time 1
         time 1
         > a: A in gen=1 range leader=A A B
         > b: B in gen=1 range leader=A",
    );
}

#[test]
fn members_join_get_assignments_and_keep_their_sessions() {
    check_from_stable(
        "heartbeat id=A gen=1
         > ok
         time 9
         heartbeat id=A gen=1
         > ok
         heartbeat id=B gen=1
         > ok
         time 9
         show
         > Stable gen=1 [A B]
         heartbeat id=A gen=2
         > IllegalGeneration
         heartbeat id=X gen=1
         > UnknownMember",
    );
}

#[test]
fn a_member_without_an_id_gets_one_first() {
    check(
        "join a new=A require
         > a: MemberIdRequired A
         join a2 id=A require
         time 3
         > a2: A in gen=1 range leader=A A
         join b new=B require
         > b: MemberIdRequired B
         time 9
         heartbeat id=A gen=1
         > ok
         time 2
         join b id=B
         > b: UnknownMember B
         show
         > CompletingRebalance gen=1 [A]",
    );
}

#[test]
fn a_rebalance_waits_for_ids_that_were_given_out() {
    check_from_stable(
        "join c new=C require
         > c: MemberIdRequired C
         join a id=A
         join b id=B
         show
         > PreparingRebalance gen=1 [A B]
         join c2 id=C require
         > a: A in gen=2 range leader=A A B C
         > b: B in gen=2 range leader=A
         > c2: C in gen=2 range leader=A",
    );
}

#[test]
fn a_pending_id_can_leave_and_the_rebalance_goes_on() {
    check_from_stable(
        "join c new=C require
         > c: MemberIdRequired C
         join a id=A
         join b id=B
         leave id=C
         > ok
         > a: A in gen=2 range leader=A A B
         > b: B in gen=2 range leader=A",
    );
}

#[test]
fn a_new_member_starts_a_rebalance_that_heartbeats_announce() {
    check_from_stable(
        "join c new=C
         heartbeat id=A gen=1
         > RebalanceInProgress
         commit id=A gen=1
         > ok
         join a id=A
         join b id=B
         > a: A in gen=2 range leader=A A B C
         > b: B in gen=2 range leader=A
         > c: C in gen=2 range leader=A
         commit id=A gen=2
         > RebalanceInProgress
         heartbeat id=B gen=2
         > ok",
    );
}

#[test]
fn who_does_not_come_back_in_time_is_out() {
    check_from_stable(
        "join c new=C rebalance=5
         join a id=A rebalance=5
         time 5
         show
         > PreparingRebalance gen=1 [A B C]
         time 5
         > a: A in gen=2 range leader=A A C
         > c: C in gen=2 range leader=A",
    );
}

#[test]
fn a_silent_member_times_out_and_the_others_rebalance() {
    check_from_stable(
        "time 8
         heartbeat id=A gen=1
         > ok
         time 3
         show
         > PreparingRebalance gen=1 [A]
         heartbeat id=A gen=1
         > RebalanceInProgress
         join a id=A
         > a: A in gen=2 range leader=A A",
    );
}

#[test]
fn the_leader_leaves_and_another_member_leads() {
    check_from_stable(
        "leave id=A
         > ok
         join b id=B
         > b: B in gen=2 range leader=B B",
    );
}

#[test]
fn the_last_one_out_leaves_an_empty_group_in_the_log() {
    check_from_stable(
        "leave id=B
         > ok
         leave id=A
         > ok
         > write gen=2
         show
         > Empty gen=2 []
         stored ok
         heartbeat id=A gen=1
         > UnknownMember
         commit gen=-1
         > ok
         join a new=A2
         time 3
         > a: A2 in gen=3 range leader=A2 A2",
    );
}

#[test]
fn a_leader_that_joins_again_wants_a_rebalance_and_a_follower_does_not() {
    check_from_stable(
        "join b id=B
         > b: B in gen=1 range leader=A
         join b2 id=B protocols=range:new
         show
         > PreparingRebalance gen=1 [A B]
         join a id=A
         > a: A in gen=2 range leader=A A B:new
         > b2: B in gen=2 range leader=A
         join a2 id=A
         > a2: A in gen=2 range leader=A A B:new",
    );
}

#[test]
fn the_protocol_that_most_members_like_best_and_all_have_wins() {
    check(
        "join a new=A protocols=x,y,z
         join b new=B protocols=z,y
         join c new=C protocols=y,z
         time 3
         time 3
         > a: A in gen=1 y leader=A A B C
         > b: B in gen=1 y leader=A
         > c: C in gen=1 y leader=A",
    );
    check_from_stable(
        "join c new=C protocols=sticky
         > c: InconsistentProtocol
         join c new=C type=connect
         > c: InconsistentProtocol
         show
         > Stable gen=1 [A B]",
    );
}

#[test]
fn a_full_group_refuses_more_members() {
    check(
        "join a new=A
         join b new=B
         join c new=C
         join d new=D
         > d: GroupFull
         time 6
         > a: A in gen=1 range leader=A A B C
         > b: B in gen=1 range leader=A
         > c: C in gen=1 range leader=A
         join d new=D
         > d: GroupFull",
    );
}
