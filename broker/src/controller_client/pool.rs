//! The controllers that a broker may ask, and which of them it asks now. Any controller takes any
//! call, so one that fails is simply passed over for the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chronik_proto::{HTTP2_CONNECTION_WINDOW, HTTP2_FRAME_SIZE, HTTP2_STREAM_WINDOW};
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A controller whose machine is gone is noticed by these, also on an idle watch.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Cheap to clone; all clones ask the same controller.
#[derive(Clone)]
pub struct ControllerPool {
    channels: Arc<Vec<Channel>>,
    current: Arc<AtomicUsize>,
}

/// One controller of the pool, as it was chosen for one call.
pub struct Chosen {
    index: usize,
    pub channel: Channel,
}

impl ControllerPool {
    /// Connects lazily, so the order in which processes start does not matter.
    pub fn new(addresses: &[String]) -> Result<Self, tonic::transport::Error> {
        let channels = addresses
            .iter()
            .map(|address| {
                let endpoint = Endpoint::from_shared(format!("http://{address}"))?
                    .connect_timeout(CONNECT_TIMEOUT)
                    .tcp_nodelay(true)
                    .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
                    .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
                    .keep_alive_while_idle(true)
                    .initial_stream_window_size(HTTP2_STREAM_WINDOW)
                    .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
                    .max_frame_size(HTTP2_FRAME_SIZE);
                Ok(endpoint.connect_lazy())
            })
            .collect::<Result<Vec<_>, tonic::transport::Error>>()?;
        // Brokers start with different controllers, so that watches spread over all of them.
        let first = match channels.len() {
            0 => 0,
            count => rand::random_range(0..count),
        };
        Ok(Self {
            channels: Arc::new(channels),
            current: Arc::new(AtomicUsize::new(first)),
        })
    }

    /// The controller to ask now. None where none is configured.
    pub fn choose(&self) -> Option<Chosen> {
        let index = self.current.load(Ordering::Relaxed);
        self.channels.get(index).map(|channel| Chosen {
            index,
            channel: channel.clone(),
        })
    }

    /// The chosen controller failed: ask the next one, unless somebody has moved on already.
    pub fn failed(&self, chosen: &Chosen) {
        let next = (chosen.index + 1) % self.channels.len().max(1);
        let _ =
            self.current
                .compare_exchange(chosen.index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}
