//! The ends of a simulated connection, as the two processes hold them.
//!
//! Invariant: an end that is dropped hangs up, whoever drops it.

use std::future::poll_fn;
use std::task::Poll;

use chronik_broker::peers::{ConnectError, Connector, FrameStream, Frames, LinkTiming, Peers};
use chronik_proto::v1::PeerFrame;
use chronik_types::id::BrokerId;
use futures::StreamExt;
use futures::future::BoxFuture;
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Call, Inner, Network, Packet, Received, WINDOW_BYTES};

/// One process's end of a connection.
pub struct End {
    pub(super) port: Port,
    pub(super) inbound: mpsc::UnboundedReceiver<Received>,
    pub(super) hang_up: HangUp,
}

#[derive(Clone)]
pub(super) struct Port {
    pub(super) network: Network,
    pub(super) connection: u64,
    pub(super) side: usize,
    pub(super) broken: CancellationToken,
}

pub(super) struct HangUp(pub(super) Port);

impl End {
    /// Serves the peer that has called.
    pub fn serve(self, peers: &Peers) {
        let (inbound, port) = self.split();
        tokio::spawn(port.pump(peers.accept(inbound)));
    }

    fn split(self) -> (Frames, Port) {
        let state = (self.inbound, self.hang_up);
        let frames = futures::stream::unfold(state, |(mut inbound, hang_up)| async move {
            let received = inbound.recv().await?;
            Some((received, (inbound, hang_up)))
        });
        (frames.boxed(), self.port)
    }
}

impl Port {
    async fn pump(self, mut outbound: FrameStream) {
        loop {
            let sent = async {
                match outbound.next().await {
                    Some(frame) => self.send(frame).await,
                    None => false,
                }
            };
            let goes_on = tokio::select! {
                biased;
                () = self.broken.cancelled() => false,
                sent = sent => sent,
            };
            if !goes_on {
                break;
            }
        }
        let mut inner = self.network.lock();
        self.close_locked(&mut inner);
    }

    /// Waits for room. False: the connection is gone.
    async fn send(&self, frame: PeerFrame) -> bool {
        let bytes = frame.encode_to_vec();
        let has_room = poll_fn(|context| {
            let mut inner = self.network.lock();
            let Some(connection) = inner.connections.get_mut(&self.connection) else {
                return Poll::Ready(false);
            };
            let there = &mut connection.sides[1 - self.side];
            if there.travelling_bytes >= WINDOW_BYTES {
                there.writer = Some(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(true)
        });
        let has_room = has_room.await;
        if has_room {
            let mut inner = self.network.lock();
            inner.send(self.connection, 1 - self.side, Packet::Frame(bytes));
        }
        has_room
    }

    /// The process lets go of its end; the other side hears of it.
    fn close_locked(&self, inner: &mut Inner) {
        let Some(connection) = inner.connections.get_mut(&self.connection) else {
            return;
        };
        let side = &mut connection.sides[self.side];
        side.broken.cancel();
        if side.inbound.take().is_some() && !side.is_forgotten {
            inner.send(self.connection, 1 - self.side, Packet::Reset);
        }
    }
}

impl Drop for HangUp {
    fn drop(&mut self) {
        let mut inner = self.0.network.0.lock().unwrap();
        self.0.close_locked(&mut inner);
    }
}

/// Makes connections for one broker.
pub(super) struct Caller {
    pub(super) network: Network,
    pub(super) from: BrokerId,
}

impl Connector for Caller {
    fn connect(
        &self,
        address: &str,
        _timing: LinkTiming,
        outbound: FrameStream,
    ) -> BoxFuture<'static, Result<Frames, ConnectError>> {
        let to = BrokerId(address.parse().unwrap());
        let (reply, answer) = oneshot::channel();
        let mut inner = self.network.lock();
        let way = inner.latency_ms(self.from, to) + inner.latency_ms(to, self.from);
        let call = Call {
            from: self.from,
            to,
            at_ms: inner.now_ms + way,
            reply,
        };
        inner.calls.push(call);
        drop(inner);
        Box::pin(async move {
            let gone = |_| ConnectError::Connect("the network is gone".to_owned());
            let (inbound, port) = answer.await.map_err(gone)??.split();
            tokio::spawn(port.pump(outbound));
            Ok(inbound)
        })
    }
}
