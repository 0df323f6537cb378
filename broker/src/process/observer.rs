//! What follows from the image, the links and the replicas, kept up to date while the broker runs.
//!
//! Invariant: level-triggered. Each pass derives everything from what is so now; it does not matter
//! how many changes went by since the last one.

use std::sync::Arc;

use arc_swap::ArcSwap;
use chronik_telemetry::http::Health;
use chronik_types::cluster_image::ClusterImage;
use chronik_types::epoch::BrokerEpoch;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::consumer_group::replica_log::ConsumerGroups;
use crate::controller_client::ClusterView;
use crate::metrics::BrokerMetrics;
use crate::peers::LinkTable;
use crate::replicas::Replicas;

/// Keeps what is derived from image, links and replicas up to date: coordinators, readiness,
/// gauges.
pub(super) struct Observer {
    pub(super) view: watch::Receiver<ClusterView>,
    pub(super) links: watch::Receiver<LinkTable>,
    pub(super) missing: watch::Receiver<usize>,
    pub(super) epoch: watch::Receiver<Option<BrokerEpoch>>,
    pub(super) image: Arc<ArcSwap<ClusterImage>>,
    pub(super) groups: Arc<ConsumerGroups>,
    pub(super) replicas: Replicas,
    pub(super) health: Health,
    pub(super) metrics: BrokerMetrics,
}

impl Observer {
    pub(super) async fn run(mut self, stop: CancellationToken) {
        loop {
            self.refresh();
            let changed = tokio::select! {
                () = stop.cancelled() => return,
                changed = self.view.changed() => changed,
                changed = self.links.changed() => changed,
                changed = self.missing.changed() => changed,
                changed = self.epoch.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    fn refresh(&mut self) {
        let view = self.view.borrow_and_update().clone();
        let missing = *self.missing.borrow_and_update();
        let revision = view.image.revision;
        self.image.store(view.image);
        self.groups.refresh();

        let gauge = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        let connected = self
            .links
            .borrow_and_update()
            .0
            .values()
            .filter(|s| s.is_up())
            .count();
        let registered = self.epoch.borrow_and_update().is_some();
        self.metrics.replicas.set(gauge(self.replicas.count()));
        self.metrics.replicas_missing.set(gauge(missing));
        self.metrics.peers_connected.set(gauge(connected));
        self.metrics.registered.set(i64::from(registered));
        self.metrics
            .image_revision
            .set(i64::try_from(revision).unwrap_or(i64::MAX));

        match (revision, missing) {
            (0, _) => self
                .health
                .set_ready(false, "no cluster image yet: waiting for a controller"),
            (_, 0) => self.health.set_ready(true, ""),
            (_, _) => self
                .health
                .set_ready(false, "some replicas are not open yet"),
        }
    }
}
