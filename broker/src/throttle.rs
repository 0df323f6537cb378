//! One rate for many streams.
//!
//! Invariant: over any stretch of time no more passes than the rate allows, plus one piece per stream.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::controller_client::ClusterView;

/// Longest between two looks of who waits: the rate may have changed.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Lets bytes pass at the lower of a rate of its own and the cluster's, which operators change meanwhile
/// (`chronik cluster set --reassignment-bytes-per-second`).
#[derive(Debug)]
pub struct Throttle {
    bytes_per_second: Option<NonZeroU64>,
    view: Option<watch::Receiver<ClusterView>>,
    debt: Mutex<Debt>,
}

/// What has passed and is not paid for. It is paid at the rate of now.
#[derive(Debug)]
struct Debt {
    bytes: f64,
    as_of: Instant,
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
            debt: Mutex::new(Debt {
                bytes: 0.0,
                as_of: Instant::now(),
            }),
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

    /// Takes account of bytes that have passed.
    pub fn charge(&self, bytes: usize) {
        self.settle(bytes as f64);
    }

    /// How long to wait before asking again whether more may pass; None: it may. Never longer than a
    /// moment, since the rate may change.
    pub fn wait(&self) -> Option<Duration> {
        let (owed, rate) = self.settle(0.0)?;
        let due = Duration::from_secs_f64(owed / rate.get() as f64);
        (!due.is_zero()).then(|| due.min(LOOK_INTERVAL))
    }

    /// To be called after bytes have passed and before more do: waits until all is paid for.
    pub async fn passed(&self, bytes: usize) {
        self.charge(bytes);
        while let Some(wait) = self.wait() {
            sleep(wait).await;
        }
    }

    /// The debt of now with `more` bytes, and the rate at which it is paid. None: nothing is owed without a
    /// limit.
    fn settle(&self, more: f64) -> Option<(f64, NonZeroU64)> {
        let rate = self.rate();
        let mut debt = self.debt.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let paid = rate.map_or(f64::INFINITY, |rate| {
            let time = now.saturating_duration_since(debt.as_of);
            time.as_secs_f64() * rate.get() as f64
        });
        debt.bytes = (debt.bytes - paid).max(0.0);
        debt.as_of = now;
        let rate = rate?;
        debt.bytes += more;
        Some((debt.bytes, rate))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chronik_types::cluster_image::ClusterImage;

    use super::*;

    fn view(bytes_per_second: u64) -> ClusterView {
        let mut image = ClusterImage::default();
        image.settings.reassignment_bytes_per_second = Some(bytes_per_second);
        ClusterView {
            image: Arc::new(image),
            live: true,
            connected: true,
        }
    }

    #[tokio::test]
    async fn a_rate_that_is_raised_holds_at_once() {
        let (sender, receiver) = watch::channel(view(1_000));
        let throttle = Arc::new(Throttle::new(None, receiver));
        let waits = {
            let throttle = throttle.clone();
            tokio::spawn(async move { throttle.passed(1_000_000).await })
        };
        tokio::task::yield_now().await;
        assert!(throttle.wait().is_some(), "it takes a quarter of an hour");
        sender.send_replace(view(1_000_000_000));
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, waits).await.unwrap().unwrap();
        assert_eq!(throttle.wait(), None);
    }

    #[tokio::test]
    async fn streams_share_the_rate() {
        let (_sender, view) = watch::channel(view(10_000_000));
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
        assert!(
            began.elapsed() >= Duration::from_millis(199),
            "{:?}",
            began.elapsed()
        );
    }

    #[tokio::test]
    async fn no_limit_does_not_wait() {
        let throttle = Throttle::of(None);
        let passed = throttle.passed(usize::MAX);
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, passed).await.unwrap();
    }
}
