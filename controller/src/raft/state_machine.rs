//! The metadata state machine: applies committed commands to the state, the tables and the feed.
//!
//! Invariant: an image is published and a proposer is answered only after the transaction that
//! holds the change and its log id is synced. The snapshot is the state itself as of the last
//! applied entry: the tables hold it durably, so no second copy is kept. A restored state is shown to
//! nobody until a leader has begun anew with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use chronik_types::cluster_image::ImageChange;
use chronik_types::id::{BrokerId, ControllerId, TopicId};
use futures::{FutureExt, Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};

use super::codec;
use super::type_config::{LogId, SnapshotMeta, StoredMembership, TypeConfig};
use crate::apply::apply;
use crate::command::{Outcome, PartitionKey};
use crate::db::{ClusterRow, Contents, Db, DbError, StateRows};
use crate::image_feed::ImageFeed;
use crate::state::{State, StateDump, broker_row};

/// Entries that go into one transaction.
const BATCH_ENTRIES_MAX: usize = 512;

pub type Snapshot = openraft::alias::SnapshotOf<TypeConfig, StateDump>;

/// Owned by openraft's state machine worker.
#[derive(Debug)]
pub struct StateMachine {
    state: State,
    applied: Option<LogId>,
    membership: StoredMembership,
    db: Db,
    feed: ImageFeed,
}

/// Holds the state as it was when the snapshot was asked for.
#[derive(Debug)]
pub struct SnapshotBuilder {
    state: State,
    meta: SnapshotMeta,
}

impl StateMachine {
    pub fn new(
        db: Db,
        contents: &mut Contents,
        watch_history_max: usize,
    ) -> Result<(Self, ImageFeed), DbError> {
        let state = contents.state.take().map(State::from).unwrap_or_default();
        let (applied, membership) = match &contents.applied {
            Some(row) => codec::applied_from_row(row)?,
            None => Default::default(),
        };
        let feed = ImageFeed::new(state.image.clone(), watch_history_max);
        if state.pending_restore.is_some() {
            feed.hold_back();
        }
        Ok((
            Self {
                state,
                applied,
                membership,
                db,
                feed: feed.clone(),
            },
            feed,
        ))
    }

    fn meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: self.applied,
            last_membership: self.membership.clone(),
        }
    }

    /// Applies one entry in memory.
    fn apply_entry(
        &mut self,
        (entry, responder): EntryResponder<TypeConfig>,
        batch: &mut Batch,
    ) -> io::Result<()> {
        let log_id = entry.log_id;
        let outcome = match entry.payload {
            EntryPayload::Blank => Outcome::Done,
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(log_id), membership);
                Outcome::Done
            }
            EntryPayload::Normal(proposal) => {
                let command = proposal.decode().map_err(|error| {
                    io::Error::other(format!(
                        "log entry {log_id} is not a known command: {error}"
                    ))
                })?;
                let was_pending = self.state.pending_restore.is_some();
                let (outcome, change) = apply(&mut self.state, command);
                batch.begins_anew |= was_pending && self.state.pending_restore.is_none();
                if let Some(change) = change {
                    batch.touched.add(&change);
                    batch.changes.push(change);
                }
                outcome
            }
        };
        self.applied = Some(log_id);
        batch
            .answers
            .extend(responder.map(|responder| (responder, outcome)));
        Ok(())
    }

    async fn finish(&mut self, batch: Batch) -> io::Result<()> {
        let rows = batch.touched.rows(self)?;
        self.db.save_state(rows).await?;
        if batch.begins_anew {
            self.feed.reset(self.state.image.clone());
        } else if !batch.changes.is_empty() {
            self.feed.publish(self.state.image.clone(), batch.changes);
        }
        for (responder, outcome) in batch.answers {
            responder.send(outcome);
        }
        Ok(())
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = StateDump;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        while let Some(first) = entries.next().await {
            let mut batch = Batch::default();
            self.apply_entry(first?, &mut batch)?;
            for _ in 1..BATCH_ENTRIES_MAX {
                let Some(Some(next)) = entries.next().now_or_never() else {
                    break;
                };
                self.apply_entry(next?, &mut batch)?;
            }
            self.finish(batch).await?;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            state: self.state.clone(),
            meta: self.meta(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, dump: StateDump) -> io::Result<()> {
        let applied = codec::applied_row(meta.last_log_id.as_ref(), &meta.last_membership)?;
        self.db.replace_state(dump.clone(), applied).await?;
        self.state = State::from(dump);
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        match self.state.pending_restore {
            None => self.feed.reset(self.state.image.clone()),
            Some(_) => self.feed.hold_back(),
        }
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        if self.applied.is_none() {
            return Ok(None);
        }
        Ok(Some(Snapshot {
            meta: self.meta(),
            snapshot: StateDump::from(&self.state),
        }))
    }
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = StateDump;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        Ok(Snapshot {
            meta: self.meta.clone(),
            snapshot: StateDump::from(&self.state),
        })
    }
}

/// Entries applied in memory and not yet in the tables.
#[derive(Default)]
struct Batch {
    touched: Touched,
    changes: Vec<ImageChange>,
    /// The first image after a restore: it did not come from the one before.
    begins_anew: bool,
    answers: Vec<(openraft::storage::ApplyResponder<TypeConfig>, Outcome)>,
}

/// Which rows the batch changed.
#[derive(Default)]
struct Touched {
    controllers: BTreeSet<ControllerId>,
    brokers: BTreeSet<BrokerId>,
    gateways: BTreeSet<String>,
    topics: BTreeSet<TopicId>,
    partitions: BTreeMap<TopicId, BTreeSet<PartitionKey>>,
}

impl Touched {
    fn add(&mut self, change: &ImageChange) {
        self.controllers
            .extend(change.controllers.iter().map(|c| c.controller_id));
        self.brokers
            .extend(change.brokers.iter().map(|b| b.broker_id));
        self.brokers.extend(&change.removed_brokers);
        self.gateways
            .extend(change.gateways.iter().map(|g| g.gateway_id.clone()));
        self.gateways
            .extend(change.removed_gateways.iter().cloned());
        self.topics
            .extend(change.topics.iter().map(|topic| topic.topic_id));
        self.topics.extend(&change.removed_topics);
        for (topic_id, partition) in &change.partitions {
            let key = (*topic_id, partition.partition);
            self.partitions.entry(*topic_id).or_default().insert(key);
        }
    }

    /// The touched rows as they are now.
    fn rows(self, machine: &StateMachine) -> io::Result<StateRows> {
        let (state, image) = (&machine.state, &machine.state.image);
        let (topics, removed_topics) = split(
            self.topics.iter(),
            |id| image.topic(**id).cloned(),
            |id| *id,
        );
        let (gateways, removed_gateways) = split(
            self.gateways.iter(),
            |id| image.gateways.get(*id).cloned(),
            |id| id.clone(),
        );
        let partitions = self
            .partitions
            .into_iter()
            .filter(|(topic_id, _)| !self.topics.contains(topic_id))
            .flat_map(|(_, keys)| keys)
            .filter_map(|(topic_id, index)| {
                let partition = image.topic(topic_id)?.partition(index)?;
                Some((topic_id, partition.clone()))
            })
            .collect();
        let present = |id: &ControllerId| image.controllers.get(id).cloned();
        let (brokers, removed_brokers) = split(
            self.brokers.iter(),
            |id| {
                image
                    .brokers
                    .get(*id)
                    .map(|broker| broker_row(state, broker))
            },
            |id| *id,
        );
        Ok(StateRows {
            applied: codec::applied_row(machine.applied.as_ref(), &machine.membership)?,
            cluster: ClusterRow {
                cluster_id: image.cluster_id.clone(),
                revision: image.revision,
                controller_leader: image.controller_leader,
                next_raft_group_id: state.next_raft_group_id,
                next_producer_id: state.next_producer_id,
                settings: image.settings.clone(),
                restores: image.restores.clone(),
                pending_restore: state.pending_restore.clone(),
            },
            controllers: self.controllers.iter().filter_map(present).collect(),
            brokers,
            removed_brokers,
            gateways,
            removed_gateways,
            topics,
            removed_topics,
            partitions,
        })
    }
}

/// Those that are there now, and the keys of those that are not.
fn split<K: Copy, T, R>(
    keys: impl Iterator<Item = K>,
    present: impl Fn(&K) -> Option<T>,
    key: impl Fn(K) -> R,
) -> (Vec<T>, Vec<R>) {
    let (mut found, mut gone) = (Vec::new(), Vec::new());
    for item in keys {
        match present(&item) {
            Some(value) => found.push(value),
            None => gone.push(key(item)),
        }
    }
    (found, gone)
}
