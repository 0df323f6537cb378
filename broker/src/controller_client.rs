//! The broker's side of the controllers: it registers, keeps its session, follows the cluster
//! image and reports what it leads.
//!
//! Invariant: the published image's revision never falls. Without any controller the last image,
//! from memory or from disk, stays in force.

mod image_file;
mod pool;
mod session;
mod watch_image;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::sessions_client::SessionsClient;
use chronik_types::cluster_image::ClusterImage;
use chronik_types::epoch::BrokerEpoch;
use chronik_types::id::{BrokerId, RaftGroupId};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::{info, warn};
use uuid::Uuid;

#[cfg(test)]
pub(crate) use image_file::load as load_image;
use pool::ControllerPool;

const CALL_TIMEOUT: Duration = Duration::from_secs(3);
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// The image is saved so long after a change, so that a run of changes is one write.
const SAVE_DELAY: Duration = Duration::from_millis(200);

/// Who this broker is.
#[derive(Debug, Clone)]
pub struct Registration {
    pub broker_id: BrokerId,
    pub incarnation_id: Uuid,
    pub rpc_address: String,
    pub rack: Option<String>,
    pub storage_id: Uuid,
}

/// What the client is made of.
pub struct ClientOptions {
    pub registration: Registration,
    pub controllers: Vec<String>,
    pub data_dir: PathBuf,
    pub held: HeldLogs,
    pub stop: CancellationToken,
}

/// The logs on this broker's disk, each with the incarnation of the replica that runs on it.
#[derive(Clone)]
pub struct HeldLogs(Arc<dyn Fn() -> Vec<(RaftGroupId, Option<u64>)> + Send + Sync>);

impl HeldLogs {
    pub fn new(held: impl Fn() -> Vec<(RaftGroupId, Option<u64>)> + Send + Sync + 'static) -> Self {
        Self(Arc::new(held))
    }
}

/// The cluster image and how far it can be trusted.
#[derive(Debug, Clone)]
pub struct ClusterView {
    pub image: Arc<ClusterImage>,
    /// A controller has sent it to this process, it is not only the one from disk.
    pub live: bool,
    /// A controller is connected now, so what the image says of other brokers is current.
    pub connected: bool,
}

impl ClusterView {
    fn empty() -> Self {
        Self {
            image: Arc::new(ClusterImage::default()),
            live: false,
            connected: false,
        }
    }
}

/// Why the client cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("a controller's address is not valid")]
    Address(#[from] tonic::transport::Error),
    #[error("the id of the cluster cannot be read from {}", .folder.display())]
    ClusterId {
        folder: PathBuf,
        source: std::io::Error,
    },
}

/// Why a report was not decided.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("the broker is not registered")]
    NotRegistered,
    #[error("no controller answered: {0}")]
    Unavailable(Box<Status>),
}

pub(crate) struct Inner {
    registration: Registration,
    data_dir: PathBuf,
    pool: ControllerPool,
    held: HeldLogs,
    /// Incarnations of this broker's replicas by the image that it started from.
    saved_incarnations: HashMap<RaftGroupId, u64>,
    view: watch::Sender<ClusterView>,
    /// The cluster that this broker's data belongs to; empty until it is known.
    cluster_id: watch::Sender<String>,
    /// Held while the first cluster id is saved: session and watch both learn it at the same time.
    joining: tokio::sync::Mutex<()>,
    /// Our broker epoch, while the session lasts.
    epoch: watch::Sender<Option<BrokerEpoch>>,
    /// The revision that `reconcile` has acted on.
    acted_revision: AtomicU64,
    shutting_down: watch::Sender<bool>,
    /// The controllers know that this broker shuts down.
    shutdown_told: Notify,
    fenced: Notify,
    stop: CancellationToken,
}

/// Cheap to clone; all clones are the same client.
#[derive(Clone)]
pub struct ControllerClient {
    inner: Arc<Inner>,
    tasks: TaskTracker,
}

impl ControllerClient {
    /// Loads the saved image; nothing is asked of a controller before `start`.
    pub fn open(options: ClientOptions) -> Result<Self, ClientError> {
        let pool = ControllerPool::new(&options.controllers)?;
        let folder = options.data_dir.clone();
        let cluster_id = image_file::load_cluster_id(&folder)
            .map_err(|source| ClientError::ClusterId { folder, source })?
            .unwrap_or_default();
        let view = saved_view(&options.data_dir, &cluster_id);
        let inner = Inner {
            saved_incarnations: incarnations(&view.image, options.registration.broker_id),
            registration: options.registration,
            pool,
            held: options.held,
            view: watch::Sender::new(view),
            cluster_id: watch::Sender::new(cluster_id),
            joining: tokio::sync::Mutex::new(()),
            data_dir: options.data_dir,
            epoch: watch::Sender::new(None),
            acted_revision: AtomicU64::new(0),
            shutting_down: watch::Sender::new(false),
            shutdown_told: Notify::new(),
            fenced: Notify::new(),
            stop: options.stop,
        };
        Ok(Self {
            inner: Arc::new(inner),
            tasks: TaskTracker::new(),
        })
    }

    /// Registers and follows the image from now on, until the token is cancelled.
    pub fn start(&self) {
        let stop = &self.inner.stop;
        let until_stop = |work: futures::future::BoxFuture<'static, ()>| {
            let stop = stop.clone();
            async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = work => {}
                }
            }
        };
        self.tasks.spawn(until_stop(Box::pin(session::keep_session(
            self.inner.clone(),
        ))));
        self.tasks.spawn(until_stop(Box::pin(watch_image::follow(
            self.inner.clone(),
        ))));
        self.tasks
            .spawn(until_stop(Box::pin(save_images(self.inner.clone()))));
    }

    /// The image, and every later one.
    pub fn view(&self) -> watch::Receiver<ClusterView> {
        self.inner.view.subscribe()
    }

    /// Whether this broker holds a session, and every change of that.
    pub fn epoch(&self) -> watch::Receiver<Option<BrokerEpoch>> {
        self.inner.epoch.subscribe()
    }

    /// All that this revision asks of the broker has been done.
    pub fn acted_on(&self, revision: u64) {
        self.inner.acted_revision.store(revision, Ordering::Relaxed);
    }

    /// Sends reports of partitions led here, how far replicas are that are being filled, and how much has
    /// come of copies taken here. An error means that no report is decided.
    pub async fn report(
        &self,
        reports: Vec<v1::PartitionReport>,
        progress: Vec<v1::MoveProgress>,
        copies: Vec<v1::CopyProgress>,
    ) -> Result<Vec<v1::PartitionReportResult>, ReportError> {
        let inner = &self.inner;
        let epoch = (*inner.epoch.borrow()).ok_or(ReportError::NotRegistered)?;
        let request = v1::ReportPartitionsRequest {
            broker_id: inner.registration.broker_id.0,
            broker_epoch: epoch.0,
            reports,
            progress,
            copies,
        };
        let response = inner
            .call(|mut client| {
                let request = request.clone();
                async move { client.report_partitions(request).await }
            })
            .await
            .map_err(|status| ReportError::Unavailable(Box::new(status)))?;
        if response.fenced {
            inner.session_lost(epoch);
            return Err(ReportError::NotRegistered);
        }
        Ok(response.results)
    }

    /// Tells the controllers that this broker stops; waits until one has heard it, at most `limit`.
    pub async fn tell_shutting_down(&self, limit: Duration) -> bool {
        let told = self.inner.shutdown_told.notified();
        self.inner.shutting_down.send_replace(true);
        timeout(limit, told).await.is_ok()
    }

    /// Waits for the client's tasks, which end when its token is cancelled.
    pub async fn stopped(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Inner {
    /// The replicas whose logs are here. What does not run yet was last held as the saved image says.
    pub(crate) fn held_replicas(&self) -> Vec<v1::HeldReplica> {
        let held = (self.held.0)().into_iter();
        let replicas = held.map(|(group, running)| {
            let saved = || self.saved_incarnations.get(&group).copied();
            v1::HeldReplica {
                raft_group_id: group.0,
                incarnation: running.or_else(saved).unwrap_or(0),
            }
        });
        replicas.collect()
    }

    /// One call to the controller of choice, with a time limit; one that fails is passed over.
    pub(crate) async fn call<T, F, Fut>(&self, call: F) -> Result<T, Status>
    where
        F: FnOnce(SessionsClient<tonic::transport::Channel>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let Some(chosen) = self.pool.choose() else {
            return Err(Status::unavailable("no controller is configured"));
        };
        let client = SessionsClient::new(chosen.channel.clone());
        let result = match timeout(CALL_TIMEOUT, call(client)).await {
            Ok(result) => result,
            Err(_) => Err(Status::deadline_exceeded("no answer in time")),
        };
        if let Err(status) = &result
            && status.code() != tonic::Code::AlreadyExists
        {
            self.pool.failed(&chosen);
        }
        result.map(tonic::Response::into_inner)
    }

    /// The session of `epoch` is gone: register again.
    pub(crate) fn session_lost(&self, epoch: BrokerEpoch) {
        if *self.shutting_down.borrow() {
            // A broker that stops is fenced, and stays so.
            return;
        }
        let lost = self.epoch.send_if_modified(|current| {
            let ours = *current == Some(epoch);
            if ours {
                *current = None;
            }
            ours
        });
        if lost {
            warn!(
                broker_epoch = epoch.0,
                "the controllers fenced this broker; it registers again"
            );
            self.fenced.notify_one();
        }
    }

    /// Checks a cluster id that a controller named against the one of our data, and keeps the
    /// first. False: another cluster, nothing it says is for us.
    pub(crate) async fn is_our_cluster(&self, cluster_id: &str) -> bool {
        let _joining = self.joining.lock().await;
        let ours = self.cluster_id.borrow().clone();
        if !ours.is_empty() {
            return ours == cluster_id;
        }
        if cluster_id.is_empty() {
            return true;
        }
        let (folder, id) = (self.data_dir.clone(), cluster_id.to_owned());
        let saved = tokio::task::spawn_blocking(move || image_file::save_cluster_id(&folder, &id));
        match saved.await {
            Ok(Ok(())) => {
                self.cluster_id.send_replace(cluster_id.to_owned());
                info!(cluster_id, "joined a cluster");
                true
            }
            Ok(Err(error)) => {
                warn!(%error, "the cluster id cannot be saved");
                false
            }
            Err(_) => false,
        }
    }
}

fn incarnations(image: &ClusterImage, broker_id: BrokerId) -> HashMap<RaftGroupId, u64> {
    let partitions = image.topics.values().flat_map(|topic| &topic.partitions);
    let ours = partitions.filter_map(|partition| {
        let replica = partition.replica_on(broker_id)?;
        Some((partition.raft_group_id, replica.incarnation))
    });
    ours.collect()
}

fn saved_view(folder: &std::path::Path, cluster_id: &str) -> ClusterView {
    match image_file::load(folder) {
        Ok(Some(image)) if cluster_id.is_empty() || image.cluster_id == cluster_id => {
            info!(
                revision = image.revision,
                "starts from the saved cluster image"
            );
            ClusterView {
                image: Arc::new(image),
                live: false,
                connected: false,
            }
        }
        Ok(Some(image)) => {
            warn!(
                found = image.cluster_id,
                "the saved cluster image is of another cluster"
            );
            ClusterView::empty()
        }
        Ok(None) => ClusterView::empty(),
        Err(error) => {
            warn!(
                error = &error as &dyn std::error::Error,
                "the saved cluster image is ignored; waiting for a controller's"
            );
            ClusterView::empty()
        }
    }
}

/// Saves every image that a controller sent, runs of them as one.
async fn save_images(inner: Arc<Inner>) {
    let mut view = inner.view.subscribe();
    let mut saved = view.borrow_and_update().image.revision;
    while view.changed().await.is_ok() {
        if !has_news(&view.borrow(), saved) {
            continue;
        }
        tokio::time::sleep(SAVE_DELAY).await;
        let image = view.borrow_and_update().image.clone();
        let (folder, revision) = (inner.data_dir.clone(), image.revision);
        let result = tokio::task::spawn_blocking(move || image_file::save(&folder, &image)).await;
        match result {
            Ok(Ok(())) => saved = revision,
            Ok(Err(error)) => warn!(%error, "the cluster image cannot be saved"),
            Err(_) => return,
        }
    }
}

fn has_news(view: &ClusterView, saved: u64) -> bool {
    view.live && view.image.revision != saved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_cluster_is_joined_once_however_it_is_learned() {
        let folder = tempfile::tempdir().unwrap();
        let client = ControllerClient::open(ClientOptions {
            registration: Registration {
                broker_id: BrokerId(1),
                incarnation_id: Uuid::nil(),
                rpc_address: "127.0.0.1:1".to_owned(),
                rack: None,
                storage_id: Uuid::nil(),
            },
            controllers: vec!["127.0.0.1:1".to_owned()],
            data_dir: folder.path().to_owned(),
            held: HeldLogs::new(Vec::new),
            stop: CancellationToken::new(),
        })
        .unwrap();
        let joins = (0..8).map(|_| {
            let inner = client.inner.clone();
            tokio::spawn(async move { inner.is_our_cluster("ours").await })
        });
        for joined in futures::future::join_all(joins).await {
            assert!(joined.unwrap());
        }
        assert!(!client.inner.is_our_cluster("another").await);
        let saved = image_file::load_cluster_id(folder.path()).unwrap();
        assert_eq!(saved.as_deref(), Some("ours"));
    }
}
