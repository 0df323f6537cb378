//! Rebuilds a log's state from the records of the WAL, on top of what the checkpoint says.
//!
//! Invariant: replay gives exactly the state that the same operations gave before the crash. An entry
//! that is in segments already is skipped, so replaying twice changes nothing.

use bytes::Bytes;
use chronik_types::offset::Offset;

use super::state::{LogState, TailEntry};
use super::write::check_batches;
use crate::entry::{LogEntry, Payload};
use crate::wal::Action;

/// A log while the WAL is being read.
#[derive(Debug, Default)]
pub struct Replay {
    pub state: LogState,
    /// What cannot be true of this log, unless it turns out that it was deleted later: the WAL may
    /// still have the later records of a deleted log but not its first ones.
    pub damage: Option<String>,
}

impl Replay {
    /// Applies one record of the group. Not for `Delete` and `Mark`.
    pub fn apply(&mut self, record_number: u64, file_sequence: u64, action: Action) {
        if record_number < self.state.replay_from_record || self.damage.is_some() {
            return;
        }
        match action {
            Action::Entries {
                relocated,
                committed_next,
                entries,
            } => {
                for entry in entries {
                    if let Err(damage) = self.entry(relocated, file_sequence, entry) {
                        self.damage = Some(damage);
                        return;
                    }
                }
                self.state.committed_next = self.state.committed_next.max(committed_next);
            }
            Action::Vote(vote) => self.state.vote = Some(Bytes::copy_from_slice(&vote)),
            Action::Truncate { next } => {
                let next = next
                    .max(self.state.flushed_next)
                    .max(self.state.first_index);
                self.state.cut(next);
            }
            Action::Delete | Action::Mark => {}
        }
    }

    fn entry(&mut self, relocated: bool, file: u64, entry: LogEntry) -> Result<(), String> {
        let state = &mut self.state;
        let (index, next_index) = (entry.index, state.next_index());
        if index < state.flushed_next {
            return Ok(());
        }
        if state.is_empty() {
            let committed_next = state.committed_next;
            state.start_at(index);
            state.committed_next = committed_next;
        } else if index > next_index {
            return Err(format!("entry {index} follows where {next_index} is due"));
        } else if index < next_index {
            if relocated && state.term_at(index) == Some(entry.term) {
                return Ok(());
            }
            return Err(format!("entry {index} is there twice"));
        }
        let mut next_offset = state.log_end_offset();
        let payload = match entry.payload {
            Payload::Blank => Payload::Blank,
            // Copied, so that an entry does not keep the whole frame in memory.
            Payload::Membership(bytes) => Payload::Membership(Bytes::copy_from_slice(&bytes)),
            Payload::Batches {
                bytes,
                base_offset,
                next_offset: next,
            } => {
                if base_offset != next_offset {
                    return Err(format!(
                        "entry {index} has offset {base_offset}, not {next_offset}"
                    ));
                }
                check_batches(&bytes, base_offset, next)?;
                next_offset = next;
                let bytes = Bytes::copy_from_slice(&bytes);
                Payload::Batches {
                    bytes,
                    base_offset,
                    next_offset,
                }
            }
        };
        let entry = LogEntry {
            index,
            term: entry.term,
            payload,
        };
        state.push(TailEntry { entry, next_offset });
        state.made_durable(index, index + 1, file);
        Ok(())
    }

    /// To be called after the last record.
    pub fn finish(self) -> Result<LogState, String> {
        if let Some(damage) = self.damage {
            return Err(damage);
        }
        let mut state = self.state;
        state.committed_next = state
            .committed_next
            .max(state.flushed_next)
            .clamp(state.first_index, state.next_index());
        debug_assert!(state.tail_base >= Offset::ZERO);
        state.advance_ready();
        Ok(state)
    }
}
