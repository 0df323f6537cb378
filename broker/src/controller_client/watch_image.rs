//! Follows the cluster image: a full one or changes, resumed from the revision already here.

use std::sync::Arc;

use chronik_proto::v1;
use chronik_proto::v1::watch_client::WatchClient;
use chronik_proto::{InvalidMessage, MESSAGE_SIZE_MAX};
use chronik_types::cluster_image::{ClusterImage, ImageChange};
use futures::FutureExt;
use rand::Rng;
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::{CALL_TIMEOUT, ClusterView, Inner, RETRY_MAX, RETRY_MIN};

/// Changes put in force together.
const CHANGES_AT_ONCE_MAX: usize = 64;

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error("no controller is configured")]
    NoController,
    #[error("{}", .0.message())]
    Status(Box<Status>),
    #[error("no answer in time")]
    Timeout,
    #[error("the controller ended the watch")]
    Ended,
    #[error("the controller sent an event that makes no sense: {0}")]
    Invalid(#[from] InvalidMessage),
    #[error("the change is on top of revision {base}, ours is {ours}")]
    Gap { base: u64, ours: u64 },
    #[error("the image is of cluster '{0}', not of ours")]
    OtherCluster(String),
    #[error("the controller is at revision {theirs}, behind ours, {ours}")]
    Behind { theirs: u64, ours: u64 },
}

/// Watches until dropped.
pub async fn follow(inner: Arc<Inner>) {
    let mut wait = RETRY_MIN;
    let mut from_scratch = false;
    loop {
        let mut events = 0u64;
        let error = watch_once(&inner, from_scratch, &mut events).await;
        // What the image says of other brokers is not current any more.
        inner
            .view
            .send_if_modified(|view| std::mem::replace(&mut view.connected, false));
        from_scratch = matches!(error, WatchError::Gap { .. });
        if events > 0 {
            wait = RETRY_MIN;
            info!(error = %error, "lost the watch of the cluster image");
        } else {
            debug!(error = %error, "cannot watch the cluster image");
        }
        if let WatchError::OtherCluster(_) | WatchError::Invalid(_) = error {
            warn!(error = %error, "a controller's image is not used");
            wait = RETRY_MAX;
        }
        let jitter = rand::rng().random_range(0.75..1.25);
        sleep(wait.mul_f64(jitter)).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}

async fn watch_once(inner: &Inner, from_scratch: bool, events: &mut u64) -> WatchError {
    let Some(chosen) = inner.pool.choose() else {
        return WatchError::NoController;
    };
    let mut client =
        WatchClient::new(chosen.channel.clone()).max_decoding_message_size(MESSAGE_SIZE_MAX);
    let ours = inner.view.borrow().image.clone();
    let request = v1::WatchRequest {
        from_revision: if from_scratch { 0 } else { ours.revision },
        cluster_id: ours.cluster_id.clone(),
    };
    let mut stream = match timeout(CALL_TIMEOUT, client.watch_image(request)).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => {
            inner.pool.failed(&chosen);
            return WatchError::Status(Box::new(status));
        }
        Err(_) => {
            inner.pool.failed(&chosen);
            return WatchError::Timeout;
        }
    };
    if request_resumes(&ours, from_scratch) {
        // The controller takes up from our revision; it sends nothing while nothing changes.
        inner.view.send_if_modified(|view| {
            let before = std::mem::replace(&mut view.connected, view.live);
            before != view.connected
        });
    }
    loop {
        let event = match stream.message().await {
            Ok(Some(event)) => event,
            Ok(None) => {
                inner.pool.failed(&chosen);
                return WatchError::Ended;
            }
            Err(status) => {
                inner.pool.failed(&chosen);
                return WatchError::Status(Box::new(status));
            }
        };
        let mut event = Some(event);
        while let Some(now) = event {
            match take(inner, now, &mut stream, events).await {
                Ok(next) => event = next,
                Err(error) => {
                    if matches!(error, WatchError::Behind { .. }) {
                        inner.pool.failed(&chosen);
                    }
                    return error;
                }
            }
        }
    }
}

fn request_resumes(ours: &ClusterImage, from_scratch: bool) -> bool {
    ours.revision > 0 && !from_scratch
}

/// Puts one event in force, and with it the changes right behind it that are here already: of a
/// large image, each published version is a copy of the topics it changes. What came behind them
/// is returned.
async fn take(
    inner: &Inner,
    event: v1::WatchEvent,
    stream: &mut Streaming<v1::WatchEvent>,
    events: &mut u64,
) -> Result<Option<v1::WatchEvent>, WatchError> {
    use v1::watch_event::Event;
    *events = events.saturating_add(1);
    let mut next = None;
    let image = match event.event {
        None => return Ok(None),
        Some(Event::Image(image)) => {
            let image = ClusterImage::try_from(image)?;
            if !inner.is_our_cluster(&image.cluster_id).await {
                return Err(WatchError::OtherCluster(image.cluster_id));
            }
            let ours = inner.view.borrow().image.revision;
            if image.revision < ours {
                return Err(WatchError::Behind {
                    theirs: image.revision,
                    ours,
                });
            }
            Arc::new(image)
        }
        Some(Event::Delta(delta)) => {
            let mut image = ClusterImage::clone(&inner.view.borrow().image);
            apply_delta(&mut image, delta)?;
            for _ in 0..CHANGES_AT_ONCE_MAX {
                // An end or an error is met again at the next read.
                let Some(Ok(Some(ready))) = stream.message().now_or_never() else {
                    break;
                };
                let Some(Event::Delta(delta)) = ready.event else {
                    next = Some(ready);
                    break;
                };
                *events = events.saturating_add(1);
                apply_delta(&mut image, delta)?;
            }
            Arc::new(image)
        }
    };
    inner.view.send_replace(ClusterView {
        image,
        live: true,
        connected: true,
    });
    Ok(next)
}

/// Puts the delta on top of `image`. One that is empty confirms the revision we have.
fn apply_delta(image: &mut ClusterImage, delta: v1::ImageDelta) -> Result<(), WatchError> {
    if delta.base_revision != image.revision {
        return Err(WatchError::Gap {
            base: delta.base_revision,
            ours: image.revision,
        });
    }
    let Some(change) = delta.change else {
        return Ok(());
    };
    let change = ImageChange::try_from(change)?;
    if change.revision > image.revision {
        image.apply(change);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(revision: u64, delta: v1::ImageDelta) -> Result<u64, WatchError> {
        let mut image = ClusterImage {
            revision,
            ..Default::default()
        };
        apply_delta(&mut image, delta).map(|()| image.revision)
    }

    fn delta(base_revision: u64, revision: u64) -> v1::ImageDelta {
        let change = v1::ImageChange {
            revision,
            ..Default::default()
        };
        v1::ImageDelta {
            base_revision,
            change: Some(change),
        }
    }

    #[test]
    fn changes_apply_on_top_of_their_base_only() {
        assert_eq!(after(4, delta(4, 6)).unwrap(), 6);
        assert!(matches!(
            after(4, delta(5, 6)),
            Err(WatchError::Gap { base: 5, ours: 4 })
        ));
    }

    #[test]
    fn an_empty_delta_confirms_what_is_here() {
        let confirmed = v1::ImageDelta {
            base_revision: 4,
            change: None,
        };
        assert_eq!(after(4, confirmed).unwrap(), 4);
        assert_eq!(after(4, delta(4, 4)).unwrap(), 4);
    }
}
