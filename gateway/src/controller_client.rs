//! The gateway's side of the controllers: its session, the image watch, and the changes that Kafka
//! clients ask for.
//!
//! Invariants: any controller may be asked, and one that does not answer is passed over; while
//! none answers, the last image stays in force; an outcome that is not known is said to be so.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::admin_client::AdminClient;
use chronik_proto::v1::sessions_client::SessionsClient;
use chronik_proto::v1::watch_client::WatchClient;
use chronik_types::cluster_image::{ClusterImage, ImageChange};
use futures::StreamExt;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tracing::{info, warn};

use crate::error::CallError;
use crate::metadata_cache::{MetadataCache, write_to_disk};
use crate::metrics::Metrics;
use crate::rpc_channel;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_millis(1000);
/// A registration or heartbeat that takes longer is tried at another controller.
const SESSION_CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Changes that arrive together are published together.
const CHANGES_PER_IMAGE_MAX: usize = 256;
/// The image is written to disk at most this often.
const DISK_INTERVAL: Duration = Duration::from_millis(500);

/// Asks controllers; shared by all handlers and by the tasks below.
#[derive(Debug)]
pub struct ControllerClient {
    channels: Vec<Channel>,
    /// The controller that answered last.
    preferred: AtomicUsize,
}

impl ControllerClient {
    /// `addresses` are `host:port`; nothing is connected yet.
    pub fn new(addresses: &[String]) -> Result<Self, tonic::transport::Error> {
        let channels = addresses
            .iter()
            .map(|address| rpc_channel::endpoint(address).map(|e| e.connect_lazy()))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            channels,
            preferred: AtomicUsize::new(0),
        })
    }

    pub async fn create_topics(
        &self,
        request: v1::CreateTopicsRequest,
    ) -> Result<v1::CreateTopicsResponse, CallError> {
        let wait = admin_wait(request.timeout_ms);
        self.call(wait, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).create_topics(request).await }
        })
        .await
    }

    pub async fn delete_topics(
        &self,
        request: v1::DeleteTopicsRequest,
    ) -> Result<v1::TopicResults, CallError> {
        let wait = admin_wait(request.timeout_ms);
        self.call(wait, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).delete_topics(request).await }
        })
        .await
    }

    pub async fn create_partitions(
        &self,
        request: v1::CreatePartitionsRequest,
    ) -> Result<v1::TopicResults, CallError> {
        let wait = admin_wait(request.timeout_ms);
        self.call(wait, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).create_partitions(request).await }
        })
        .await
    }

    pub async fn alter_topic_configs(
        &self,
        request: v1::AlterTopicConfigsRequest,
    ) -> Result<v1::TopicResults, CallError> {
        self.call(Duration::from_secs(10), |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).alter_topic_configs(request).await }
        })
        .await
    }

    pub async fn allocate_producer_ids(
        &self,
        count: u32,
    ) -> Result<v1::AllocateProducerIdsResponse, CallError> {
        self.call(Duration::from_secs(5), |channel| async move {
            let request = v1::AllocateProducerIdsRequest { count };
            AdminClient::new(channel)
                .allocate_producer_ids(request)
                .await
        })
        .await
    }

    /// Asks one controller after the other until one decides or `wait` has passed.
    async fn call<A, F>(&self, wait: Duration, ask: impl Fn(Channel) -> F) -> Result<A, CallError>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let deadline = Instant::now() + wait;
        let mut backoff = BACKOFF_MIN;
        loop {
            for _ in 0..self.channels.len() {
                let Some((number, channel)) = self.controller() else {
                    break;
                };
                match timeout_at(deadline, ask(channel)).await {
                    Ok(Ok(answer)) => return Ok(answer.into_inner()),
                    Ok(Err(status)) if status.code() == Code::Unavailable => {
                        self.pass_over(number);
                    }
                    Ok(Err(status)) => return Err(call_error(&status)),
                    Err(_) => {
                        self.pass_over(number);
                        return Err(CallError::UnknownOutcome("no answer in time".to_owned()));
                    }
                }
            }
            if Instant::now() + backoff >= deadline {
                return Err(CallError::Unreachable("no controller with a quorum"));
            }
            sleep(backoff).await;
            backoff = backoff.saturating_mul(2).min(BACKOFF_MAX);
        }
    }

    fn controller(&self) -> Option<(usize, Channel)> {
        let number = self.preferred.load(Ordering::Relaxed);
        self.channels
            .get(number)
            .map(|channel| (number, channel.clone()))
    }

    /// Moves on to the next controller, unless another call has done so already.
    fn pass_over(&self, number: usize) {
        let next = number.wrapping_add(1) % self.channels.len().max(1);
        let _ = self
            .preferred
            .compare_exchange(number, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// What a failed call to a broker or controller means.
pub fn call_error(status: &Status) -> CallError {
    match status.code() {
        Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::OutOfRange => CallError::Refused(status.message().to_owned()),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => CallError::UnknownOutcome(status.message().to_owned()),
    }
}

/// Keeps the gateway registered until `stop`, then leaves.
pub async fn hold_session(
    client: Arc<ControllerClient>,
    cache: Arc<MetadataCache>,
    stop: CancellationToken,
) {
    let mut session = Session {
        client,
        cache,
        registered: false,
        warned: false,
        interval: BACKOFF_MAX,
    };
    let mut backoff = BACKOFF_MIN;
    loop {
        let pause = match session.step().await {
            Ok(interval) => {
                backoff = BACKOFF_MIN;
                interval
            }
            Err(why) => {
                session.lost(&why);
                backoff = backoff.saturating_mul(2).min(BACKOFF_MAX);
                backoff
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => break,
        }
    }
    session.leave().await;
}

struct Session {
    client: Arc<ControllerClient>,
    cache: Arc<MetadataCache>,
    registered: bool,
    warned: bool,
    interval: Duration,
}

impl Session {
    /// Registers or sends a heartbeat; answers how long to wait until the next one.
    async fn step(&mut self) -> Result<Duration, CallError> {
        if !self.registered {
            return self.register().await;
        }
        let answer = self.heartbeat(false).await?;
        if answer.expired {
            self.registered = false;
            return Ok(Duration::ZERO);
        }
        Ok(self.interval)
    }

    async fn register(&mut self) -> Result<Duration, CallError> {
        let own = self.cache.own();
        let request = v1::RegisterGatewayRequest {
            gateway_id: own.gateway_id.clone(),
            incarnation_id: chronik_proto::uuid_bytes(own.incarnation_id),
            rack: own.rack.clone(),
            endpoints: own.endpoints.iter().map(Into::into).collect(),
        };
        let answer = self
            .client
            .call(SESSION_CALL_TIMEOUT, |channel| {
                let request = request.clone();
                async move { SessionsClient::new(channel).register_gateway(request).await }
            })
            .await?;
        self.interval =
            Duration::from_millis(u64::from(answer.heartbeat_interval_ms).clamp(50, 60_000));
        self.registered = true;
        self.warned = false;
        info!(
            gateway_id = own.gateway_id,
            cluster_id = answer.cluster_id,
            "registered"
        );
        Ok(self.interval)
    }

    async fn heartbeat(&self, leaving: bool) -> Result<v1::GatewayHeartbeatResponse, CallError> {
        let own = self.cache.own();
        let request = v1::GatewayHeartbeatRequest {
            gateway_id: own.gateway_id.clone(),
            incarnation_id: chronik_proto::uuid_bytes(own.incarnation_id),
            leaving,
        };
        self.client
            .call(SESSION_CALL_TIMEOUT, |channel| {
                let request = request.clone();
                async move {
                    SessionsClient::new(channel)
                        .gateway_heartbeat(request)
                        .await
                }
            })
            .await
    }

    /// One line when the session is in doubt, not one per attempt.
    fn lost(&mut self, why: &CallError) {
        if !self.warned {
            warn!(error = %why, "no controller answers the gateway's session; going on");
            self.warned = true;
        }
    }

    async fn leave(self) {
        if self.registered {
            // The session would run out by itself; leaving only makes it quicker.
            let _ = timeout(Duration::from_secs(1), self.heartbeat(true)).await;
        }
    }
}

/// Follows the cluster image until `stop`.
pub async fn watch_image(
    client: Arc<ControllerClient>,
    cache: Arc<MetadataCache>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let mut watcher = Watcher {
        client,
        cache,
        metrics,
        connected: false,
        warned: false,
        full_image: false,
    };
    let mut backoff = BACKOFF_MIN;
    loop {
        tokio::select! {
            end = watcher.watch_once() => {
                if watcher.connected {
                    backoff = BACKOFF_MIN;
                }
                watcher.disconnected(&end);
            }
            () = stop.cancelled() => return,
        }
        tokio::select! {
            () = sleep(backoff) => {}
            () = stop.cancelled() => return,
        }
        backoff = backoff.saturating_mul(2).min(BACKOFF_MAX);
    }
}

struct Watcher {
    client: Arc<ControllerClient>,
    cache: Arc<MetadataCache>,
    metrics: Arc<Metrics>,
    connected: bool,
    warned: bool,
    /// The changes that came did not fit: start again from a full image.
    full_image: bool,
}

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
enum WatchEnd {
    #[error("{}", .0.message())]
    Status(#[from] Status),
    #[error(transparent)]
    Invalid(#[from] chronik_proto::InvalidMessage),
    #[error("the controller ended the watch")]
    Ended,
    #[error("a change on top of revision {base} came at revision {have}")]
    Gap { base: u64, have: u64 },
    #[error("an event without content")]
    Empty,
}

impl Watcher {
    async fn watch_once(&mut self) -> WatchEnd {
        let Some((number, channel)) = self.client.controller() else {
            return WatchEnd::Ended;
        };
        let end = match self.watch(channel).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        // After a gap a full image comes from the same controller; else the next one is asked.
        if matches!(end, WatchEnd::Gap { .. }) {
            self.full_image = true;
        } else {
            self.client.pass_over(number);
        }
        end
    }

    async fn watch(&mut self, channel: Channel) -> Result<std::convert::Infallible, WatchEnd> {
        let mut image = self.cache.load().image.clone();
        let request = v1::WatchRequest {
            from_revision: if std::mem::take(&mut self.full_image) {
                0
            } else {
                image.revision
            },
            cluster_id: image.cluster_id.clone(),
        };
        let mut client =
            WatchClient::new(channel).max_decoding_message_size(chronik_proto::MESSAGE_SIZE_MAX);
        let open = timeout(SESSION_CALL_TIMEOUT, client.watch_image(request));
        let events = open
            .await
            .map_err(|_| Status::deadline_exceeded("the watch was not opened in time"))??
            .into_inner();
        let mut events = events.ready_chunks(CHANGES_PER_IMAGE_MAX);
        while let Some(chunk) = events.next().await {
            let mut outcome = Ok(());
            let before = (image.revision, image.cluster_id.clone());
            for event in chunk {
                outcome = event
                    .map_err(WatchEnd::from)
                    .and_then(|e| apply(&mut image, e));
                if outcome.is_err() {
                    break;
                }
            }
            if outcome.is_ok() {
                self.connected();
            }
            if (image.revision, image.cluster_id.clone()) != before {
                self.metrics
                    .image_revision
                    .set(i64::try_from(image.revision).unwrap_or(i64::MAX));
                self.cache.store(image.clone());
            }
            outcome?;
        }
        Err(WatchEnd::Ended)
    }

    fn connected(&mut self) {
        if !self.connected {
            info!("following the cluster image");
            self.connected = true;
            self.warned = false;
            self.metrics.controller_connected.set(1);
        }
    }

    fn disconnected(&mut self, end: &WatchEnd) {
        if !self.warned {
            warn!(error = %end, "the image watch ended; going on with the last image");
            self.warned = true;
        }
        self.connected = false;
        self.metrics.controller_connected.set(0);
    }
}

fn apply(image: &mut ClusterImage, event: v1::WatchEvent) -> Result<(), WatchEnd> {
    match event.event.ok_or(WatchEnd::Empty)? {
        v1::watch_event::Event::Image(full) => {
            let full = ClusterImage::try_from(full)?;
            // A controller that is behind may send an image older than the one in force.
            if full.cluster_id != image.cluster_id || full.revision >= image.revision {
                *image = full;
            }
        }
        v1::watch_event::Event::Delta(delta) => {
            if delta.base_revision != image.revision {
                let gap = WatchEnd::Gap {
                    base: delta.base_revision,
                    have: image.revision,
                };
                return Err(gap);
            }
            let change = delta.change.ok_or(WatchEnd::Empty)?;
            let change = ImageChange::try_from(change)?;
            if change.revision > image.revision {
                image.apply(change);
            }
        }
    }
    Ok(())
}

/// Keeps the copy of the image on disk close to the one in force.
pub async fn keep_image_on_disk(
    cache: Arc<MetadataCache>,
    folder: PathBuf,
    written_revision: u64,
    stop: CancellationToken,
) {
    let mut changed = cache.subscribe();
    let mut written = written_revision;
    loop {
        let stopping = tokio::select! {
            _ = changed.changed() => false,
            () = stop.cancelled() => true,
        };
        let snapshot = cache.load();
        if snapshot.is_known() && snapshot.image.revision != written {
            let folder = folder.clone();
            written = snapshot.image.revision;
            let write =
                tokio::task::spawn_blocking(move || write_to_disk(&folder, &snapshot.image));
            if let Ok(Err(error)) = write.await {
                warn!(%error, "the cluster image cannot be written to disk; check data-dir");
            }
        }
        if stopping {
            return;
        }
        tokio::select! {
            () = sleep(DISK_INTERVAL) => {}
            () = stop.cancelled() => {}
        }
    }
}

/// An administrator's timeout, with room for the answer to come back.
fn admin_wait(timeout_ms: u32) -> Duration {
    Duration::from_millis(u64::from(timeout_ms).min(300_000)) + Duration::from_secs(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_certain_and_the_rest_is_unknown() {
        assert!(matches!(
            call_error(&Status::invalid_argument("x")),
            CallError::Refused(_)
        ));
        for status in [
            Status::deadline_exceeded("x"),
            Status::unknown("x"),
            Status::internal("x"),
        ] {
            assert!(matches!(call_error(&status), CallError::UnknownOutcome(_)));
        }
    }

    #[test]
    fn a_change_that_does_not_fit_is_a_gap() {
        let mut image = ClusterImage {
            revision: 4,
            ..ClusterImage::default()
        };
        let delta = |base_revision, revision| v1::WatchEvent {
            event: Some(v1::watch_event::Event::Delta(v1::ImageDelta {
                base_revision,
                change: Some(v1::ImageChange {
                    revision,
                    ..Default::default()
                }),
            })),
        };
        assert!(apply(&mut image, delta(4, 6)).is_ok());
        assert_eq!(image.revision, 6);
        assert!(matches!(
            apply(&mut image, delta(4, 7)),
            Err(WatchEnd::Gap { base: 4, have: 6 })
        ));
    }
}
