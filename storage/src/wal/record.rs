//! Records of the write-ahead log: what happened to one group's log, in order.
//!
//! Invariant: whatever `decode` accepts, `Record` could have written; any other bytes are refused
//! with a reason. Frames carry the checksum, so records have none of their own.

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

use crate::codec::Reader;
use crate::entry::{LogEntry, Payload, Purged};

const KIND_APPEND: u8 = 1;
const KIND_RELOCATED: u8 = 2;
const KIND_VOTE: u8 = 3;
const KIND_TRUNCATE: u8 = 4;
const KIND_DELETE: u8 = 5;
const KIND_MARK: u8 = 6;
const KIND_PURGE: u8 = 7;
const KIND_LOG_START: u8 = 8;
const KIND_REPLACE: u8 = 9;
const KIND_INSTALL: u8 = 10;

const PAYLOAD_BLANK: u8 = 0;
const PAYLOAD_MEMBERSHIP: u8 = 1;
const PAYLOAD_BATCHES: u8 = 2;
const PAYLOAD_CONTROL: u8 = 3;

/// Payloads below this size are copied next to their header: one more part in the write costs more.
const COPY_BELOW_BYTES: usize = 1024;
/// Least bytes of an entry, to bound what a count from disk may reserve.
const ENTRY_HEADER_BYTES: usize = 21;

/// A record ready to be written. Large payloads are shared, not copied.
#[derive(Debug)]
pub struct Record {
    head: Vec<u8>,
    /// Payloads, each with the position in `head` that it comes before.
    payloads: Vec<(usize, Bytes)>,
    size_bytes: usize,
}

/// A record as read back. Payloads share the frame's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    pub group: RaftGroupId,
    pub action: Action,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// `committed_next`: entries below it were known to be committed when this was written.
    /// `relocated`: the entries were written before, and their first place is about to be recycled.
    Entries {
        relocated: bool,
        committed_next: u64,
        entries: Vec<LogEntry>,
    },
    Vote(Bytes),
    /// Entries from `next` on are removed.
    Truncate {
        next: u64,
    },
    Delete,
    /// Says nothing; it starts a new file.
    Mark,
    /// Entries up to this one are hidden from Raft; with a state of the replica that is not older.
    Purge {
        purged: Purged,
        state_index: u64,
        state: Bytes,
    },
    LogStart(Offset),
    /// Segments took the place of others; encoded as compaction does it.
    Replace(Bytes),
    /// The log's whole content was replaced; encoded as in a checkpoint.
    Install(Bytes),
}

impl Record {
    pub fn entries<'a>(
        group: RaftGroupId,
        relocated: bool,
        committed_next: u64,
        entries: impl ExactSizeIterator<Item = &'a LogEntry>,
    ) -> Record {
        let kind = if relocated {
            KIND_RELOCATED
        } else {
            KIND_APPEND
        };
        let mut record = Record::start(kind, group);
        record.head.extend_from_slice(&committed_next.to_le_bytes());
        // An append is refused above 1 GiB, and an entry takes more than one byte.
        record
            .head
            .extend_from_slice(&(entries.len() as u32).to_le_bytes());
        for entry in entries {
            record.push_entry(entry);
        }
        record.finish()
    }

    pub fn vote(group: RaftGroupId, vote: &[u8]) -> Record {
        let mut record = Record::start(KIND_VOTE, group);
        record
            .head
            .extend_from_slice(&(vote.len() as u32).to_le_bytes());
        record.head.extend_from_slice(vote);
        record.finish()
    }

    pub fn truncate(group: RaftGroupId, next: u64) -> Record {
        let mut record = Record::start(KIND_TRUNCATE, group);
        record.head.extend_from_slice(&next.to_le_bytes());
        record.finish()
    }

    pub fn delete(group: RaftGroupId) -> Record {
        Record::start(KIND_DELETE, group).finish()
    }

    pub fn purge(group: RaftGroupId, purged: Purged, state_index: u64, state: &Bytes) -> Record {
        let mut record = Record::start(KIND_PURGE, group);
        for number in [purged.index, purged.term] {
            record.head.extend_from_slice(&number.to_le_bytes());
        }
        let offset = purged.next_offset.0;
        record.head.extend_from_slice(&offset.to_le_bytes());
        record.head.extend_from_slice(&state_index.to_le_bytes());
        record.push_sized(state);
        record.finish()
    }

    pub fn log_start(group: RaftGroupId, offset: Offset) -> Record {
        let mut record = Record::start(KIND_LOG_START, group);
        record.head.extend_from_slice(&offset.0.to_le_bytes());
        record.finish()
    }

    pub fn replace(group: RaftGroupId, body: &Bytes) -> Record {
        let mut record = Record::start(KIND_REPLACE, group);
        record.push_sized(body);
        record.finish()
    }

    pub fn install(group: RaftGroupId, body: &Bytes) -> Record {
        let mut record = Record::start(KIND_INSTALL, group);
        record.push_sized(body);
        record.finish()
    }

    pub fn mark() -> Record {
        Record::start(KIND_MARK, RaftGroupId(0)).finish()
    }

    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    /// The record's bytes in order, in as few parts as there are without copying.
    pub fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let mut next = 0;
        let mut from = 0;
        let mut payload_is_due = false;
        std::iter::from_fn(move || {
            if payload_is_due {
                payload_is_due = false;
                next += 1;
                return Some(&self.payloads[next - 1].1[..]);
            }
            match self.payloads.get(next) {
                Some((position, _)) => {
                    payload_is_due = true;
                    let part = &self.head[from..*position];
                    from = *position;
                    Some(part)
                }
                None if from < self.head.len() => {
                    let part = &self.head[from..];
                    from = self.head.len();
                    Some(part)
                }
                None => None,
            }
        })
    }

    fn start(kind: u8, group: RaftGroupId) -> Record {
        let mut head = Vec::with_capacity(64);
        head.push(kind);
        head.extend_from_slice(&group.0.to_le_bytes());
        Record {
            head,
            payloads: Vec::new(),
            size_bytes: 0,
        }
    }

    fn finish(mut self) -> Record {
        let payloads: usize = self.payloads.iter().map(|(_, bytes)| bytes.len()).sum();
        self.size_bytes = self.head.len() + payloads;
        self
    }

    fn push_sized(&mut self, bytes: &Bytes) {
        // What is pushed is bounded far below 4 GiB by those who make it.
        let length = bytes.len() as u32;
        self.head.extend_from_slice(&length.to_le_bytes());
        self.push_bytes(bytes);
    }

    fn push_bytes(&mut self, bytes: &Bytes) {
        if bytes.len() >= COPY_BELOW_BYTES {
            self.payloads.push((self.head.len(), bytes.clone()));
        } else {
            self.head.extend_from_slice(bytes);
        }
    }

    fn push_entry(&mut self, entry: &LogEntry) {
        let (kind, bytes) = match &entry.payload {
            Payload::Blank => (PAYLOAD_BLANK, None),
            Payload::Control(bytes) => (PAYLOAD_CONTROL, Some(bytes)),
            Payload::Membership(bytes) => (PAYLOAD_MEMBERSHIP, Some(bytes)),
            Payload::Batches { bytes, .. } => (PAYLOAD_BATCHES, Some(bytes)),
        };
        self.head.push(kind);
        self.head.extend_from_slice(&entry.index.to_le_bytes());
        self.head.extend_from_slice(&entry.term.to_le_bytes());
        let length = bytes.map_or(0, Bytes::len) as u32;
        self.head.extend_from_slice(&length.to_le_bytes());
        if let Payload::Batches {
            base_offset,
            next_offset,
            ..
        } = &entry.payload
        {
            self.head.extend_from_slice(&base_offset.0.to_le_bytes());
            self.head.extend_from_slice(&next_offset.0.to_le_bytes());
        }
        if let Some(bytes) = bytes {
            self.push_bytes(bytes);
        }
    }
}

/// Decodes all records of a frame's body.
pub fn decode(body: &Bytes) -> Result<Vec<Decoded>, &'static str> {
    let mut reader = Reader::new(body);
    let mut records = Vec::new();
    while !reader.is_at_end() {
        records.push(decode_record(&mut reader, body)?);
    }
    Ok(records)
}

fn decode_record(reader: &mut Reader<'_>, body: &Bytes) -> Result<Decoded, &'static str> {
    const SHORT: &str = "record is cut short";
    let kind = reader.u8().ok_or(SHORT)?;
    let group = RaftGroupId(reader.u64().ok_or(SHORT)?);
    let action = match kind {
        KIND_APPEND | KIND_RELOCATED => {
            let committed_next = reader.u64().ok_or(SHORT)?;
            let count = reader.u32().ok_or(SHORT)? as usize;
            if count > body.len() / ENTRY_HEADER_BYTES {
                return Err("record has more entries than bytes");
            }
            let mut entries = Vec::with_capacity(count);
            for _ in 0..count {
                entries.push(decode_entry(reader, body)?);
            }
            Action::Entries {
                relocated: kind == KIND_RELOCATED,
                committed_next,
                entries,
            }
        }
        KIND_VOTE => {
            let length = reader.u32().ok_or(SHORT)? as usize;
            Action::Vote(body.slice_ref(reader.take(length).ok_or(SHORT)?))
        }
        KIND_TRUNCATE => Action::Truncate {
            next: reader.u64().ok_or(SHORT)?,
        },
        KIND_DELETE => Action::Delete,
        KIND_MARK => Action::Mark,
        KIND_PURGE => Action::Purge {
            purged: Purged {
                index: reader.u64().ok_or(SHORT)?,
                term: reader.u64().ok_or(SHORT)?,
                next_offset: Offset(reader.i64().ok_or(SHORT)?),
            },
            state_index: reader.u64().ok_or(SHORT)?,
            state: decode_sized(reader, body).ok_or(SHORT)?,
        },
        KIND_LOG_START => Action::LogStart(Offset(reader.i64().ok_or(SHORT)?)),
        KIND_REPLACE => Action::Replace(decode_sized(reader, body).ok_or(SHORT)?),
        KIND_INSTALL => Action::Install(decode_sized(reader, body).ok_or(SHORT)?),
        _ => return Err("record is of an unknown kind"),
    };
    Ok(Decoded { group, action })
}

fn decode_sized(reader: &mut Reader<'_>, body: &Bytes) -> Option<Bytes> {
    let length = reader.u32()? as usize;
    Some(body.slice_ref(reader.take(length)?))
}

fn decode_entry(reader: &mut Reader<'_>, body: &Bytes) -> Result<LogEntry, &'static str> {
    const SHORT: &str = "entry is cut short";
    let kind = reader.u8().ok_or(SHORT)?;
    let index = reader.u64().ok_or(SHORT)?;
    let term = reader.u64().ok_or(SHORT)?;
    let length = reader.u32().ok_or(SHORT)? as usize;
    let offsets = match kind {
        PAYLOAD_BATCHES => Some((reader.i64().ok_or(SHORT)?, reader.i64().ok_or(SHORT)?)),
        _ => None,
    };
    let bytes = body.slice_ref(reader.take(length).ok_or(SHORT)?);
    let payload = match (kind, offsets) {
        (PAYLOAD_BLANK, _) => Payload::Blank,
        (PAYLOAD_MEMBERSHIP, _) => Payload::Membership(bytes),
        (PAYLOAD_CONTROL, _) => Payload::Control(bytes),
        (PAYLOAD_BATCHES, Some((base, next))) => Payload::Batches {
            bytes,
            base_offset: Offset(base),
            next_offset: Offset(next),
        },
        _ => return Err("entry is of an unknown kind"),
    };
    Ok(LogEntry {
        index,
        term,
        payload,
    })
}

#[cfg(test)]
#[path = "record_test.rs"]
mod tests;
