//! One rate for many streams.
//!
//! Invariant: over any stretch of time no more passes than the rate allows, plus one piece per stream.

use std::num::NonZeroU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
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
    account: Mutex<Account>,
}

/// In bytes since the start. What has passed is paid for in its order, at the rate of now.
#[derive(Debug)]
struct Account {
    passed: f64,
    /// Never more than has passed: a rate that was not used is gone.
    paid: f64,
    as_of: Instant,
}

/// The place of what has passed among all that has.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ticket(f64);

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
            account: Mutex::new(Account {
                passed: 0.0,
                paid: 0.0,
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
    pub fn charge(&self, bytes: usize) -> Ticket {
        let mut account = self.settle(self.rate());
        account.passed += bytes as f64;
        Ticket(account.passed)
    }

    /// How long to wait before asking again whether it is paid for; None: it is. Never longer than a moment,
    /// since the rate may change.
    pub fn wait(&self, ticket: Ticket) -> Option<Duration> {
        let rate = self.rate()?;
        let owed = ticket.0 - self.settle(Some(rate)).paid;
        // Beyond a microsecond's worth floating point has no say.
        let due = Duration::from_secs_f64(owed.max(0.0) / rate.get() as f64);
        (due > Duration::from_micros(1)).then(|| due.min(LOOK_INTERVAL))
    }

    /// To be called after bytes have passed and before more do: waits until they are paid for.
    pub async fn passed(&self, bytes: usize) {
        let ticket = self.charge(bytes);
        while let Some(wait) = self.wait(ticket) {
            sleep(wait).await;
        }
    }

    /// The account of now.
    fn settle(&self, rate: Option<NonZeroU64>) -> MutexGuard<'_, Account> {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let time = now.saturating_duration_since(account.as_of);
        let paid = rate.map_or(f64::INFINITY, |rate| time.as_secs_f64() * rate.get() as f64);
        account.paid = (account.paid + paid).min(account.passed);
        account.as_of = now;
        account
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
        let ticket = throttle.charge(1);
        assert!(
            throttle.wait(ticket).is_some(),
            "it takes a quarter of an hour"
        );
        sender.send_replace(view(1_000_000_000));
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, waits).await.unwrap().unwrap();
        assert_eq!(throttle.wait(ticket), None);
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
