//! How tests of the broker wait: for a condition, or as long as one has to hold.
//!
//! Invariant: what does not come in time fails and says what was waited for.

use std::time::Duration;

use tokio::time::{sleep, timeout};

/// Longer than anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(40);
/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Looks until there is something.
pub async fn wait_for<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            sleep(LOOK_INTERVAL).await;
        }
    };
    let found = timeout(LIMIT, found).await;
    found.unwrap_or_else(|_| panic!("not in time: {what}"))
}

/// Looks until the condition holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, async || holds().then_some(())).await;
}

/// What the future gives.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(LIMIT, future).await.expect("in time")
}

/// For what must not happen, which nothing announces: the condition holds at every look of the time.
pub async fn stays(what: &str, time: Duration, holds: impl Fn() -> bool) {
    let ended = timeout(time, until(what, || !holds())).await;
    assert!(ended.is_err() && holds(), "no more: {what}");
}
