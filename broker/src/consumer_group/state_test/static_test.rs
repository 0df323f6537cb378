//! Static members: they come back to a stable group without a rebalance, the later of two processes
//! wins, and the log's record of a group is enough to go on with it.

use super::*;

/// A static group of A (instance i, leader) and B (instance j), stable in generation 1.
const STATIC: &str = "
    join a new=A instance=i
    join b new=B instance=j
    time 6
    > a: A in gen=1 range leader=A A B
    > b: B in gen=1 range leader=A
    sync b id=B gen=1 instance=j
    sync a id=A gen=1 instance=i give=A:p0,B:p1
    > write gen=1 A:p0 B:p1
    stored ok
    > a: assigned 'p0'
    > b: assigned 'p1'
";

fn check_from_static(transcript: &str) {
    check(&format!("{STATIC}{transcript}"));
}

#[test]
fn a_static_member_comes_back_without_a_rebalance() {
    check_from_static(
        "join b2 new=B2 instance=j
         > write gen=1 A:p0 B2:p1
         stored ok
         > b2: B2 in gen=1 range leader=A
         sync b2 id=B2 gen=1 instance=j
         > b2: assigned 'p1'
         heartbeat id=B gen=1 instance=j
         > FencedInstance
         commit id=B gen=1 instance=j
         > FencedInstance
         sync b id=B gen=1 instance=j
         > b: FencedInstance
         join b id=B instance=j
         > b: FencedInstance B
         leave id=B instance=j
         > FencedInstance
         show
         > Stable gen=1 [A B2]",
    );
}

#[test]
fn a_static_leader_comes_back_and_need_not_assign() {
    // Told of its leadership it would assign; an old client is told the old id instead.
    check_from_static(
        "join a2 new=A2 instance=i
         > write gen=1 A2:p0 B:p1
         stored ok
         > a2: A2 in gen=1 range leader=A",
    );
    check_from_static(
        "join a2 new=A2 instance=i skip
         > write gen=1 A2:p0 B:p1
         stored ok
         > a2: A2 in gen=1 range leader=A2 skip A2 B",
    );
    check_from_static(
        "join b2 new=B2 instance=j skip
         > write gen=1 A:p0 B2:p1
         stored ok
         > b2: B2 in gen=1 range leader=A",
    );
}

#[test]
fn a_static_member_whose_return_was_not_written_may_come_again() {
    check_from_static(
        "join b2 new=B2 instance=j
         > write gen=1 A:p0 B2:p1
         stored timeout
         > b2: TimedOut
         join b3 new=B3 instance=j
         > write gen=1 A:p0 B3:p1
         stored ok
         > b3: B3 in gen=1 range leader=A",
    );
}

#[test]
fn two_processes_with_one_instance_id_the_later_wins() {
    check_from_static(
        "join c new=C
         join b2 new=B2 instance=j
         join b3 new=B3 instance=j
         > b2: FencedInstance B2
         join a id=A instance=i
         > a: A in gen=2 range leader=A A B3 C
         > b3: B3 in gen=2 range leader=A
         > c: C in gen=2 range leader=A",
    );
}

#[test]
fn a_static_member_that_comes_back_mid_rebalance_starts_it_again() {
    check(
        "join a new=A instance=i
         join b new=B instance=j
         time 6
         > a: A in gen=1 range leader=A A B
         > b: B in gen=1 range leader=A
         sync b id=B gen=1 instance=j
         join a2 new=A2 instance=i
         > b: RebalanceInProgress
         join b id=B instance=j
         > a2: A2 in gen=2 range leader=A2 A2 B
         > b: B in gen=2 range leader=A2",
    );
}

#[test]
fn a_static_member_that_misses_a_rebalance_stays_while_its_session_runs() {
    check(
        "join a new=A instance=i rebalance=5 session=30
         join b new=B instance=j rebalance=5 session=30
         time 5
         > a: A in gen=1 range leader=A A B
         > b: B in gen=1 range leader=A
         sync b id=B gen=1 instance=j
         sync a id=A gen=1 instance=i give=A:p0,B:p1
         > write gen=1 A:p0 B:p1
         stored ok
         > a: assigned 'p0'
         > b: assigned 'p1'
         join c new=C rebalance=5 session=30
         join a id=A instance=i rebalance=5 session=30
         time 5
         > a: A in gen=2 range leader=A A B C
         > c: C in gen=2 range leader=A
         show
         > CompletingRebalance gen=2 [A B C]",
    );
    // Silent for longer than its session it is out like anybody else.
    check_from_static(
        "join c new=C
         join a id=A instance=i
         time 9
         show
         > PreparingRebalance gen=1 [A B C]
         time 1
         > a: A in gen=2 range leader=A A C
         > c: C in gen=2 range leader=A",
    );
}

#[test]
fn an_operator_removes_a_static_member_by_its_instance() {
    check_from_static(
        "leave instance=j
         > ok
         leave instance=nobody
         > UnknownMember
         show
         > PreparingRebalance gen=1 [A]",
    );
}

#[test]
fn a_group_from_its_record_is_the_group_that_was_written() {
    let mut scene = Scene::new();
    for line in STATIC
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('>'))
    {
        scene.run(line);
    }
    let value = scene.last_value.clone().unwrap();
    let mut loaded = Scene::new();
    loaded.group = Group::from_value(config(), value, Duration::ZERO);
    assert_eq!(loaded.group.describe(), scene.group.describe());
    assert_eq!(loaded.group.state(), GroupState::Stable);
    assert_eq!(loaded.run("heartbeat id=B gen=1 instance=j"), vec!["ok"]);
    assert_eq!(
        loaded.run("sync b id=B gen=1 instance=j"),
        vec!["b: assigned 'p1'"]
    );
    // A's session runs out, as nobody sends heartbeats for it.
    loaded.run("time 9");
    loaded.run("heartbeat id=B gen=1 instance=j");
    loaded.run("time 2");
    assert_eq!(loaded.run("show"), vec!["PreparingRebalance gen=1 [B]"]);
}
