//! A replicated log in memory, for tests of the coordinator: several replicas see the same records,
//! at most one leads, and appends can be made to fail as real ones do.

use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{BatchHeader, stamp};
use tokio::sync::{Semaphore, watch};

use super::log::{AppendError, GroupLog, ReadError, led_epoch};
use crate::replica::Leadership;

/// What happens to the next append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Appended and committed, but nobody says so.
    UnknownAppended,
    /// Not appended, and nobody says so.
    UnknownLost,
    Refused,
}

#[derive(Default)]
struct Records {
    batches: Vec<Bytes>,
    end: Offset,
    fault: Option<Fault>,
}

/// One replica of the log. Clones are the same replica.
#[derive(Clone)]
pub struct MemoryLog {
    records: Arc<Mutex<Records>>,
    leadership: Arc<watch::Sender<Leadership>>,
    /// A permit per allowed call; thousands unless a test takes them away.
    appends: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

const MANY: usize = 1 << 20;

impl MemoryLog {
    /// A replica of a new log; nobody leads.
    pub fn new() -> MemoryLog {
        MemoryLog {
            records: Arc::default(),
            leadership: Arc::new(watch::channel(Leadership::default()).0),
            appends: Arc::new(Semaphore::new(MANY)),
            reads: Arc::new(Semaphore::new(MANY)),
        }
    }

    /// Another replica of the same log.
    pub fn replica(&self) -> MemoryLog {
        MemoryLog {
            records: self.records.clone(),
            ..MemoryLog::new()
        }
    }

    pub fn lead(&self, epoch: i32) {
        self.leadership.send_replace(Leadership {
            leader_epoch: LeaderEpoch(epoch),
            is_leader: true,
            ready: true,
            ..Leadership::default()
        });
    }

    pub fn follow(&self) {
        self.leadership.send_replace(Leadership::default());
    }

    pub fn fail_next(&self, fault: Fault) {
        self.records.lock().unwrap().fault = Some(fault);
    }

    pub fn hold_appends(&self) {
        self.appends.forget_permits(MANY);
    }

    pub fn release_appends(&self) {
        self.appends.add_permits(MANY);
    }

    pub fn hold_reads(&self) {
        self.reads.forget_permits(MANY);
    }

    pub fn release_reads(&self) {
        self.reads.add_permits(MANY);
    }

    pub fn batches(&self) -> Vec<Bytes> {
        self.records.lock().unwrap().batches.clone()
    }

    /// Puts bytes into the log as if another program had written them.
    pub fn push(&self, batch: Bytes, epoch: i32) -> Offset {
        let mut records = self.records.lock().unwrap();
        let base = records.end;
        let mut batch = BytesMut::from(&batch[..]);
        stamp(&mut batch, base, LeaderEpoch(epoch));
        records.end = BatchHeader::parse(&batch).unwrap().next_offset();
        records.batches.push(batch.freeze());
        base
    }
}

impl GroupLog for MemoryLog {
    async fn append(&self, epoch: LeaderEpoch, records: Bytes) -> Result<Offset, AppendError> {
        let permit = self.appends.acquire().await.unwrap();
        drop(permit);
        if led_epoch(&self.leadership.borrow()) != Some(epoch) {
            return Err(AppendError::NotLeader);
        }
        let fault = self.records.lock().unwrap().fault.take();
        match fault {
            Some(Fault::Refused) => Err(AppendError::Refused("by the test".to_owned())),
            Some(Fault::UnknownLost) => Err(AppendError::Unknown),
            Some(Fault::UnknownAppended) => {
                self.push(records, epoch.0);
                Err(AppendError::Unknown)
            }
            None => Ok(self.push(records, epoch.0)),
        }
    }

    async fn read_committed(
        &self,
        from: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        drop(self.reads.acquire().await.unwrap());
        let mut size = 0;
        let mut found = Vec::new();
        for batch in &self.records.lock().unwrap().batches {
            if BatchHeader::parse(batch).unwrap().next_offset() <= from {
                continue;
            }
            if !found.is_empty() && size + batch.len() > max_bytes {
                break;
            }
            size += batch.len();
            found.push(batch.clone());
        }
        Ok(found)
    }

    fn log_start_offset(&self) -> Offset {
        Offset::ZERO
    }

    fn high_watermark(&self) -> Offset {
        self.records.lock().unwrap().end
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }
}
