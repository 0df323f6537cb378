//! What a leader sends is held back here while the disk has no room for it.
//!
//! Invariant: batches reach Raft only if the disk has room for them. From then on they are appended whatever
//! is left: an instance that waited for the disk in the middle of an append could not even vote.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use chronik_storage::PartitionLog;
use futures::stream::{BoxStream, StreamExt};
use futures::{FutureExt, ready};
use openraft::entry::EntryPayload;
use tokio::time::{Instant, Sleep};

use super::raft_config::{AppendRequest, EntryData};

const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const WARN_INTERVAL: Duration = Duration::from_secs(10);
/// Requests that are taken in while the first of them waits: more than the leader's window has, which bounds
/// their bytes (`peers/link.rs`).
const HELD_MAX: usize = 16;

/// The requests of one session, in their order.
pub struct Requests {
    source: BoxStream<'static, AppendRequest>,
    /// Taken from `source` and not given to Raft.
    held: VecDeque<AppendRequest>,
    log: PartitionLog,
    wait: Option<Wait>,
}

struct Wait {
    retry: Pin<Box<Sleep>>,
    warn_at: Instant,
}

impl Requests {
    pub fn new(source: BoxStream<'static, AppendRequest>, log: PartitionLog) -> Requests {
        Requests {
            source,
            held: VecDeque::new(),
            log,
            wait: None,
        }
    }

    /// Gives the next one back, which nobody took.
    pub fn put_back(&mut self, request: AppendRequest) {
        self.held.push_front(request);
    }

    /// The next one, when there is room for it. None: the leader has ended the session; what it sent and
    /// was not taken is forgotten, as it was not answered.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<AppendRequest>> {
        if self.held.is_empty() {
            match ready!(self.source.poll_next_unpin(context)) {
                Some(request) => self.held.push_back(request),
                None => return Poll::Ready(None),
            }
        }
        if self.poll_room(context).is_ready() {
            return Poll::Ready(self.held.pop_front());
        }
        // It may take long; the end of the session is noticed all the same.
        while self.held.len() < HELD_MAX {
            match ready!(self.source.poll_next_unpin(context)) {
                Some(request) => self.held.push_back(request),
                None => {
                    self.held.clear();
                    return Poll::Ready(None);
                }
            }
        }
        Poll::Pending
    }

    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let bytes = self.held.front().map_or(0, batch_bytes);
        loop {
            if let Some(wait) = &mut self.wait {
                ready!(wait.retry.poll_unpin(context));
            }
            // What keeps the cluster together is little, and has its place in the reserve.
            let checked = match bytes {
                0 => Ok(()),
                _ => self.log.check_room_to_follow(bytes),
            };
            let Err(error) = checked else {
                self.wait = None;
                return Poll::Ready(());
            };
            let now = Instant::now();
            let wait = self.wait.get_or_insert_with(|| Wait {
                retry: Box::pin(tokio::time::sleep(RETRY_INTERVAL)),
                warn_at: now + WARN_INTERVAL,
            });
            if now >= wait.warn_at {
                let raft_group_id = self.log.group_id();
                tracing::warn!(%raft_group_id, %error, "records from the leader wait for room on the disk");
                wait.warn_at = now + WARN_INTERVAL;
            }
            wait.retry.as_mut().reset(now + RETRY_INTERVAL);
        }
    }
}

fn batch_bytes(request: &AppendRequest) -> usize {
    let sizes = request.entries.iter().map(|entry| match &entry.payload {
        EntryPayload::Normal(EntryData::Batches(batches)) => batches.bytes.len(),
        _ => 0,
    });
    sizes.sum()
}
