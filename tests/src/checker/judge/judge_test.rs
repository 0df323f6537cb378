//! Each anomaly is made by hand and must be found; what Kafka's contract allows must pass.
//!
//! A history is written in short lines: `send 1/3` is sequence 3 of client 1, in partition 0 unless
//! a line says `p1`; `poll 7 5: 1/3 1/4` is what reader 7 got from offset 5 on.

use super::*;
use crate::checker::history::{CORRUPT, Event, Mode, WrittenValue};

fn value(text: &str) -> WrittenValue {
    if text == "?" {
        return CORRUPT;
    }
    let (client, sequence) = text.split_once('/').expect("client/sequence");
    WrittenValue {
        client: client.parse().expect("a client"),
        sequence: sequence.parse().expect("a sequence"),
    }
}

fn event(line: &str) -> Event {
    let (line, partition) = match line.strip_suffix(" p1") {
        Some(line) => (line, 1),
        None => (line, 0),
    };
    let (head, listed) = line.split_once(": ").unwrap_or((line, ""));
    let words: Vec<&str> = head.split(' ').collect();
    let number = |at: usize| words[at].parse::<u64>().expect("a number");
    let reader = || u32::try_from(number(1)).expect("a reader");
    let why = || "for a reason".to_owned();
    match words[0] {
        "client" => Event::Client {
            client: u32::try_from(number(1)).expect("a client"),
            mode: match words[2] {
                "idempotent" => Mode::Idempotent,
                "retry" => Mode::Retry,
                _ => Mode::Once,
            },
        },
        "send" => Event::Send {
            partition,
            value: value(words[1]),
        },
        "ok" => Event::Ok {
            partition,
            value: value(words[1]),
            offset: Some(number(2)),
        },
        "fail" => Event::Fail {
            partition,
            value: value(words[1]),
            why: why(),
        },
        "unknown" => Event::Unknown {
            partition,
            value: value(words[1]),
            why: if listed.is_empty() {
                why()
            } else {
                listed.to_owned()
            },
        },
        "reader" => Event::Reader {
            reader: reader(),
            kind: words[2].to_owned(),
        },
        "seek" => Event::Seek {
            reader: reader(),
            partition,
            offset: number(2),
        },
        "poll" => Event::Poll {
            reader: reader(),
            partition,
            offset: number(2),
            values: listed.split(' ').map(value).collect(),
        },
        "corrupt" => Event::Corrupt {
            reader: reader(),
            partition,
            offset: number(2),
            why: why(),
        },
        "error" => Event::Error {
            reader: reader(),
            why: listed.to_owned(),
        },
        "assign" => Event::Assign {
            reader: reader(),
            partition,
        },
        "revoke" => Event::Revoke {
            reader: reader(),
            partition,
        },
        "commit" => Event::Commit {
            key: number(1),
            reader: u32::try_from(number(2)).expect("a reader"),
            partition,
            offset: number(3),
        },
        "committed" => Event::Committed { key: number(1) },
        "ask" => Event::Ask { key: number(1) },
        "watermark" => Event::Watermark {
            key: number(1),
            partition,
            epoch: i64::try_from(number(2)).expect("an epoch"),
            offset: number(3),
        },
        "position" => Event::Position {
            key: number(1),
            partition,
            offset: number(2),
        },
        "readback" => Event::ReadBack {
            reader: reader(),
            what: "at the end".to_owned(),
        },
        "end" => Event::End {
            reader: reader(),
            partition,
            offset: number(2),
        },
        "complete" => Event::Complete { reader: reader() },
        "stuck" => Event::Stuck {
            who: words[1].to_owned(),
            why: why(),
        },
        other => panic!("no event {other}"),
    }
}

const CLIENTS: &str = "client 1 idempotent; client 2 retry; client 3 once; reader 1 tail; \
                       reader 2 member; reader 8 other; reader 9 readback";

/// Everybody who reads everything reads `log` as the log of partition 0.
fn read_by_all(log: &str) -> String {
    let end = log.split(' ').count();
    format!(
        "seek 1 0; poll 1 0: {log}; poll 2 0: {log}; readback 9; seek 9 0; end 9 {end}; \
         poll 9 0: {log}; complete 9"
    )
}

fn verdict(partitions: usize, lines: &str) -> Verdict {
    let names = (0..partitions).map(|partition| Event::Partition {
        partition,
        name: format!("t-{partition}"),
    });
    let lines = format!("{CLIENTS}; {lines}");
    let events = lines
        .split(';')
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(event);
    let history: Vec<Timed> = (0..)
        .zip(names.chain(events))
        .map(|(micros, event)| Timed { micros, event })
        .collect();
    judge(&history)
}

/// Exactly these kinds of anomaly are found.
fn check(lines: &str, kinds: &[Kind]) {
    let verdict = verdict(1, lines);
    let found: Vec<Kind> = verdict.counts.keys().copied().collect();
    assert_eq!(found, kinds, "{verdict}");
}

/// Two values of a client that were sent, acknowledged and are there.
const TWO: &str = "send 1/0; ok 1/0 0; send 1/1; ok 1/1 1";

#[test]
fn a_clean_history_passes() {
    check(&format!("{TWO}; {}", read_by_all("1/0 1/1")), &[]);
    // Pipelined, several writers, and a send of unknown outcome that was not done.
    let lines = "send 1/0; send 1/1; send 2/0; send 3/0; ok 1/0 0; ok 2/0 1; ok 1/1 2; unknown 3/0";
    check(&format!("{lines}; {}", read_by_all("1/0 2/0 1/1")), &[]);
}

#[test]
fn what_the_contract_allows_passes() {
    // A retry without numbers may be there twice, and an unknown send may have been done.
    let lines = "send 2/0; send 3/0; ok 2/0 0; unknown 3/0";
    let verdict = verdict(1, &format!("{lines}; {}", read_by_all("2/0 2/0 3/0")));
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!(verdict.notes.len(), 3, "{verdict}");
    // What certainly failed is not there.
    let lines = "send 3/0; fail 3/0; send 3/1; ok 3/1 0";
    check(&format!("{lines}; {}", read_by_all("3/1")), &[]);
    // Two sends at the same time land in any order.
    let lines = "send 2/0; send 3/0; ok 3/0 0; ok 2/0 1";
    check(&format!("{lines}; {}", read_by_all("3/0 2/0")), &[]);
}

#[test]
fn an_acknowledged_value_that_is_gone_is_lost() {
    check(&format!("{TWO}; {}", read_by_all("1/0")), &[Kind::Lost]);
    // Also if only the last read back misses it, of two.
    let again = "readback 9; seek 9 0; end 9 1; poll 9 0: 1/0; complete 9";
    check(
        &format!("{TWO}; {}; {again}", read_by_all("1/0 1/1")),
        &[Kind::Lost],
    );
}

#[test]
fn a_value_that_is_there_twice_is_duplicated() {
    let lines = "send 3/0; ok 3/0 0";
    check(
        &format!("{lines}; {}", read_by_all("3/0 3/0")),
        &[Kind::Duplicated],
    );
    // The numbers of an idempotent producer go back as well.
    check(
        &format!("{TWO}; {}", read_by_all("1/0 1/1 1/0")),
        &[Kind::Duplicated, Kind::Reordered],
    );
}

#[test]
fn a_later_send_before_an_earlier_one_is_reordered() {
    let lines = "send 1/0; send 1/1; ok 1/0 1; ok 1/1 0";
    check(
        &format!("{lines}; {}", read_by_all("1/1 1/0")),
        &[Kind::Reordered, Kind::Hole],
    );
    // By time, whoever sent it: acknowledged at 1 before 3/0 was sent, which is at 0.
    let lines = "send 2/0; ok 2/0 1; send 3/0; ok 3/0 0";
    check(
        &format!("{lines}; {}", read_by_all("3/0 2/0")),
        &[Kind::Reordered],
    );
    let lines = "send 2/0; ok 2/0 1; send 3/0; unknown 3/0";
    check(
        &format!("{lines}; {}", read_by_all("3/0 2/0")),
        &[Kind::Reordered],
    );
}

#[test]
fn a_hole_in_a_producers_numbers_is_found() {
    let lines = "send 1/0; send 1/1; unknown 1/0; ok 1/1 0";
    check(&format!("{lines}; {}", read_by_all("1/1")), &[Kind::Hole]);
    // The client had given up before it sent the next.
    let lines = "send 1/0; unknown 1/0; send 1/1; ok 1/1 0";
    check(&format!("{lines}; {}", read_by_all("1/1")), &[]);
}

#[test]
fn a_value_that_nobody_sent_is_a_phantom() {
    check(
        &format!("{TWO}; {}", read_by_all("1/0 1/1 3/7")),
        &[Kind::Phantom],
    );
    // Also one that is sent only after it was read, and one of another partition.
    check(
        &format!(
            "seek 1 0; poll 1 0: 1/0; {TWO}; poll 1 1: 1/1; poll 2 0: 1/0 1/1; \
                  readback 9; seek 9 0; end 9 2; poll 9 0: 1/0 1/1; complete 9"
        ),
        &[Kind::Phantom],
    );
    let lines = "send 3/0 p1; ok 3/0 0 p1; send 1/0; ok 1/0 0; seek 8 0 p1; poll 8 0: 3/0 p1";
    let verdict = verdict(2, &format!("{lines}; {}", read_by_all("1/0 3/0")));
    assert_eq!(
        verdict.counts.keys().collect::<Vec<_>>(),
        [&Kind::Lost, &Kind::Phantom],
        "{verdict}"
    );
}

#[test]
fn a_failed_send_that_is_read_is_found() {
    let lines = "send 3/0; fail 3/0; send 3/1; ok 3/1 1";
    check(
        &format!("{lines}; {}", read_by_all("3/0 3/1")),
        &[Kind::FailedRead],
    );
}

#[test]
fn two_values_at_one_offset_are_inconsistent() {
    // A reader saw what is gone later: an uncommitted record.
    let both = "send 2/0; ok 2/0 0; send 2/1; ok 2/1 1";
    let lines = "send 3/0; unknown 3/0; seek 8 0; poll 8 0: 3/0";
    check(
        &format!("{lines}; {both}; {}", read_by_all("2/0 2/1")),
        &[Kind::InconsistentOffset],
    );
    // Acknowledged where another value is, or where another was acknowledged.
    let lines = "send 3/0; send 3/1; ok 3/0 1; ok 3/1 0";
    check(
        &format!("{lines}; {}", read_by_all("3/0 3/1")),
        &[Kind::InconsistentOffset],
    );
    let lines = "send 3/0; send 3/1; ok 3/0 0; ok 3/1 0";
    check(
        &format!("{lines}; {}", read_by_all("3/0 3/1")),
        &[Kind::InconsistentOffset],
    );
}

#[test]
fn a_reader_that_goes_back_or_jumps_is_found() {
    let all = read_by_all("1/0 1/1");
    check(
        &format!("{TWO}; seek 8 0; poll 8 0: 1/0; poll 8 0: 1/0; {all}"),
        &[Kind::NonMonotonicRead],
    );
    check(
        &format!("{TWO}; seek 8 0; poll 8 1: 1/1; {all}"),
        &[Kind::Skipped],
    );
    // By its own will it may do both.
    check(
        &format!("{TWO}; seek 8 1; poll 8 1: 1/1; seek 8 0; poll 8 0: 1/0; {all}"),
        &[],
    );
}

#[test]
fn what_a_reader_of_everything_was_never_given_is_unseen() {
    let read_back = "readback 9; seek 9 0; end 9 2; poll 9 0: 1/0 1/1; complete 9";
    check(
        &format!("{TWO}; seek 1 0; poll 1 0: 1/0; poll 2 0: 1/0 1/1; {read_back}"),
        &[Kind::Unseen],
    );
    // The members of the group share the work, and may repeat it.
    check(
        &format!(
            "{TWO}; reader 3 member; seek 1 0; poll 1 0: 1/0 1/1; poll 2 0: 1/0; \
                  poll 3 0: 1/0; poll 3 1: 1/1; {read_back}"
        ),
        &[],
    );
    check(
        &format!("{TWO}; reader 3 member; seek 1 0; poll 1 0: 1/0 1/1; poll 3 1: 1/1; {read_back}"),
        &[Kind::Unseen],
    );
}

#[test]
fn a_high_watermark_that_falls_is_found() {
    let all = format!("{TWO}; {}", read_by_all("1/0 1/1"));
    let ask = "ask 1; watermark 1 4 2; ask 2; watermark 2";
    check(&format!("{ask} 4 2; {all}"), &[]);
    check(&format!("{ask} 4 1; {all}"), &[Kind::WatermarkFell]);
    check(&format!("{ask} 5 1; {all}"), &[Kind::WatermarkFell]);
    // A leader of an earlier epoch lags; two answers to questions asked at once come in any order.
    check(&format!("{ask} 3 1; {all}"), &[]);
    check(
        &format!("ask 1; ask 2; watermark 1 4 2; watermark 2 4 1; {all}"),
        &[],
    );
}

#[test]
fn a_group_that_goes_back_is_found() {
    let all = read_by_all("1/0 1/1");
    let begin = format!("{TWO}; reader 4 member; reader 5 member; assign 4 0; poll 4 0: 1/0 1/1");
    let committed = format!("{begin}; commit 1 4 2; committed 1; revoke 4 0; assign 5 0");
    let rest = "seek 1 0; poll 1 0: 1/0 1/1; readback 9; seek 9 0; end 9 2; \
                poll 9 0: 1/0 1/1; complete 9";
    check(&format!("{committed}; {rest}"), &[]);
    check(
        &format!("{committed}; poll 5 1: 1/1; {rest}"),
        &[Kind::CommitFell],
    );
    // A commit of unknown outcome binds nobody.
    check(
        &format!("{begin}; commit 1 4 2; revoke 4 0; assign 5 0; poll 5 0: 1/0; {rest}"),
        &[],
    );
    // Nobody committed what this member begins with.
    check(
        &format!("{TWO}; reader 4 member; assign 4 0; poll 4 1: 1/1; {all}"),
        &[Kind::Skipped],
    );
    // A member that lost its partition commits.
    check(
        &format!("{committed}; commit 2 5 2; committed 2; commit 3 4 1; committed 3; {rest}"),
        &[Kind::CommitFell],
    );
}

#[test]
fn committed_offsets_that_observers_are_told_do_not_go_back() {
    let begin = format!(
        "{TWO}; {}; commit 1 2 2; committed 1",
        read_by_all("1/0 1/1")
    );
    check(&format!("{begin}; ask 5; position 5 2"), &[]);
    check(
        &format!("{begin}; ask 5; position 5 1"),
        &[Kind::CommitFell],
    );
    check(&format!("{begin}; ask 5; position 5 3"), &[Kind::Phantom]);
    // Told 2, of an unknown commit, then 1: only if 1 was sent later.
    let begin = format!(
        "{TWO}; {}; commit 1 2 1; commit 2 2 2",
        read_by_all("1/0 1/1")
    );
    check(
        &format!("{begin}; ask 5; position 5 2; ask 6; position 6 1"),
        &[Kind::CommitFell],
    );
    check(
        &format!("{begin}; ask 5; position 5 2; commit 3 2 1; ask 6; position 6 1"),
        &[],
    );
}

#[test]
fn changed_bytes_and_refusals_are_found() {
    let all = read_by_all("1/0 1/1");
    check(&format!("{TWO}; corrupt 8 0; {all}"), &[Kind::Corrupt]);
    check(
        &format!("{TWO}; error 8: t-0: OFFSET_OUT_OF_RANGE; {all}"),
        &[Kind::Refused],
    );
    check(
        &format!("{TWO}; send 1/2; unknown 1/2: OUT_OF_ORDER_SEQUENCE_NUMBER; {all}"),
        &[Kind::Refused],
    );
    check(
        &format!("{TWO}; error 8: COORDINATOR_NOT_AVAILABLE; {all}"),
        &[],
    );
}

#[test]
fn no_progress_and_no_evidence_are_found() {
    let all = read_by_all("1/0 1/1");
    check(&format!("{TWO}; stuck producer; {all}"), &[Kind::Stuck]);
    check(&format!("{TWO}; send 2/0; {all}"), &[Kind::Stuck]);
    check(TWO, &[Kind::Incomplete]);
    check("readback 9; complete 9", &[Kind::Incomplete]);
}
