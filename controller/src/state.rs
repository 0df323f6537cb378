//! The metadata state machine's state: the image that everybody sees, and the little besides it
//! that only controllers need.
//!
//! Invariant: `groups` names exactly the partitions of the image, and every id handed out is below
//! its counter.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use chronik_types::cluster_image::{
    Broker, ClusterImage, ClusterSettings, Controller, Gateway, ImageChange, Restore, Topic,
};
use chronik_types::id::{BrokerId, ControllerId, RaftGroupId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::command::PartitionKey;

/// Version of the tables and of `StateDump`; a snapshot of a higher one is refused.
pub const SCHEMA_VERSION: u32 = 3;

/// All metadata at one point of the log. Owned by the Raft state machine.
#[derive(Debug, Clone)]
pub struct State {
    pub image: Arc<ClusterImage>,
    /// The data folder each broker registered with last.
    pub storage_ids: BTreeMap<BrokerId, Uuid>,
    pub next_raft_group_id: u64,
    pub next_producer_id: i64,
    pub groups: HashMap<RaftGroupId, PartitionKey>,
    /// The backup that this state was taken from, until a leader has begun anew with it.
    pub pending_restore: Option<PendingRestore>,
}

/// A backup that was restored, and not begun with yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRestore {
    pub backup_id: Uuid,
    pub backup_revision: u64,
}

impl PendingRestore {
    /// Controllers that found a group together have to hold the same.
    pub fn base(&self) -> String {
        format!("{} of revision {}", self.backup_id, self.backup_revision)
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            image: Arc::default(),
            storage_ids: BTreeMap::new(),
            next_raft_group_id: 1,
            next_producer_id: 0,
            groups: HashMap::new(),
            pending_restore: None,
        }
    }
}

impl State {
    /// The revision that the next change will have.
    pub fn next_revision(&self) -> u64 {
        self.image.revision.saturating_add(1)
    }

    /// Puts a change in force.
    pub fn commit(&mut self, change: &ImageChange) {
        Arc::make_mut(&mut self.image).apply(change.clone());
    }
}

/// The whole state as plain rows: what a snapshot carries and what the tables hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateDump {
    pub schema_version: u32,
    pub cluster_id: String,
    pub revision: u64,
    pub controller_leader: Option<ControllerId>,
    pub next_raft_group_id: u64,
    pub next_producer_id: i64,
    pub controllers: Vec<Controller>,
    pub brokers: Vec<BrokerRow>,
    pub gateways: Vec<Gateway>,
    pub topics: Vec<Arc<Topic>>,
    /// Since schema version 2.
    #[serde(default)]
    pub settings: ClusterSettings,
    /// Since schema version 3.
    #[serde(default)]
    pub restores: Vec<Restore>,
    /// Since schema version 3.
    #[serde(default)]
    pub pending_restore: Option<PendingRestore>,
}

/// A broker and what only controllers know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BrokerRow {
    #[serde(flatten)]
    pub broker: Broker,
    pub storage_id: Uuid,
}

impl From<&State> for StateDump {
    fn from(state: &State) -> Self {
        let image = &state.image;
        let mut topics: Vec<_> = image.topics.values().cloned().collect();
        topics.sort_unstable_by_key(|topic| topic.topic_id);
        Self {
            schema_version: SCHEMA_VERSION,
            cluster_id: image.cluster_id.clone(),
            revision: image.revision,
            controller_leader: image.controller_leader,
            next_raft_group_id: state.next_raft_group_id,
            next_producer_id: state.next_producer_id,
            controllers: image.controllers.values().cloned().collect(),
            brokers: image
                .brokers
                .values()
                .map(|broker| broker_row(state, broker))
                .collect(),
            gateways: image.gateways.values().cloned().collect(),
            topics,
            settings: image.settings.clone(),
            restores: image.restores.clone(),
            pending_restore: state.pending_restore.clone(),
        }
    }
}

impl From<StateDump> for State {
    fn from(dump: StateDump) -> Self {
        let groups = dump
            .topics
            .iter()
            .flat_map(|topic| {
                topic
                    .partitions
                    .iter()
                    .map(|p| (p.raft_group_id, (topic.topic_id, p.partition)))
            })
            .collect();
        let storage_ids = dump
            .brokers
            .iter()
            .map(|row| (row.broker.broker_id, row.storage_id))
            .collect();
        let mut image = ClusterImage {
            cluster_id: dump.cluster_id,
            restores: dump.restores,
            ..Default::default()
        };
        image.apply(ImageChange {
            revision: dump.revision,
            controller_leader: Some(dump.controller_leader),
            controllers: dump.controllers,
            brokers: dump.brokers.into_iter().map(|row| row.broker).collect(),
            gateways: dump.gateways,
            topics: dump.topics,
            settings: Some(dump.settings),
            ..Default::default()
        });
        Self {
            image: Arc::new(image),
            storage_ids,
            next_raft_group_id: dump.next_raft_group_id,
            next_producer_id: dump.next_producer_id,
            groups,
            pending_restore: dump.pending_restore,
        }
    }
}

/// The table row of a broker of the image.
pub fn broker_row(state: &State, broker: &Broker) -> BrokerRow {
    let storage_id = state
        .storage_ids
        .get(&broker.broker_id)
        .copied()
        .unwrap_or_default();
    BrokerRow {
        broker: broker.clone(),
        storage_id,
    }
}
