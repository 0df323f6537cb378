//! One copy: what it consists of, where each segment comes from, and how it comes into force.
//!
//! Invariant: the leader says what the log is; any replica may give the bytes, this one's own files
//! included. A segment counts only once the storage has checked all of it.

use std::sync::Arc;
use std::time::Duration;

use chronik_storage::{Export, Installer, ManifestSegment, SegmentFile, Storage, StorageError};
use chronik_types::id::BrokerId;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use super::progress::Copies;
use super::source::{Source, SourceError};
use super::unfinished::{StillBusy, Unfinished};
use crate::blocking::Background;
use crate::controller_client::ClusterView;
use crate::metrics::BrokerMetrics;
use crate::peers::Behind;
use crate::replica::Replica;
use crate::replica::copy::{CopyError, Fetched, parts};
use crate::replicas::Replicas;
use crate::throttle::Throttle;

/// Segments of one copy that come at the same time.
const SEGMENTS_PARALLEL: usize = 3;
/// Tries for one segment before the whole copy is given up for now.
const SEGMENT_ATTEMPTS: u32 = 6;
/// Before the first next try; longer each time.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// Bytes copied at once from this replica's own files.
const OWN_CHUNK_SIZE: usize = 1024 * 1024;

/// What all copies of this broker share.
pub struct Shared {
    pub storage: Storage,
    pub replicas: Replicas,
    pub view: watch::Receiver<ClusterView>,
    pub throttle: Throttle,
    /// Writes and checks what comes.
    pub background: Background,
    pub unfinished: Unfinished,
    pub copies: Copies,
    pub metrics: BrokerMetrics,
}

/// Why a copy did not come into force. The replica is as it was.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("the replica does not run here any more")]
    NoReplica,
    #[error("there is no other replica in sync")]
    NoPeer,
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Busy(#[from] StillBusy),
    #[error("a task was cancelled")]
    Cancelled,
}

/// Brings the replica that is behind to its leader's log.
pub async fn run(shared: Arc<Shared>, behind: watch::Receiver<Behind>) -> Result<(), FetchError> {
    let began = Instant::now();
    let Behind { group, leader, .. } = *behind.borrow();
    let replica = shared.replicas.get(group).ok_or(FetchError::NoReplica)?;
    let (leader, others) = sources(&shared, &replica, leader.broker_id)?;
    let description = leader.describe().await?;
    if replica.has_entry(&description.last_log_id) {
        return Ok(());
    }
    let manifest = description.manifest;
    let (term, index) = parts(&description.last_log_id);
    info!(
        raft_group_id = %group,
        leader = leader.broker.0,
        bytes = manifest.total_bytes(),
        segments = manifest.segments.len(),
        term,
        index,
        "the replica is far behind: fetches a copy of its leader's log"
    );
    let own = own_files(&replica).await;
    let total_bytes = manifest.total_bytes();
    let storage = shared.storage.clone();
    let unfinished = shared.unfinished.take(group)?;
    let begin = move || match unfinished {
        Some(installer) => installer.go_on(manifest),
        None => storage.install(group, manifest),
    };
    let copy = Arc::new(Copy {
        shared: shared.clone(),
        installer: Arc::new(blocking(begin).await??),
        own,
        leader,
        others,
    });
    let listed = shared.copies.list(group, &copy.installer);
    let fetched = copy.fetch_all().await;
    drop(listed);
    if let Err(error) = fetched {
        // Not where the disk or the bytes are at fault.
        if matches!(error, FetchError::Source(_)) {
            let installer = copy.installer.clone();
            shared.unfinished.put(group, installer, Instant::now());
        }
        return Err(error);
    }
    let installer = copy.into_installer()?;
    let fetched = Fetched::new(installer, &description.state, index)?;
    let vote = behind.borrow().vote;
    if let Err(refused) = replica.install_copy(vote, fetched).await {
        // Its leader may be a new one, which asks in a moment.
        if let Some(installer) = refused.installer {
            let installer = Arc::new(installer);
            shared.unfinished.put(group, installer, Instant::now());
        }
        return Err(refused.error.into());
    }
    let seconds = began.elapsed().as_secs_f64();
    info!(
        raft_group_id = %group,
        index,
        bytes = total_bytes,
        seconds,
        mib_per_second = total_bytes as f64 / seconds.max(0.001) / f64::from(1 << 20),
        "the copy of the leader's log is in force"
    );
    Ok(())
}

/// The leader, and the other replicas that are in sync.
fn sources(
    shared: &Shared,
    replica: &Replica,
    leader: BrokerId,
) -> Result<(Source, Vec<Source>), SourceError> {
    let image = shared.view.borrow().image.clone();
    let group = replica.group_id();
    let source = |broker: BrokerId| {
        let address = image.brokers.get(&broker).map(|b| b.rpc_address.as_str());
        Source::new(broker, group, address)
    };
    let own = replica.replica_id().broker_id;
    let others = replica
        .isr()
        .into_iter()
        .filter(|broker| *broker != own && *broker != leader)
        .filter_map(|broker| source(broker).ok())
        .collect();
    Ok((source(leader)?, others))
}

/// What this replica has itself; None where nothing can be read.
async fn own_files(replica: &Replica) -> Option<Arc<Export>> {
    let log = replica.log().clone();
    let export = blocking(move || {
        let committed = log.committed()?;
        log.export(committed).ok()
    });
    export.await.ok().flatten().map(Arc::new)
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FetchError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| FetchError::Cancelled)
}

/// Segments on their way.
pub(super) struct Copy {
    shared: Arc<Shared>,
    installer: Arc<Installer>,
    own: Option<Arc<Export>>,
    leader: Source,
    others: Vec<Source>,
}

impl Copy {
    /// All from one replica.
    pub(super) fn of_files(shared: Arc<Shared>, installer: Installer, source: Source) -> Arc<Copy> {
        Arc::new(Copy {
            shared,
            installer: Arc::new(installer),
            own: None,
            leader: source,
            others: Vec::new(),
        })
    }

    fn segments(&self) -> &[ManifestSegment] {
        &self.installer.manifest().segments
    }

    /// Brings all segments here and checks each.
    pub(super) async fn fetch_all(self: &Arc<Self>) -> Result<(), FetchError> {
        futures::stream::iter(0..self.segments().len())
            .map(|segment| {
                let copy = self.clone();
                async move { copy.fetch(segment).await }
            })
            .buffer_unordered(SEGMENTS_PARALLEL)
            .try_collect::<Vec<()>>()
            .await?;
        Ok(())
    }

    /// With all that has come; nobody else may hold the copy.
    pub(super) fn into_installer(self: Arc<Self>) -> Result<Installer, FetchError> {
        let copy = Arc::into_inner(self).ok_or(FetchError::Cancelled)?;
        Arc::into_inner(copy.installer).ok_or(FetchError::Cancelled)
    }

    /// Brings one segment here and checks it.
    async fn fetch(&self, segment: usize) -> Result<(), FetchError> {
        let mut use_own = true;
        let mut attempt = 0;
        loop {
            if use_own {
                self.take_own(segment).await?;
            }
            let source = self.source(segment, attempt);
            let fetched = self.fetch_from(source, segment, use_own).await;
            let error = match fetched {
                Ok(()) => match self.check(segment).await {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        // Somebody's bytes are wrong, and it is not known whose: all come anew.
                        use_own = false;
                        error
                    }
                },
                Err(error) => error,
            };
            attempt += 1;
            if attempt >= SEGMENT_ATTEMPTS {
                return Err(error);
            }
            sleep(RETRY_DELAY.saturating_mul(attempt)).await;
            debug!(
                raft_group_id = %self.leader.group(),
                segment,
                error = &error as &dyn std::error::Error,
                "a segment is fetched again"
            );
        }
    }

    /// Sources take turns; after a failure only the leader is asked, which certainly has it.
    fn source(&self, segment: usize, attempt: u32) -> &Source {
        let count = self.others.len() + 1;
        match segment % count {
            turn if attempt == 0 && turn > 0 => &self.others[turn - 1],
            _ => &self.leader,
        }
    }

    /// Takes what this replica has of the segment from its own files.
    async fn take_own(&self, segment: usize) -> Result<(), FetchError> {
        let wanted = self.segments()[segment];
        let Some(own) = &self.own else { return Ok(()) };
        let segments = &own.manifest().segments;
        let Some(found) = segments.iter().position(|own| own.is_start_of(&wanted)) else {
            return Ok(());
        };
        let (own, installer) = (own.clone(), self.installer.clone());
        blocking(move || {
            for file in [SegmentFile::Log, SegmentFile::Sidecar] {
                let mut position = installer.received(segment, file);
                // What cannot be read here comes from elsewhere.
                while let Ok(bytes) = own.read_chunk(found, file, position, OWN_CHUNK_SIZE)
                    && !bytes.is_empty()
                {
                    installer.write(segment, file, position, &bytes)?;
                    position = position.saturating_add(bytes.len() as u64);
                }
            }
            Ok::<(), StorageError>(())
        })
        .await??;
        Ok(())
    }

    /// `go_on`: from where the files here end; else from the start.
    async fn fetch_from(
        &self,
        source: &Source,
        segment: usize,
        go_on: bool,
    ) -> Result<(), FetchError> {
        let wanted = self.segments()[segment];
        for file in [SegmentFile::Log, SegmentFile::Sidecar] {
            let start = match go_on {
                true => self.installer.received(segment, file),
                false => 0,
            };
            if start >= wanted.file_bytes(file) {
                continue;
            }
            let mut chunks = source.read(&wanted, file, start).await?;
            while let Some((position, bytes)) = chunks.next().await? {
                let size = bytes.len();
                let installer = self.installer.clone();
                let write = move || installer.write(segment, file, position, &bytes);
                self.in_background(write).await?;
                self.shared.metrics.copied_bytes.inc_by(size as u64);
                self.shared.throttle.passed(size).await;
            }
        }
        Ok(())
    }

    async fn in_background<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, FetchError> {
        let done = self.shared.background.run(work).await;
        Ok(done.ok_or(FetchError::Cancelled)??)
    }

    async fn check(&self, segment: usize) -> Result<(), FetchError> {
        let installer = self.installer.clone();
        self.in_background(move || installer.check_segment(segment))
            .await
    }
}
