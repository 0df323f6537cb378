//! Follows the cluster image, and keeps a copy of it on disk for a start without controllers.
//!
//! Invariant: the image in force never goes back to an older revision of its cluster; while no
//! controller answers, the last one stays in force.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::watch_client::WatchClient;
use chronik_types::cluster_image::{ClusterImage, ImageChange};
use futures::StreamExt;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{info, warn};

use super::{BACKOFF_MAX, BACKOFF_MIN, ControllerClient, SESSION_CALL_TIMEOUT};
use crate::metadata_cache::{MetadataCache, write_to_disk};
use crate::metrics::Metrics;
use crate::rpc_channel::TracedChannel;

/// Changes that arrive together are published together.
const CHANGES_PER_IMAGE_MAX: usize = 256;
/// The image is written to disk at most this often.
const DISK_INTERVAL: Duration = Duration::from_millis(500);

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

    async fn watch(
        &mut self,
        channel: TracedChannel,
    ) -> Result<std::convert::Infallible, WatchEnd> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
