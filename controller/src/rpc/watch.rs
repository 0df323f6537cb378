//! The watch of the cluster image, served by every controller from what it has applied.
//!
//! Invariant: the events of one stream bring a watcher from its revision forward without a gap. A
//! watcher that reads slowly holds a bounded number of events, and gets a full image when the
//! changes that it misses are no longer kept.

use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::watch_server::Watch;
use chronik_types::cluster_image::ClusterImage;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::controller::Controller;
use crate::image_feed::Missing;

/// Events that wait for one watcher.
const EVENTS_MAX: usize = 16;
/// How long a watcher that is ahead of this controller waits for it to catch up.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(5);

pub struct WatchRpc {
    controller: Controller,
    stop: CancellationToken,
}

impl WatchRpc {
    pub fn new(controller: Controller, stop: CancellationToken) -> Self {
        Self { controller, stop }
    }
}

type Events = mpsc::Sender<Result<v1::WatchEvent, Status>>;

#[tonic::async_trait]
impl Watch for WatchRpc {
    type WatchImageStream = ReceiverStream<Result<v1::WatchEvent, Status>>;

    async fn watch_image(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchImageStream>, Status> {
        let request = request.into_inner();
        let (events, stream) = mpsc::channel(EVENTS_MAX);
        let controller = self.controller.clone();
        let stop = self.stop.clone();
        tokio::spawn(async move {
            controller.metrics().watchers.inc();
            tokio::select! {
                () = feed_watcher(&controller, request, &events) => {}
                () = events.closed() => {}
                () = stop.cancelled() => {}
            }
            controller.metrics().watchers.dec();
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Ends when the watcher is gone.
async fn feed_watcher(controller: &Controller, request: v1::WatchRequest, events: &Events) {
    let feed = controller.feed();
    let mut images = feed.subscribe();
    // A controller that has joined no cluster yet has nothing to show.
    if images
        .wait_for(|image| !image.cluster_id.is_empty())
        .await
        .is_err()
    {
        return;
    }
    let mut revision = first_revision(&mut images, &request).await;
    loop {
        images.borrow_and_update();
        let sent = match feed.missing_since(revision) {
            Missing::Nothing => {
                if images.changed().await.is_err() {
                    return;
                }
                continue;
            }
            Missing::Image(image) => {
                controller.metrics().full_images.inc();
                revision = image.revision;
                send(events, v1::watch_event::Event::Image((&*image).into())).await
            }
            Missing::Changes(changes) => {
                let mut sent = true;
                for change in changes {
                    let delta = v1::ImageDelta {
                        base_revision: revision,
                        change: Some((&*change).into()),
                    };
                    revision = change.revision;
                    sent = send(events, v1::watch_event::Event::Delta(delta)).await;
                    if !sent {
                        break;
                    }
                }
                sent
            }
        };
        if !sent {
            return;
        }
    }
}

async fn send(events: &Events, event: v1::watch_event::Event) -> bool {
    events
        .send(Ok(v1::WatchEvent { event: Some(event) }))
        .await
        .is_ok()
}

/// Where the stream goes on: the watcher's revision if it means something here. A watcher that
/// comes from a controller which was ahead waits a little rather than go back in time.
async fn first_revision(
    images: &mut watch::Receiver<Arc<ClusterImage>>,
    request: &v1::WatchRequest,
) -> u64 {
    if request.cluster_id != images.borrow().cluster_id {
        return 0;
    }
    let reached = images.wait_for(|image| image.revision >= request.from_revision);
    match tokio::time::timeout(CATCH_UP_TIMEOUT, reached).await {
        Ok(_) => request.from_revision,
        Err(_) => 0,
    }
}
