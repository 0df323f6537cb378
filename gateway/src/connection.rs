//! One client connection: frames in, responses out in request order.
//!
//! Invariants: produce requests are handed to the brokers in the order they came, without waiting
//! for each other's answers; any other request starts when all before it are answered, and holds
//! up produce requests behind it, as in Apache Kafka; requests and bytes taken and not answered
//! are bounded; malformed bytes end this connection and nothing else.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use futures::future::{BoxFuture, poll_immediate};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::dispatch::{self, Reply};
use crate::protocol::frame::{SIZE_PREFIX, frame_size};
use crate::protocol::{Api, Malformed, RequestHeader, Response};
use crate::services::{Context, Origin, Services};

/// Answers that are ready are written together up to this size.
const WRITE_TOGETHER: usize = 256 * 1024;
/// Room made for the next read; frames up to `RESERVE_MAX` get all they need at once.
const READ_SIZE: usize = 16 * 1024;
const RESERVE_MAX: usize = 2 * 1024 * 1024;
/// Bytes in flight are counted in units of this.
const UNIT: usize = 1024;
const IO_SLICES_MAX: usize = 64;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("closed by the client")]
    Eof,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("malformed request: {0}")]
    Malformed(#[from] Malformed),
    #[error("idle for too long")]
    Idle,
    #[error("the gateway stops")]
    Drain,
    #[error("an answer cannot be given: {0}")]
    NoAnswer(&'static str),
}

/// A request that was taken; its answer is on the way.
struct Taken {
    api: Api,
    since: Instant,
    reply: BoxFuture<'static, Reply>,
    _bytes: OwnedSemaphorePermit,
}

/// Serves a client until it leaves, misbehaves, idles too long or `drain` asks to stop.
pub async fn serve(
    stream: TcpStream,
    services: Arc<Services>,
    origin: Arc<Origin>,
    drain: CancellationToken,
) {
    // Without it small answers wait for the client's delayed acknowledgements.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "connection is gone already");
        return;
    }
    let limits = &services.config.limits;
    let (read, write) = stream.into_split();
    let (sender, taken) = mpsc::channel(limits.max_in_flight_requests);
    let waiting = Arc::new(AtomicUsize::new(0));
    let idle = Duration::from_millis(limits.connections_max_idle_ms);
    let bytes_units = limits.max_in_flight_bytes.div_ceil(UNIT).max(1);
    let reader = Reader {
        frames: Frames {
            read,
            buffer: BytesMut::new(),
            limit: limits.socket_request_max_bytes,
        },
        services: services.clone(),
        origin: origin.clone(),
        taken: sender,
        bytes: Arc::new(Semaphore::new(bytes_units)),
        bytes_units,
        waiting: waiting.clone(),
        idle,
        drain,
    };
    let mut writer = Box::pin(
        Writer {
            write,
            services: services.clone(),
            waiting,
            idle,
        }
        .run(taken),
    );
    let end = tokio::select! {
        end = reader.run() => end,
        end = &mut writer => end,
    };
    if matches!(end, End::Drain) {
        // The reader is gone, so the writer ends after the last answer. The listener's owner sets
        // the deadline.
        let _ = writer.await;
    }
    log_end(&services, &origin, &end);
}

fn log_end(services: &Services, origin: &Origin, end: &End) {
    let client = &*origin.client_host;
    match end {
        End::Malformed(error) => {
            services.metrics.malformed_requests.inc();
            if let Some(left_out) = services.malformed_log.admit(Instant::now()) {
                warn!(client, %error, left_out, "malformed request: connection closed");
            }
        }
        End::Eof | End::Io(_) | End::Idle | End::Drain | End::NoAnswer(_) => {
            debug!(client, reason = %end, "connection closed");
        }
    }
}

/// Takes requests off the socket.
struct Reader {
    frames: Frames,
    services: Arc<Services>,
    origin: Arc<Origin>,
    taken: mpsc::Sender<Taken>,
    bytes: Arc<Semaphore>,
    bytes_units: usize,
    waiting: Arc<AtomicUsize>,
    idle: Duration,
    drain: CancellationToken,
}

impl Reader {
    async fn run(mut self) -> End {
        // Resolves when the last request that was not a produce is answered.
        let mut barrier: Option<oneshot::Receiver<()>> = None;
        loop {
            let frame = match self.next_frame().await {
                Ok(frame) => frame,
                Err(end) => return end,
            };
            if let Err(end) = self.take(frame, &mut barrier).await {
                return end;
            }
        }
    }

    async fn next_frame(&mut self) -> Result<Bytes, End> {
        loop {
            let next = tokio::select! {
                next = timeout(self.idle, self.frames.next()) => next,
                () = self.drain.cancelled() => return Err(End::Drain),
            };
            match next {
                Ok(frame) => return frame,
                // Waiting for a broker is not idling.
                Err(_) if self.waiting.load(Ordering::Relaxed) > 0 => {}
                Err(_) => return Err(End::Idle),
            }
        }
    }

    async fn take(
        &mut self,
        frame: Bytes,
        barrier: &mut Option<oneshot::Receiver<()>>,
    ) -> Result<(), End> {
        let since = Instant::now();
        self.services.metrics.bytes_in.inc_by(frame.len() as u64);
        let units = frame.len().div_ceil(UNIT).clamp(1, self.bytes_units);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let closed = |_| End::NoAnswer("the connection ended");
        let bytes = self
            .bytes
            .clone()
            .acquire_many_owned(units)
            .await
            .map_err(closed)?;
        let (header, body) = RequestHeader::decode(frame)?;
        let api = Api::from_key(header.api_key).ok_or(Malformed::UnknownApi(header.api_key))?;
        let context = Context {
            services: self.services.clone(),
            origin: self.origin.clone(),
            client_id: header.client_id.as_deref().unwrap_or_default().to_owned(),
            version: header.api_version,
            correlation_id: header.correlation_id,
        };
        let reply = if api == Api::Produce {
            if let Some(answered) = barrier.take() {
                // Fails where the writer has dropped the request, and with it the connection.
                let _ = answered.await;
            }
            dispatch::produce(context, body).await?
        } else {
            let (answered, receiver) = oneshot::channel();
            *barrier = Some(receiver);
            let reply = dispatch::other(api, context, body);
            Box::pin(async move {
                let reply = reply.await;
                let _ = answered.send(());
                reply
            })
        };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let taken = Taken {
            api,
            since,
            reply,
            _bytes: bytes,
        };
        self.taken
            .send(taken)
            .await
            .map_err(|_| End::NoAnswer("the connection ended"))
    }
}

/// Cuts the byte stream into frames.
struct Frames {
    read: OwnedReadHalf,
    buffer: BytesMut,
    limit: usize,
}

impl Frames {
    async fn next(&mut self) -> Result<Bytes, End> {
        loop {
            let needed = match self.buffer.first_chunk::<SIZE_PREFIX>() {
                None => SIZE_PREFIX,
                Some(prefix) => {
                    let size = frame_size(*prefix, self.limit)?;
                    if self.buffer.len() >= size.saturating_add(SIZE_PREFIX) {
                        self.buffer.advance(SIZE_PREFIX);
                        return Ok(self.buffer.split_to(size).freeze());
                    }
                    size.saturating_add(SIZE_PREFIX)
                }
            };
            self.read_more(needed).await?;
        }
    }

    /// Reads once. Memory grows with what has arrived, not with what a size field claims, and an
    /// idle connection keeps none.
    async fn read_more(&mut self, needed: usize) -> Result<(), End> {
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        loop {
            self.read.readable().await?;
            let missing = needed.saturating_sub(self.buffer.len());
            let room = if needed <= RESERVE_MAX {
                missing
            } else {
                missing.min(self.buffer.len().max(RESERVE_MAX))
            };
            self.buffer.reserve(room.max(READ_SIZE));
            match self.read.try_read_buf(&mut self.buffer) {
                Ok(0) => return Err(End::Eof),
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Writes answers in request order.
struct Writer {
    write: OwnedWriteHalf,
    services: Arc<Services>,
    waiting: Arc<AtomicUsize>,
    idle: Duration,
}

impl Writer {
    async fn run(mut self, mut taken: mpsc::Receiver<Taken>) -> End {
        let mut next: Option<Taken> = None;
        loop {
            let mut first = match next.take() {
                Some(first) => first,
                None => match taken.recv().await {
                    Some(first) => first,
                    None => return End::NoAnswer("no more requests"),
                },
            };
            let mut batch = Batch::default();
            let reply = (&mut first.reply).await;
            if let Err(end) = batch.add(first, reply) {
                return end;
            }
            // Whatever else is ready goes out in the same write.
            while batch.size_bytes < WRITE_TOGETHER {
                let Ok(mut more) = taken.try_recv() else {
                    break;
                };
                let Some(reply) = poll_immediate(&mut more.reply).await else {
                    next = Some(more);
                    break;
                };
                if let Err(end) = batch.add(more, reply) {
                    // The answers before it are still owed.
                    let _ = self.write(batch).await;
                    return end;
                }
            }
            if let Err(end) = self.write(batch).await {
                return end;
            }
        }
    }

    async fn write(&mut self, batch: Batch) -> Result<(), End> {
        let Batch {
            mut pieces,
            size_bytes,
            answered,
        } = batch;
        let write = write_all(&mut self.write, &mut pieces);
        timeout(self.idle, write).await.map_err(|_| End::Idle)??;
        self.services.metrics.bytes_out.inc_by(size_bytes as u64);
        self.waiting.fetch_sub(answered.len(), Ordering::Relaxed);
        for taken in &answered {
            self.services
                .metrics
                .answered(taken.api, taken.since.elapsed());
        }
        Ok(())
    }
}

/// Answers that are written together.
#[derive(Default)]
struct Batch {
    pieces: Vec<Bytes>,
    size_bytes: usize,
    /// Kept until their answers are written: they hold the connection's share of memory.
    answered: Vec<Taken>,
}

impl Batch {
    fn add(&mut self, taken: Taken, reply: Reply) -> Result<(), End> {
        match reply {
            Reply::Send(Response { mut pieces }) => {
                self.size_bytes = pieces
                    .iter()
                    .fold(self.size_bytes, |sum, p| sum.saturating_add(p.len()));
                self.pieces.append(&mut pieces);
            }
            Reply::Nothing => {}
            Reply::Malformed(error) => return Err(End::Malformed(error)),
            Reply::Close(why) => return Err(End::NoAnswer(why)),
        }
        self.answered.push(taken);
        Ok(())
    }
}

async fn write_all(write: &mut OwnedWriteHalf, pieces: &mut [Bytes]) -> io::Result<()> {
    let mut at = 0;
    while at < pieces.len() {
        let slices: Vec<IoSlice<'_>> = pieces[at..]
            .iter()
            .take(IO_SLICES_MAX)
            .map(|piece| IoSlice::new(piece))
            .collect();
        let mut written = write.write_vectored(&slices).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while at < pieces.len() && written >= pieces[at].len() {
            written -= pieces[at].len();
            at += 1;
        }
        if written > 0 {
            pieces[at].advance(written);
        }
    }
    Ok(())
}
