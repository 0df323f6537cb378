//! One rate for many streams.
//!
//! Invariant: over any stretch of time no more passes than the rate allows, plus one piece per stream.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Lets bytes pass at a rate.
#[derive(Debug)]
pub struct Throttle {
    bytes_per_second: Option<NonZeroU64>,
    /// When all that has passed is paid for.
    paid_at: Mutex<Instant>,
}

impl Throttle {
    /// None: no limit.
    pub fn new(bytes_per_second: Option<NonZeroU64>) -> Throttle {
        Throttle {
            bytes_per_second,
            paid_at: Mutex::new(Instant::now()),
        }
    }

    /// To be called after `bytes` have come and before more are read: waits until they are paid for,
    /// at the lower of this broker's rate and the cluster's, which operators change meanwhile.
    pub async fn passed(&self, bytes: usize, cluster_rate: Option<NonZeroU64>) {
        let rates = [self.bytes_per_second, cluster_rate];
        let Some(rate) = rates.into_iter().flatten().min() else {
            return;
        };
        let cost = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
        let until = {
            let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
            *paid_at = (*paid_at).max(Instant::now()) + cost;
            *paid_at
        };
        sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn streams_share_the_rate() {
        let throttle = Arc::new(Throttle::new(NonZeroU64::new(1_000_000_000)));
        let cluster_rate = NonZeroU64::new(10_000_000);
        let began = Instant::now();
        let streams = (0..4).map(|_| {
            let throttle = throttle.clone();
            async move {
                for _ in 0..5 {
                    throttle.passed(100_000, cluster_rate).await;
                }
            }
        });
        futures::future::join_all(streams).await;
        // 2 MB at 10 MB/s; a busy machine only makes it longer.
        assert!(began.elapsed() >= Duration::from_millis(199));
    }

    #[tokio::test]
    async fn no_limit_does_not_wait() {
        let throttle = Throttle::new(None);
        let passed = throttle.passed(usize::MAX, None);
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, passed).await.unwrap();
    }
}
