//! Tells the controllers who leads and how the followers are, until the image says the same.
//!
//! Invariant: level-triggered: a report is sent while image and reality differ, never because of
//! how they came to differ; so a lost answer or a refused compare-and-set needs no special care. A
//! resting partition is not looked at.

mod led;
mod report;

use std::time::Duration;

use chronik_proto::v1;
use chronik_types::id::BrokerId;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::led::LedTable;
use super::driver::LedEvent;
use crate::catch_up::Copies;
use crate::controller_client::{ClusterView, ControllerClient, ReportError};
use crate::metrics::BrokerMetrics;
use crate::peers::LinkTable;

/// How often the progress of followers that are not settled is looked at.
const SCAN_INTERVAL: Duration = Duration::from_millis(250);
/// How often the progress of moves is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Reports in one call.
const REPORTS_MAX: usize = 1_000;
/// Between two calls: each makes a new image, which everybody takes in. Longer after a call with many
/// reports, since many more will follow, and all images show all partitions.
const SEND_INTERVAL: Duration = Duration::from_millis(20);
const SEND_INTERVAL_PER_REPORT: Duration = Duration::from_millis(2);
const SEND_INTERVAL_MAX: Duration = Duration::from_millis(300);
/// After a call that failed.
const RETRY_DELAY: Duration = Duration::from_millis(300);

/// What the reporter works with.
pub struct ReporterOptions {
    pub broker_id: BrokerId,
    pub lag_max: Duration,
    pub client: ControllerClient,
    pub view: watch::Receiver<ClusterView>,
    pub links: watch::Receiver<LinkTable>,
    pub led: mpsc::UnboundedReceiver<LedEvent>,
    /// Those that this broker takes.
    pub copies: Copies,
    pub metrics: BrokerMetrics,
    pub stop: CancellationToken,
}

fn send_interval(reports: usize) -> Duration {
    let reports = u32::try_from(reports).unwrap_or(u32::MAX);
    let longer = SEND_INTERVAL_PER_REPORT.saturating_mul(reports);
    SEND_INTERVAL.saturating_add(longer).min(SEND_INTERVAL_MAX)
}

type Sending = BoxFuture<'static, Result<Vec<v1::PartitionReportResult>, ReportError>>;

/// Runs until the token is cancelled.
pub async fn run(mut options: ReporterOptions) {
    let stop = options.stop.clone();
    let (growth, mut grown) = mpsc::unbounded_channel();
    let mut table = LedTable::new(options.broker_id, options.lag_max, growth);
    table.links_changed(options.links.borrow_and_update().clone());
    table.image_changed(options.view.borrow_and_update().image.clone());
    let mut copy_count = options.copies.count();
    let mut sending: Option<Sending> = None;
    let mut scan_at: Option<Instant> = None;
    // No call before.
    let mut send_from = Instant::now();
    let mut progress_at = Instant::now();
    loop {
        let send_at = table.next_due().map(|at| at.max(send_from));
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            result = async { sending.as_mut().expect("guarded below").await },
                if sending.is_some() =>
            {
                sending = None;
                if let Err(error) = result {
                    debug!(%error, "a report was not decided");
                    send_from = Instant::now() + RETRY_DELAY;
                }
            }
            Some(event) = options.led.recv() => {
                table.take_event(event);
                while let Ok(event) = options.led.try_recv() {
                    table.take_event(event);
                }
            }
            changed = options.links.changed() => {
                if changed.is_err() {
                    return;
                }
                table.links_changed(options.links.borrow_and_update().clone());
            }
            changed = options.view.changed() => {
                if changed.is_err() {
                    return;
                }
                table.image_changed(options.view.borrow_and_update().image.clone());
            }
            // Whose sender lives in the options.
            Ok(()) = copy_count.changed() => {
                copy_count.borrow_and_update();
            }
            Some(group) = grown.recv() => {
                table.grew(group);
                while let Ok(group) = grown.try_recv() {
                    table.grew(group);
                }
            }
            () = sleep_until(scan_at.unwrap_or_else(Instant::now)), if scan_at.is_some() => {
                scan_at = None;
                table.scan(Instant::now());
            }
            () = sleep_until(send_at.unwrap_or_else(Instant::now)),
                if send_at.is_some() && sending.is_none() => {}
        }
        let now = Instant::now();
        if table.is_stale() {
            table.look(now);
        }
        if sending.is_none() && now >= send_from {
            let reports = table.take_due(now, REPORTS_MAX);
            let (mut progress, mut copies) = (Vec::new(), Vec::new());
            if (table.is_moving() || *copy_count.borrow() > 0) && now >= progress_at {
                progress_at = now + PROGRESS_INTERVAL;
                progress = table.move_progress();
                copies = options.copies.progress();
            }
            if !(reports.is_empty() && progress.is_empty() && copies.is_empty()) {
                send_from = now + send_interval(reports.len());
                options.metrics.reports.inc_by(reports.len() as u64);
                let client = options.client.clone();
                sending = Some(Box::pin(async move {
                    client.report(reports, progress, copies).await
                }));
            }
        }
        if scan_at.is_none() && (!table.is_settled() || *copy_count.borrow() > 0) {
            scan_at = Some(now + SCAN_INTERVAL);
        }
        options
            .metrics
            .partitions_led
            .set(i64::try_from(table.len()).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_change_is_told_soon_and_many_are_told_together() {
        assert!(send_interval(1) < Duration::from_millis(30));
        assert_eq!(send_interval(1_000), SEND_INTERVAL_MAX);
        assert_eq!(send_interval(usize::MAX), SEND_INTERVAL_MAX);
    }
}
