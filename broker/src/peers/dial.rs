//! Keeps one link connected: dial, say hello, ping, notice silence, dial again.
//!
//! Invariant: the published state is `Up` only while frames arrive. A refused connection is told
//! apart from all other failures, because only it proves that the peer's process is dead.

use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_types::id::BrokerId;
use futures::StreamExt;
use rand::Rng;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};
use uuid::Uuid;
use v1::peer_message::Message;

use super::connector::{ConnectError, Connector, Frames};
use super::link::Link;
use super::queue::FrameQueue;
use super::state::LinkState;

/// Timing of links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkTiming {
    /// Between two pings.
    pub ping_interval: Duration,
    /// Without any frame for this long, a connected peer is `Silent`.
    pub silence: Duration,
    pub connect_timeout: Duration,
    /// Between attempts to connect; doubles up to `redial_max`.
    pub redial_min: Duration,
    pub redial_max: Duration,
}

impl Default for LinkTiming {
    fn default() -> Self {
        Self {
            ping_interval: Duration::from_millis(400),
            silence: Duration::from_millis(1000),
            connect_timeout: Duration::from_millis(1000),
            redial_min: Duration::from_millis(50),
            redial_max: Duration::from_millis(500),
        }
    }
}

/// A silent connection is given up after this many times `silence`.
const SILENCES_MAX: u32 = 3;

/// The two brokers of a link, and the beat of its pings.
#[derive(Debug, Clone, Copy)]
pub struct Ends {
    pub from: BrokerId,
    pub incarnation: Uuid,
    /// When this broker's links began to ping.
    pub beat: Instant,
    pub to: BrokerId,
}

/// Why an attempt to connect, or a connection, ended.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("the peer closed the stream")]
    Closed,
    #[error("the peer says it is broker {0}")]
    WrongBroker(i32),
    #[error("the peer's hello is missing or not valid")]
    NoHello,
    #[error("nothing heard for {0:?}")]
    Silent(Duration),
    #[error("this broker's disk does not take its log")]
    DiskStuck,
}

/// Runs until `stop`. While this broker's disk is stuck it says nothing to the peer: what it leads would be
/// taken for led.
pub async fn dial(
    link: Arc<Link>,
    connector: Arc<dyn Connector>,
    address: String,
    ends: Ends,
    timing: LinkTiming,
    is_disk_stuck: watch::Receiver<bool>,
    stop: CancellationToken,
) {
    let is_stuck = || *is_disk_stuck.borrow();
    let work = async {
        let mut wait = timing.redial_min;
        loop {
            let started = Instant::now();
            let connection = match is_stuck() {
                true => Err(DialError::DiskStuck),
                false => connect(&*connector, &address, ends, timing).await,
            };
            let error = match connection {
                Ok(connection) => {
                    info!(peer = ends.to.0, address, "connected to a peer");
                    wait = timing.redial_min;
                    let error = run(&link, connection, ends, timing, is_stuck).await;
                    link.disconnected();
                    link.set_state(LinkState::Connecting);
                    info!(peer = ends.to.0, error = %error, "lost the connection to a peer");
                    if started.elapsed() > timing.redial_max {
                        // Try again at once: whether that is refused tells if the peer is dead.
                        continue;
                    }
                    error
                }
                Err(error) => {
                    let refused = matches!(error, DialError::Connect(ConnectError::Refused));
                    link.set_state(if refused {
                        LinkState::Refused
                    } else {
                        LinkState::Unreachable
                    });
                    error
                }
            };
            debug!(peer = ends.to.0, address, error = %error, "not connected to a peer");
            let jitter = rand::rng().random_range(0.75..1.25);
            sleep(wait.mul_f64(jitter)).await;
            wait = (wait * 2).min(timing.redial_max);
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
    link.disconnected();
    link.set_state(LinkState::Connecting);
    link.given_up();
}

struct Dialled {
    queue: Arc<FrameQueue>,
    inbound: Frames,
    incarnation: Uuid,
}

async fn connect(
    connector: &dyn Connector,
    address: &str,
    ends: Ends,
    timing: LinkTiming,
) -> Result<Dialled, DialError> {
    let exchange = async {
        let (queue, stream) = FrameQueue::new();
        let hello = v1::PeerHello {
            broker_id: ends.from.0,
            to_broker_id: ends.to.0,
            incarnation_id: chronik_proto::uuid_bytes(ends.incarnation),
        };
        queue
            .push_control(Message::Hello(hello))
            .map_err(|_| DialError::Closed)?;
        let mut inbound = connector.connect(address, timing, stream).await?;
        let frame = next_frame(&mut inbound).await?;
        let incarnation = check_hello(&frame, ends)?;
        Ok(Dialled {
            queue,
            inbound,
            incarnation,
        })
    };
    // Twice: once for TCP, once for the hello.
    let limit = timing.connect_timeout * 2;
    timeout(limit, exchange)
        .await
        .unwrap_or(Err(DialError::Timeout(limit)))
}

async fn next_frame(inbound: &mut Frames) -> Result<v1::PeerFrame, DialError> {
    match inbound.next().await {
        Some(Ok(frame)) => Ok(frame),
        Some(Err(status)) => Err(ConnectError::Stream(Box::new(status)).into()),
        None => Err(DialError::Closed),
    }
}

fn check_hello(frame: &v1::PeerFrame, ends: Ends) -> Result<Uuid, DialError> {
    let first = frame
        .messages
        .first()
        .and_then(|message| message.message.as_ref());
    let Some(Message::Hello(hello)) = first else {
        return Err(DialError::NoHello);
    };
    if hello.broker_id != ends.to.0 {
        return Err(DialError::WrongBroker(hello.broker_id));
    }
    chronik_proto::uuid("incarnation_id", &hello.incarnation_id).map_err(|_| DialError::NoHello)
}

/// When the links of a broker ping next: all on one beat, so that an idle process wakes once for all.
fn next_ping(beat: Instant, now: Instant, interval: Duration) -> Instant {
    let gone = now.duration_since(beat).as_nanos() % interval.as_nanos().max(1);
    now + interval - Duration::from_nanos(u64::try_from(gone).unwrap_or_default())
}

/// Reads answers and pings until the connection ends.
async fn run(
    link: &Link,
    connection: Dialled,
    ends: Ends,
    timing: LinkTiming,
    is_stuck: impl Fn() -> bool,
) -> DialError {
    let Dialled {
        queue,
        mut inbound,
        incarnation,
    } = connection;
    link.connected(queue.clone(), incarnation);
    let mut ping = interval_at(
        next_ping(ends.beat, Instant::now(), timing.ping_interval),
        timing.ping_interval,
    );
    // Those that were missed are not made up for, and the beat stays.
    ping.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut sequence = 0u64;
    let mut heard = Instant::now();
    let mut last_tick = Instant::now();
    let (mut silent, mut one_way) = (false, false);
    loop {
        tokio::select! {
            biased;
            frame = next_frame(&mut inbound) => match frame {
                Ok(frame) => {
                    heard = Instant::now();
                    one_way = link.receive(frame).unwrap_or(one_way);
                    silent = false;
                    // Published only where it changes something.
                    link.set_state(if one_way { LinkState::OneWay } else { LinkState::Up });
                }
                Err(error) => return error,
            },
            _ = ping.tick() => {
                let now = Instant::now();
                if now.duration_since(last_tick) > timing.ping_interval + timing.silence / 2 {
                    // This process was stopped or starved: that says nothing about the peer.
                    heard = now;
                }
                last_tick = now;
                if is_stuck() {
                    return DialError::DiskStuck;
                }
                let quiet = now.duration_since(heard);
                if quiet > timing.silence * SILENCES_MAX {
                    return DialError::Silent(quiet);
                }
                if quiet > timing.silence && !silent {
                    silent = true;
                    link.set_state(LinkState::Silent);
                }
                sequence = sequence.wrapping_add(1);
                if queue.push_control(Message::Ping(v1::PeerPing { sequence, unanswered: silent })).is_err() {
                    return DialError::Closed;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_connect_at_any_time_ping_together() {
        let (beat, interval) = (Instant::now(), Duration::from_millis(400));
        let next = |after_ms| next_ping(beat, beat + Duration::from_millis(after_ms), interval);
        for after_ms in [400, 401, 600, 799] {
            assert_eq!(next(after_ms), beat + 2 * interval, "{after_ms}");
        }
        assert_eq!(next(0), beat + interval);
    }
}
