//! What waits to be written to one peer, and the stream that turns it into frames.
//!
//! Invariant: messages pushed to one lane leave in the order they were pushed; control messages go
//! ahead of bulk ones, so that a vote never waits behind megabytes of appends. When the stream is
//! dropped the queue is closed and every later push fails.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use chronik_proto::v1;
use futures::Stream;

/// Frames are cut here; one larger message goes alone.
const FRAME_SIZE_MAX: usize = 1024 * 1024;
/// Accounted for a message without payload.
const MESSAGE_OVERHEAD: usize = 64;
/// A peer that lets this many messages pile up is given up. Appends are bounded long before by the
/// windows of their sessions.
const MESSAGES_MAX: usize = 262_144;

/// The connection that the queue belonged to is gone, or the peer does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection is closed")]
pub struct Closed;

#[derive(Default)]
struct Lanes {
    control: VecDeque<v1::PeerMessage>,
    bulk: VecDeque<(v1::PeerMessage, usize)>,
    closed: bool,
    writer: Option<Waker>,
}

/// Shared by all who write to one peer, and by the one `FrameStream` that reads it.
#[derive(Default)]
pub struct FrameQueue {
    lanes: Mutex<Lanes>,
}

impl FrameQueue {
    /// A queue and its only reader.
    pub fn new() -> (Arc<FrameQueue>, FrameStream) {
        let queue = Arc::new(FrameQueue::default());
        let stream = FrameStream {
            queue: queue.clone(),
            yielded: false,
        };
        (queue, stream)
    }

    pub fn push_control(&self, message: v1::peer_message::Message) -> Result<(), Closed> {
        self.push(|lanes| {
            lanes.control.push_back(v1::PeerMessage {
                message: Some(message),
            })
        })
    }

    /// `size` is the message's payload in bytes.
    pub fn push_bulk(&self, message: v1::peer_message::Message, size: usize) -> Result<(), Closed> {
        let message = v1::PeerMessage {
            message: Some(message),
        };
        self.push(|lanes| lanes.bulk.push_back((message, size)))
    }

    fn push(&self, add: impl FnOnce(&mut Lanes)) -> Result<(), Closed> {
        let writer = {
            let mut lanes = self.lock();
            if lanes.closed {
                return Err(Closed);
            }
            add(&mut lanes);
            if lanes.control.len().saturating_add(lanes.bulk.len()) > MESSAGES_MAX {
                close(&mut lanes);
            }
            lanes.writer.take()
        };
        if let Some(writer) = writer {
            writer.wake();
        }
        Ok(())
    }

    /// Ends the stream; what was not written yet is dropped.
    pub fn close(&self) {
        let writer = {
            let mut lanes = self.lock();
            close(&mut lanes);
            lanes.writer.take()
        };
        if let Some(writer) = writer {
            writer.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn close(lanes: &mut Lanes) {
    lanes.closed = true;
    lanes.control.clear();
    lanes.bulk.clear();
}

/// The peer's ordered writer: polled by the connection itself whenever it can take more, so its
/// flow control is the queue's back-pressure, and everything ready leaves in one frame.
pub struct FrameStream {
    queue: Arc<FrameQueue>,
    /// Other tasks have had their turn since the first message came.
    yielded: bool,
}

impl Stream for FrameStream {
    type Item = v1::PeerFrame;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<v1::PeerFrame>> {
        let this = &mut *self;
        let mut lanes = this.queue.lock();
        if lanes.closed {
            return Poll::Ready(None);
        }
        if lanes.control.is_empty() && lanes.bulk.is_empty() {
            lanes.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if !this.yielded {
            // Let the tasks that are ready now add their messages: one write instead of several.
            this.yielded = true;
            drop(lanes);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        this.yielded = false;
        Poll::Ready(Some(v1::PeerFrame {
            messages: take_frame(&mut lanes),
        }))
    }
}

fn take_frame(lanes: &mut Lanes) -> Vec<v1::PeerMessage> {
    let mut messages = Vec::new();
    let mut size = 0usize;
    while size < FRAME_SIZE_MAX
        && let Some(message) = lanes.control.pop_front()
    {
        size = size.saturating_add(MESSAGE_OVERHEAD);
        messages.push(message);
    }
    while let Some((_, next)) = lanes.bulk.front() {
        let next = next.saturating_add(MESSAGE_OVERHEAD);
        if !messages.is_empty() && size.saturating_add(next) > FRAME_SIZE_MAX {
            break;
        }
        size = size.saturating_add(next);
        messages.extend(lanes.bulk.pop_front().map(|(message, _)| message));
    }
    messages
}

impl Drop for FrameStream {
    fn drop(&mut self) {
        self.queue.close();
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;
    use v1::peer_message::Message;

    fn ping(sequence: u64) -> Message {
        Message::Ping(v1::PeerPing {
            sequence,
            unanswered: false,
        })
    }

    fn close_session(session_id: u64) -> Message {
        Message::SessionClose(v1::AppendSessionClose { session_id })
    }

    #[tokio::test]
    async fn what_is_ready_leaves_in_one_frame_control_first() {
        let (queue, mut stream) = FrameQueue::new();
        queue.push_bulk(close_session(1), 10).unwrap();
        queue.push_bulk(close_session(2), 10).unwrap();
        queue.push_control(ping(3)).unwrap();
        let frame = stream.next().await.unwrap();
        let messages: Vec<_> = frame
            .messages
            .into_iter()
            .filter_map(|m| m.message)
            .collect();
        assert_eq!(messages, vec![ping(3), close_session(1), close_session(2)]);
    }

    #[tokio::test]
    async fn frames_are_cut_and_a_large_message_goes_alone() {
        let (queue, mut stream) = FrameQueue::new();
        for (id, size) in [(1, 600_000), (2, 600_000), (3, 5_000_000), (4, 1)] {
            queue.push_bulk(close_session(id), size).unwrap();
        }
        let mut counts = Vec::new();
        for _ in 0..4 {
            counts.push(stream.next().await.unwrap().messages.len());
        }
        assert_eq!(counts, vec![1, 1, 1, 1]);
    }

    #[tokio::test]
    async fn pushes_fail_once_the_stream_is_gone() {
        let (queue, stream) = FrameQueue::new();
        queue.push_control(ping(1)).unwrap();
        drop(stream);
        assert_eq!(queue.push_control(ping(2)), Err(Closed));
        assert_eq!(queue.push_bulk(close_session(1), 1), Err(Closed));
    }

    #[tokio::test]
    async fn a_peer_that_never_reads_is_given_up() {
        let (queue, _stream) = FrameQueue::new();
        let pushed =
            (0..=MESSAGES_MAX as u64 + 1).take_while(|i| queue.push_control(ping(*i)).is_ok());
        assert_eq!(pushed.count(), MESSAGES_MAX + 1);
    }
}
