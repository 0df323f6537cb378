//! Transcripts of the group state machine: each command, and under it what came out.
//!
//! ```text
//! join CALL [id=ID] [new=ID] [instance=I] [protocols=a:META,b] [session=S] [rebalance=S] [require] [skip]
//! sync CALL id=ID gen=N [instance=I] [give=ID:BYTES,ID:BYTES]
//! heartbeat id=ID gen=N [instance=I]     commit id=ID gen=N
//! leave id=ID [instance=I]               stored ok|timeout      (the oldest write)
//! time SECONDS                           show
//! ```

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

use super::config::GroupConfig;
use super::records::GroupValue;
use super::state::{
    Effect, Group, GroupError, GroupState, Join, JoinRefused, Now, Purpose, Reply, Sync,
};

struct Scene {
    group: Group<String>,
    now: Duration,
    stores: VecDeque<Purpose>,
    last_value: Option<GroupValue>,
}

fn config() -> Arc<GroupConfig> {
    Arc::new(GroupConfig {
        members_max: 3,
        ..GroupConfig::default()
    })
}

impl Scene {
    fn new() -> Scene {
        Scene {
            group: Group::new(config(), 0),
            now: Duration::ZERO,
            stores: VecDeque::new(),
            last_value: None,
        }
    }

    fn now(&self) -> Now {
        Now {
            moment: self.now,
            wall_ms: self.now.as_millis() as i64,
        }
    }

    /// Runs one command; the lines that came out.
    fn run(&mut self, command: &str) -> Vec<String> {
        let mut words = command.split_whitespace();
        let verb = words.next().unwrap();
        let rest: Vec<&str> = words.collect();
        let mut out = Vec::new();
        let mut lines = Vec::new();
        let now = self.now();
        match verb {
            "join" => self
                .group
                .join(now, join(&rest), rest[0].to_owned(), &mut out),
            "sync" => self
                .group
                .sync(now, sync(&rest), rest[0].to_owned(), &mut out),
            "heartbeat" => {
                let id = text(&rest, "id").unwrap_or_default();
                let outcome =
                    self.group
                        .heartbeat(now, number(&rest, "gen"), id, text(&rest, "instance"));
                lines.push(result(outcome));
            }
            "commit" => {
                let id = text(&rest, "id").unwrap_or_default();
                let outcome =
                    self.group
                        .check_commit(now, number(&rest, "gen"), id, text(&rest, "instance"));
                lines.push(result(outcome));
            }
            "leave" => {
                let id = text(&rest, "id").unwrap_or_default();
                let outcome = self.group.leave(now, id, text(&rest, "instance"), &mut out);
                lines.push(result(outcome));
            }
            "stored" => {
                let outcome = if rest[0] == "ok" {
                    Ok(())
                } else {
                    Err(GroupError::TimedOut)
                };
                let purpose = self.stores.pop_front().expect("a write is under way");
                self.group.stored(now, purpose, outcome, &mut out);
            }
            "time" => self.advance(rest[0].parse().unwrap(), &mut out),
            "show" => lines.push(self.show()),
            other => panic!("unknown command {other}"),
        }
        lines.extend(out.into_iter().map(|effect| self.effect(effect)));
        lines
    }

    fn advance(&mut self, seconds: u64, out: &mut Vec<Effect<String>>) {
        let until = self.now + Duration::from_secs(seconds);
        while let Some(next) = self.group.next_deadline().filter(|next| *next <= until) {
            self.now = self.now.max(next);
            self.group.on_time(self.now(), out);
        }
        self.now = until;
    }

    fn show(&self) -> String {
        let ids: Vec<_> = self
            .group
            .describe()
            .into_iter()
            .map(|member| member.member_id)
            .collect();
        let group = &self.group;
        format!(
            "{} gen={} [{}]",
            group.state().name(),
            group.generation(),
            ids.join(" ")
        )
    }

    fn effect(&mut self, effect: Effect<String>) -> String {
        match effect {
            Effect::Reply(call, reply) => format!("{call}: {}", describe(reply)),
            Effect::Store(purpose, value) => {
                self.stores.push_back(purpose);
                let mut line = format!("write gen={}", value.generation);
                for member in &value.members {
                    let given = std::str::from_utf8(&member.assignment).unwrap();
                    write!(line, " {}:{given}", member.member_id).unwrap();
                }
                self.last_value = Some(value);
                line
            }
        }
    }
}

fn text<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words
        .iter()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn number(words: &[&str], name: &str) -> i32 {
    text(words, name).unwrap_or("-1").parse().unwrap()
}

fn seconds(words: &[&str], name: &str, default: u64) -> Duration {
    Duration::from_secs(text(words, name).map_or(default, |s| s.parse().unwrap()))
}

fn pairs(list: &str) -> Vec<(String, Bytes)> {
    let pair = |item: &str| {
        let (name, bytes) = item.split_once(':').unwrap_or((item, ""));
        (name.to_owned(), Bytes::copy_from_slice(bytes.as_bytes()))
    };
    list.split(',')
        .filter(|item| !item.is_empty())
        .map(pair)
        .collect()
}

fn join(words: &[&str]) -> Join {
    Join {
        member_id: text(words, "id").unwrap_or_default().to_owned(),
        new_member_id: text(words, "new").unwrap_or_default().to_owned(),
        group_instance_id: text(words, "instance").map(str::to_owned),
        client_id: "client".to_owned(),
        client_host: "/127.0.0.1".to_owned(),
        session_timeout: seconds(words, "session", 10),
        rebalance_timeout: seconds(words, "rebalance", 60),
        protocol_type: text(words, "type").unwrap_or("consumer").to_owned(),
        protocols: pairs(text(words, "protocols").unwrap_or("range")),
        require_known_member_id: words.contains(&"require"),
        supports_skip_assignment: words.contains(&"skip"),
    }
}

fn sync(words: &[&str]) -> Sync {
    Sync {
        generation: number(words, "gen"),
        member_id: text(words, "id").unwrap().to_owned(),
        group_instance_id: text(words, "instance").map(str::to_owned),
        protocol_type: text(words, "type").map(str::to_owned),
        protocol_name: text(words, "protocol").map(str::to_owned),
        assignments: pairs(text(words, "give").unwrap_or_default()),
    }
}

fn result(outcome: Result<(), GroupError>) -> String {
    outcome.map_or_else(|error| format!("{error:?}"), |()| "ok".to_owned())
}

fn describe(reply: Reply) -> String {
    match reply {
        Reply::Join(Ok(joined)) => {
            let members = joined.members.iter().map(|member| {
                let metadata = std::str::from_utf8(&member.metadata).unwrap();
                let colon = if metadata.is_empty() { "" } else { ":" };
                format!(" {}{colon}{metadata}", member.member_id)
            });
            let protocol = joined.protocol_name.unwrap_or_default();
            let skip = if joined.skip_assignment { " skip" } else { "" };
            let members: String = members.collect();
            let (id, generation, leader) = (joined.member_id, joined.generation, joined.leader);
            format!("{id} in gen={generation} {protocol} leader={leader}{skip}{members}")
        }
        Reply::Join(Err(JoinRefused { error, member_id })) => {
            format!("{error:?} {member_id}").trim_end().to_owned()
        }
        Reply::Sync(Ok(synced)) => {
            format!(
                "assigned '{}'",
                std::str::from_utf8(&synced.assignment).unwrap()
            )
        }
        Reply::Sync(Err(error)) => format!("{error:?}"),
    }
}

/// Runs the commands of a transcript and compares the whole with what comes out.
fn check(transcript: &str) {
    let mut scene = Scene::new();
    let mut actual = String::new();
    let mut expected = String::new();
    for line in transcript
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
    {
        writeln!(expected, "{line}").unwrap();
        if line.starts_with('>') {
            continue;
        }
        writeln!(actual, "{line}").unwrap();
        for came_out in scene.run(line) {
            writeln!(actual, "> {came_out}").unwrap();
        }
    }
    assert!(
        actual == expected,
        "came out:\n{actual}\nexpected:\n{expected}"
    );
}

/// Two members, A (leader) and B, stable in generation 1.
const STABLE: &str = "
    join a new=A
    join b new=B
    time 6
    > a: A in gen=1 range leader=A A B
    > b: B in gen=1 range leader=A
    sync b id=B gen=1
    sync a id=A gen=1 give=A:p0,B:p1
    > write gen=1 A:p0 B:p1
    stored ok
    > a: assigned 'p0'
    > b: assigned 'p1'
";

fn check_from_stable(transcript: &str) {
    check(&format!("{STABLE}{transcript}"));
}

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
fn commits_from_outside_need_an_empty_group() {
    check("commit gen=-1\n> ok");
    check_from_stable(
        "commit gen=-1
         > UnknownMember
         commit id=A gen=1
         > ok
         commit id=A gen=0
         > IllegalGeneration
         commit id=X gen=1
         > UnknownMember",
    );
}

#[test]
fn subscriptions_larger_than_a_record_are_refused() {
    let config = Arc::new(GroupConfig {
        group_size_max_bytes: 300,
        ..GroupConfig::default()
    });
    let mut scene = Scene::new();
    scene.group = Group::new(config, 0);
    let large = format!("join a new=A protocols=range:{}", "x".repeat(300));
    assert_eq!(scene.run(&large), vec!["a: MetadataTooLarge"]);
    scene.run("join a new=A");
    scene.run("time 3");
    let large = format!("sync a id=A gen=1 give=A:{}", "x".repeat(301));
    assert_eq!(scene.run(&large), vec!["a: MetadataTooLarge"]);
    assert_eq!(
        scene.run("sync a id=A gen=1 give=A:p0"),
        vec!["write gen=1 A:p0"]
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

/// Random commands of five clients.
fn command() -> impl Strategy<Value = String> {
    let id = || prop::sample::select(vec!["A", "B", "C", "D", "E"]);
    let instance = || prop::sample::select(vec!["", " instance=i", " instance=j"]);
    let generation = || 0i32..4;
    prop_oneof![
        (id(), instance(), any::<bool>()).prop_map(|(id, i, require)| {
            let require = if require { " require" } else { "" };
            format!("join call new={id}{i}{require}")
        }),
        (id(), instance()).prop_map(|(id, i)| format!("join call id={id}{i}")),
        (id(), generation(), instance())
            .prop_map(|(id, g, i)| format!("sync call id={id} gen={g} give=A:x,B:y{i}")),
        (id(), generation()).prop_map(|(id, g)| format!("heartbeat id={id} gen={g}")),
        (id(), instance()).prop_map(|(id, i)| format!("leave id={id}{i}")),
        (0u64..40).prop_map(|seconds| format!("time {seconds}")),
        any::<bool>().prop_map(|ok| format!("stored {}", if ok { "ok" } else { "timeout" })),
    ]
}

proptest! {
    /// Whatever clients do: every call that waits is answered in the end, the generation never
    /// falls, and left alone the group becomes empty.
    #[test]
    fn every_call_is_answered_and_the_group_comes_to_rest(
        commands in proptest::collection::vec(command(), 1..60),
    ) {
        let mut scene = Scene::new();
        let mut calls = 0usize;
        let mut answers = 0usize;
        let mut generation = 0;
        for (at, command) in commands.iter().enumerate() {
            if command.starts_with("stored") && scene.stores.is_empty() {
                continue;
            }
            // New ids are unique, as the coordinator makes them.
            let command = command.replace("new=", &format!("new={at}-"));
            let waits = command.starts_with("join") || command.starts_with("sync");
            calls += usize::from(waits);
            answers += scene.run(&command).iter().filter(|l| l.starts_with("call: ")).count();
            prop_assert!(scene.group.generation() >= generation);
            generation = scene.group.generation();
        }
        for _ in 0..20 {
            answers += scene.run("time 400").iter().filter(|l| l.starts_with("call: ")).count();
            while !scene.stores.is_empty() {
                let lines = scene.run("stored ok");
                answers += lines.iter().filter(|l| l.starts_with("call: ")).count();
            }
        }
        prop_assert_eq!(answers, calls);
        prop_assert_eq!(scene.group.state(), GroupState::Empty);
        prop_assert_eq!(scene.group.next_deadline(), None);
    }
}
