//! One rate for many streams.
//!
//! Invariant: over any stretch of time no more passes than the rate allows, plus one piece per stream.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::controller_client::ClusterView;

/// Lets bytes pass at the lower of a rate of its own and the cluster's, which operators change meanwhile
/// (`chronik cluster set --reassignment-bytes-per-second`).
#[derive(Debug)]
pub struct Throttle {
    bytes_per_second: Option<NonZeroU64>,
    view: Option<watch::Receiver<ClusterView>>,
    /// When all that has passed is paid for.
    paid_at: Mutex<Instant>,
}

impl Throttle {
    /// `bytes_per_second`: its own; None: no limit.
    pub fn new(bytes_per_second: Option<NonZeroU64>, view: watch::Receiver<ClusterView>) -> Self {
        Throttle {
            view: Some(view),
            ..Throttle::of(bytes_per_second)
        }
    }

    /// Without a cluster that has a say.
    pub fn of(bytes_per_second: Option<NonZeroU64>) -> Self {
        Throttle {
            bytes_per_second,
            view: None,
            paid_at: Mutex::new(Instant::now()),
        }
    }

    /// In bytes per second; None: no limit.
    pub fn rate(&self) -> Option<NonZeroU64> {
        let cluster = || {
            let settings = &self.view.as_ref()?.borrow().image.settings;
            NonZeroU64::new(settings.reassignment_bytes_per_second?)
        };
        self.bytes_per_second.into_iter().chain(cluster()).min()
    }

    /// Takes account of bytes that have passed: nothing more is to pass before the given time.
    pub fn charge(&self, bytes: usize) -> Option<Instant> {
        let cost = Duration::from_secs_f64(bytes as f64 / self.rate()?.get() as f64);
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        *paid_at = (*paid_at).max(Instant::now()) + cost;
        Some(*paid_at)
    }

    /// To be called after bytes have passed and before more do: waits until they are paid for.
    pub async fn passed(&self, bytes: usize) {
        if let Some(paid_at) = self.charge(bytes) {
            sleep_until(paid_at).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chronik_types::cluster_image::ClusterImage;

    use super::*;

    #[tokio::test]
    async fn streams_share_the_rate() {
        let mut image = ClusterImage::default();
        image.settings.reassignment_bytes_per_second = Some(10_000_000);
        let (_sender, view) = watch::channel(ClusterView {
            image: Arc::new(image),
            live: true,
            connected: true,
        });
        let own = NonZeroU64::new(1_000_000_000);
        let throttle = Arc::new(Throttle::new(own, view));
        let began = Instant::now();
        let streams = (0..4).map(|_| {
            let throttle = throttle.clone();
            async move {
                for _ in 0..5 {
                    throttle.passed(100_000).await;
                }
            }
        });
        futures::future::join_all(streams).await;
        // 2 MB at 10 MB/s; a busy machine only makes it longer.
        assert!(began.elapsed() >= Duration::from_millis(199));
    }

    #[tokio::test]
    async fn no_limit_does_not_wait() {
        let throttle = Throttle::of(None);
        let passed = throttle.passed(usize::MAX);
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, passed).await.unwrap();
    }
}
