//! Transcripts of the group state machine: each command, and under it what came out.
//!
//! ```text
//! join CALL [id=ID] [new=ID] [instance=I] [protocols=a:META,b] [session=S] [rebalance=S] [require] [skip]
//! sync CALL id=ID gen=N [instance=I] [give=ID:BYTES,ID:BYTES]
//! heartbeat id=ID gen=N [instance=I]     commit id=ID gen=N
//! leave id=ID [instance=I]               stored ok|timeout      (the oldest write)
//! time SECONDS                           show
//! ```

mod rebalance_test;
mod static_test;
mod sync_test;

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
