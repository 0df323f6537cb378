//! The ways between the brokers, each of which a test may cut in either direction.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use chronik_proto::v1;
use chronik_proto::v1::peers_client::PeersClient;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, Stream, StreamExt, unfold};
use tokio::sync::watch;
use tonic::Status;

use crate::peers::{ConnectError, Connector, FrameStream, Frames, LinkTiming};

/// From one broker to another.
pub type Way = (i32, i32);

/// Which ways are cut; bytes on a cut way wait, as they do while a network loses them.
#[derive(Clone)]
pub struct Ways {
    cut: Arc<watch::Sender<BTreeSet<Way>>>,
    brokers: Arc<Mutex<BTreeMap<SocketAddr, i32>>>,
}

impl Default for Ways {
    fn default() -> Self {
        Ways {
            cut: Arc::new(watch::Sender::new(BTreeSet::new())),
            brokers: Arc::default(),
        }
    }
}

impl Ways {
    pub fn add(&self, broker: i32, address: SocketAddr) {
        self.brokers.lock().unwrap().insert(address, broker);
    }

    pub fn connector(&self, from: i32) -> Arc<dyn Connector> {
        Arc::new(CuttableConnector {
            ways: self.clone(),
            from,
        })
    }

    pub fn cut(&self, ways: &[Way]) {
        self.cut.send_modify(|cut| cut.extend(ways));
    }

    pub fn heal(&self) {
        self.cut.send_modify(BTreeSet::clear);
    }

    /// `stream` as it arrives over the way.
    fn gate<T: Send + 'static>(
        &self,
        stream: BoxStream<'static, T>,
        way: Way,
    ) -> BoxStream<'static, T> {
        let state = (stream, self.cut.subscribe());
        let gated = unfold(state, move |(mut stream, cut)| async move {
            let item = stream.next().await?;
            until_open(cut.clone(), vec![way]).await;
            Some((item, (stream, cut)))
        });
        gated.boxed()
    }
}

/// Waits until none of the ways is cut.
fn until_open(mut cut: watch::Receiver<BTreeSet<Way>>, ways: Vec<Way>) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        while ways.iter().any(|way| cut.borrow_and_update().contains(way)) {
            if cut.changed().await.is_err() {
                return;
            }
        }
    })
}

/// What goes out over a way that may be cut.
struct Outbound(BoxStream<'static, v1::PeerFrame>);

impl Stream for Outbound {
    type Item = v1::PeerFrame;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<v1::PeerFrame>> {
        self.0.poll_next_unpin(context)
    }
}

struct CuttableConnector {
    ways: Ways,
    from: i32,
}

impl Connector for CuttableConnector {
    fn connect(
        &self,
        address: &str,
        _timing: LinkTiming,
        outbound: FrameStream,
    ) -> BoxFuture<'static, Result<Frames, ConnectError>> {
        let (ways, from, address) = (self.ways.clone(), self.from, address.to_owned());
        Box::pin(async move {
            let to = {
                let socket: SocketAddr = address.parse().expect("an address with a number");
                let known = ways.brokers.lock().unwrap().get(&socket).copied();
                known.unwrap_or_default()
            };
            // Packets of the handshake go both ways.
            until_open(ways.cut.subscribe(), vec![(from, to), (to, from)]).await;
            let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| ConnectError::Address(error.to_string()))?
                .connect()
                .await
                // Brokers only die where a test kills them, and that is not told apart here.
                .map_err(|_| ConnectError::Refused)?;
            let outbound = Outbound(ways.gate(outbound.boxed(), (from, to)));
            let response = PeersClient::new(channel).exchange(outbound).await;
            let inbound =
                response.map_err(|status: Status| ConnectError::Stream(Box::new(status)))?;
            Ok(ways.gate(inbound.into_inner().boxed(), (to, from)))
        })
    }
}

pub fn both_ways(one: i32, others: &[i32]) -> Vec<Way> {
    others
        .iter()
        .flat_map(|other| [(one, *other), (*other, one)])
        .collect()
}
