//! What the clients of a run did and were told, in the order in which it was noted.
//!
//! Invariants: a send is noted before it is issued, an outcome after it is known, all by one clock;
//! so if the outcome of one operation stands before the begin of another, it was known before the
//! other began. Every event of the file is understood, or reading it fails: an event that the judge
//! does not know could hide what it is there to find.

use std::io::BufRead;

use serde_json::Value;

/// How a producer writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Numbers its batches; its client retries without limit (KIP-98).
    Idempotent,
    /// Without numbers; its client retries without limit, and a retry may be a duplicate.
    Retry,
    /// Without numbers; each request is sent once, whatever comes back.
    Once,
}

/// What a value says about itself: its writer and its number among that writer's sends to the
/// partition. `CORRUPT` stands for bytes that are no value of this workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WrittenValue {
    pub client: u32,
    pub sequence: u32,
}

/// No client has the number 0.
pub const CORRUPT: WrittenValue = WrittenValue {
    client: 0,
    sequence: 0,
};

/// Partitions of all topics, numbered through.
pub type PartitionNumber = usize;

/// One event. `client`, `reader` and `key` are numbers that are given once per run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Partition {
        partition: PartitionNumber,
        name: String,
    },
    Client {
        client: u32,
        mode: Mode,
    },
    Send {
        partition: PartitionNumber,
        value: WrittenValue,
    },
    /// Acknowledged at `offset`; `None` where the client was not told where.
    Ok {
        partition: PartitionNumber,
        value: WrittenValue,
        offset: Option<u64>,
    },
    /// Certainly not done. An aborted transaction's sends will end like this, too.
    Fail {
        partition: PartitionNumber,
        value: WrittenValue,
        why: String,
    },
    /// Done once, not at all, or (without numbers, with retries) several times; now or later.
    Unknown {
        partition: PartitionNumber,
        value: WrittenValue,
        why: String,
    },
    Reader {
        reader: u32,
        kind: String,
    },
    /// The reader reads on at `offset`, by its own will.
    Seek {
        reader: u32,
        partition: PartitionNumber,
        offset: u64,
    },
    /// The reader got these values at consecutive offsets.
    Poll {
        reader: u32,
        partition: PartitionNumber,
        offset: u64,
        values: Vec<WrittenValue>,
    },
    Corrupt {
        reader: u32,
        partition: PartitionNumber,
        offset: u64,
        why: String,
    },
    /// A client was told something that it cannot help by trying again.
    Error {
        reader: u32,
        why: String,
    },
    /// A group gave the partition to its member, or took it away.
    Assign {
        reader: u32,
        partition: PartitionNumber,
    },
    Revoke {
        reader: u32,
        partition: PartitionNumber,
    },
    /// The member is gone, with or without a word to the group.
    Gone {
        reader: u32,
    },
    Commit {
        key: u64,
        reader: u32,
        partition: PartitionNumber,
        offset: u64,
    },
    Committed {
        key: u64,
    },
    Uncommitted {
        key: u64,
        why: String,
    },
    /// An observer asks; what it was told names the key.
    Ask {
        key: u64,
    },
    /// The leader of `epoch` said that its high watermark is `offset`.
    Watermark {
        key: u64,
        partition: PartitionNumber,
        epoch: i64,
        offset: u64,
    },
    /// The group's coordinator said that the group has committed `offset`.
    Position {
        key: u64,
        partition: PartitionNumber,
        offset: u64,
    },
    /// A read back of everything begins; it is to reach the ends noted next, and ends complete.
    ReadBack {
        reader: u32,
        what: String,
    },
    End {
        reader: u32,
        partition: PartitionNumber,
        offset: u64,
    },
    Complete {
        reader: u32,
    },
    /// No progress within the bound, after everything was healed.
    Stuck {
        who: String,
        why: String,
    },
    Healed,
    Finish,
    Note {
        what: String,
    },
}

/// An event with its time since the start of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timed {
    pub micros: u64,
    pub event: Event,
}

pub type History = Vec<Timed>;

/// Reads a history to its end.
pub fn read(lines: impl BufRead) -> anyhow::Result<History> {
    let mut history = History::new();
    for (number, line) in (1..).zip(lines.lines()) {
        let line = line?;
        let parsed = parse(&line)
            .map_err(|why| anyhow::anyhow!("line {number} of the history: {why}: {line:.200}"))?;
        if history
            .last()
            .is_some_and(|before: &Timed| before.micros > parsed.micros)
        {
            anyhow::bail!("line {number} of the history goes back in time: {line:.200}");
        }
        history.push(parsed);
    }
    Ok(history)
}

fn parse(line: &str) -> Result<Timed, String> {
    let fields: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let fields = Fields(&fields);
    let event = event(&fields)?;
    Ok(Timed {
        micros: fields.number("t")?,
        event,
    })
}

struct Fields<'a>(&'a Value);

impl Fields<'_> {
    fn number<T: TryFrom<u64>>(&self, name: &str) -> Result<T, String> {
        self.0[name]
            .as_u64()
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| format!("{name} is not a number in range"))
    }

    fn text(&self, name: &str) -> Result<String, String> {
        self.0[name]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| format!("{name} is not a text"))
    }

    fn value(&self) -> Result<WrittenValue, String> {
        Ok(WrittenValue {
            client: self.number("c")?,
            sequence: self.number("s")?,
        })
    }

    /// "v": client and sequence of each value, in turn.
    fn values(&self) -> Result<Vec<WrittenValue>, String> {
        let list = self.0["v"].as_array().ok_or("v is not a list")?;
        let number = |value: &Value| {
            let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
            number.ok_or("v holds something else than numbers in range")
        };
        let pairs = list.chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return Err("v holds half a value".to_owned());
        }
        pairs
            .map(|pair| {
                Ok(WrittenValue {
                    client: number(&pair[0])?,
                    sequence: number(&pair[1])?,
                })
            })
            .collect()
    }
}

fn mode(name: &str) -> Result<Mode, String> {
    match name {
        "idempotent" => Ok(Mode::Idempotent),
        "retry" => Ok(Mode::Retry),
        "once" => Ok(Mode::Once),
        other => Err(format!("unknown mode {other}")),
    }
}

fn event(fields: &Fields<'_>) -> Result<Event, String> {
    let kind = fields.text("e")?;
    let partition = || fields.number("p");
    let reader = || fields.number("r");
    let offset = || fields.number("o");
    let key = || fields.number("k");
    Ok(match kind.as_str() {
        "partition" => Event::Partition {
            partition: partition()?,
            name: format!(
                "{}-{}",
                fields.text("topic")?,
                fields.number::<u64>("partition")?
            ),
        },
        "client" => Event::Client {
            client: fields.number("c")?,
            mode: mode(&fields.text("mode")?)?,
        },
        "send" | "ok" | "fail" | "unknown" => return outcome(&kind, fields),
        "reader" => Event::Reader {
            reader: reader()?,
            kind: fields.text("kind")?,
        },
        "seek" => Event::Seek {
            reader: reader()?,
            partition: partition()?,
            offset: offset()?,
        },
        "poll" => Event::Poll {
            reader: reader()?,
            partition: partition()?,
            offset: offset()?,
            values: fields.values()?,
        },
        "corrupt" => Event::Corrupt {
            reader: reader()?,
            partition: partition()?,
            offset: offset()?,
            why: fields.text("why")?,
        },
        "error" => Event::Error {
            reader: reader()?,
            why: fields.text("why")?,
        },
        "assign" => Event::Assign {
            reader: reader()?,
            partition: partition()?,
        },
        "revoke" => Event::Revoke {
            reader: reader()?,
            partition: partition()?,
        },
        "gone" => Event::Gone { reader: reader()? },
        "commit" => Event::Commit {
            key: key()?,
            reader: reader()?,
            partition: partition()?,
            offset: offset()?,
        },
        "committed" => Event::Committed { key: key()? },
        "uncommitted" => Event::Uncommitted {
            key: key()?,
            why: fields.text("why")?,
        },
        "ask" => Event::Ask { key: key()? },
        "watermark" => Event::Watermark {
            key: key()?,
            partition: partition()?,
            epoch: fields.0["epoch"].as_i64().ok_or("epoch is not a number")?,
            offset: offset()?,
        },
        "position" => Event::Position {
            key: key()?,
            partition: partition()?,
            offset: offset()?,
        },
        "readback" => Event::ReadBack {
            reader: reader()?,
            what: fields.text("what")?,
        },
        "end" => Event::End {
            reader: reader()?,
            partition: partition()?,
            offset: offset()?,
        },
        "complete" => Event::Complete { reader: reader()? },
        "stuck" => Event::Stuck {
            who: fields.text("who")?,
            why: fields.text("why")?,
        },
        "healed" => Event::Healed,
        "finish" => Event::Finish,
        "note" => Event::Note {
            what: fields.text("what")?,
        },
        other => return Err(format!("unknown event {other}")),
    })
}

fn outcome(kind: &str, fields: &Fields<'_>) -> Result<Event, String> {
    let (partition, value) = (fields.number("p")?, fields.value()?);
    Ok(match kind {
        "send" => Event::Send { partition, value },
        "ok" => Event::Ok {
            partition,
            value,
            offset: fields.number("o").ok(),
        },
        "fail" => Event::Fail {
            partition,
            value,
            why: fields.text("why")?,
        },
        _ => Event::Unknown {
            partition,
            value,
            why: fields.text("why")?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_as_the_workload_writes_them() {
        let text = concat!(
            r#"{"t":1,"e":"partition","p":4,"topic":"a","partition":3}"#,
            "\n",
            r#"{"t":2,"e":"client","c":7,"mode":"once"}"#,
            "\n",
            r#"{"t":2,"e":"ok","c":7,"p":4,"s":9,"o":-1}"#,
            "\n",
            r#"{"t":3,"e":"poll","r":2,"p":4,"o":5,"v":[7,9,7,10]}"#,
            "\n",
        );
        let events: Vec<Event> = read(text.as_bytes())
            .unwrap()
            .into_iter()
            .map(|timed| timed.event)
            .collect();
        let value = |sequence| WrittenValue {
            client: 7,
            sequence,
        };
        assert_eq!(
            events,
            [
                Event::Partition {
                    partition: 4,
                    name: "a-3".to_owned()
                },
                Event::Client {
                    client: 7,
                    mode: Mode::Once
                },
                Event::Ok {
                    partition: 4,
                    value: value(9),
                    offset: None
                },
                Event::Poll {
                    reader: 2,
                    partition: 4,
                    offset: 5,
                    values: vec![value(9), value(10)]
                },
            ]
        );
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for bad in [
            r#"{"t":1,"e":"something"}"#,
            r#"{"t":1,"e":"poll","r":2,"p":4,"o":5,"v":[7]}"#,
            r#"{"t":1,"e":"send","c":-1,"p":0,"s":0}"#,
            r#"{"t":1,"e":"send""#,
            "{\"t\":2,\"e\":\"healed\"}\n{\"t\":1,\"e\":\"healed\"}",
        ] {
            assert!(read(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
