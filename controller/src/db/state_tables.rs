//! The state tables: cluster, controllers, brokers, gateways, topics, partitions, raft_applied.
//!
//! Rows go in as one JSON list per table, so that a change of thousands of partitions is one
//! statement.

use std::sync::Arc;

use chronik_types::cluster_image::{
    Broker, ClusterSettings, Controller, Gateway, Partition, Restore, Topic,
};
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, ControllerId, PartitionIndex, RaftGroupId, TopicId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::SqliteConnection;
use uuid::Uuid;

use super::DbError;
use super::raft_tables::{LogPosition, signed, unsigned};
use crate::state::{BrokerRow, PendingRestore, SCHEMA_VERSION, StateDump};

/// How far the state is: the last applied log entry, and the membership in force there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppliedRow {
    pub position: Option<LogPosition>,
    pub membership_position: Option<LogPosition>,
    /// JSON.
    pub membership: String,
}

/// The table `cluster`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterRow {
    pub cluster_id: String,
    pub revision: u64,
    pub controller_leader: Option<ControllerId>,
    pub next_raft_group_id: u64,
    pub next_producer_id: i64,
    pub settings: ClusterSettings,
    pub restores: Vec<Restore>,
    pub pending_restore: Option<PendingRestore>,
}

/// The rows that some applied commands touched, as they are afterwards.
#[derive(Debug, Clone)]
pub struct StateRows {
    pub applied: AppliedRow,
    pub cluster: ClusterRow,
    pub controllers: Vec<Controller>,
    pub brokers: Vec<BrokerRow>,
    pub removed_brokers: Vec<BrokerId>,
    pub gateways: Vec<Gateway>,
    pub removed_gateways: Vec<String>,
    /// Topics of which every partition is written.
    pub topics: Vec<Arc<Topic>>,
    pub removed_topics: Vec<TopicId>,
    pub partitions: Vec<(TopicId, Partition)>,
}

pub async fn save(connection: &mut SqliteConnection, rows: &StateRows) -> Result<(), DbError> {
    save_applied(connection, &rows.applied).await?;
    save_cluster(connection, &rows.cluster).await?;
    for removed in &rows.removed_brokers {
        sqlx::query("DELETE FROM brokers WHERE broker_id = ?")
            .bind(removed.0)
            .execute(&mut *connection)
            .await?;
    }
    for removed in &rows.removed_gateways {
        sqlx::query("DELETE FROM gateways WHERE gateway_id = ?")
            .bind(removed)
            .execute(&mut *connection)
            .await?;
    }
    for removed in &rows.removed_topics {
        delete_topic(connection, *removed).await?;
    }
    put(connection, PUT_CONTROLLERS, &rows.controllers).await?;
    put(connection, PUT_BROKERS, &rows.brokers).await?;
    put(connection, PUT_GATEWAYS, &rows.gateways).await?;
    put_topics(connection, &rows.topics).await?;
    let partitions: Vec<_> = rows.partitions.iter().map(|(id, p)| (id, p)).collect();
    put(connection, PUT_PARTITIONS, &partitions).await
}

/// Puts a snapshot in place of everything.
pub async fn replace(
    connection: &mut SqliteConnection,
    dump: &StateDump,
    applied: &AppliedRow,
) -> Result<(), DbError> {
    for sql in [
        "DELETE FROM controllers",
        "DELETE FROM brokers",
        "DELETE FROM gateways",
        "DELETE FROM topics",
        "DELETE FROM partitions",
    ] {
        sqlx::query(sql).execute(&mut *connection).await?;
    }
    let rows = StateRows {
        applied: applied.clone(),
        cluster: ClusterRow {
            cluster_id: dump.cluster_id.clone(),
            revision: dump.revision,
            controller_leader: dump.controller_leader,
            next_raft_group_id: dump.next_raft_group_id,
            next_producer_id: dump.next_producer_id,
            settings: dump.settings.clone(),
            restores: dump.restores.clone(),
            pending_restore: dump.pending_restore.clone(),
        },
        controllers: dump.controllers.clone(),
        brokers: dump.brokers.clone(),
        removed_brokers: Vec::new(),
        gateways: dump.gateways.clone(),
        removed_gateways: Vec::new(),
        topics: dump.topics.clone(),
        removed_topics: Vec::new(),
        partitions: Vec::new(),
    };
    save(connection, &rows).await
}

/// Everything, or nothing where the database is new.
pub async fn load(
    connection: &mut SqliteConnection,
) -> Result<(Option<AppliedRow>, Option<StateDump>), DbError> {
    #[derive(sqlx::FromRow)]
    struct Row {
        cluster_id: String,
        revision: i64,
        controller_leader: Option<i64>,
        next_raft_group_id: i64,
        next_producer_id: i64,
        settings: String,
        restores: String,
        pending_restore: Option<String>,
    }
    let applied = load_applied(connection).await?;
    let cluster: Option<Row> = sqlx::query_as(
        "SELECT cluster_id, revision, controller_leader, next_raft_group_id, next_producer_id,
                settings, restores, pending_restore
         FROM cluster",
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = cluster else {
        return Ok((applied, None));
    };
    let controller_leader = row
        .controller_leader
        .map(|id| unsigned("leader", id))
        .transpose()?
        .map(ControllerId);
    let dump = StateDump {
        schema_version: SCHEMA_VERSION,
        cluster_id: row.cluster_id,
        revision: unsigned("revision", row.revision)?,
        controller_leader,
        next_raft_group_id: unsigned("raft group id", row.next_raft_group_id)?,
        next_producer_id: row.next_producer_id,
        controllers: load_controllers(connection).await?,
        brokers: load_brokers(connection).await?,
        gateways: load_gateways(connection).await?,
        topics: load_topics(connection).await?,
        settings: json("settings", &row.settings)?,
        restores: json("restores", &row.restores)?,
        pending_restore: row
            .pending_restore
            .map(|text| json("pending restore", &text))
            .transpose()?,
    };
    Ok((applied, Some(dump)))
}

const PUT_CONTROLLERS: &str = "INSERT OR REPLACE INTO controllers
    SELECT value->>'controller_id', value->>'rpc_address', value->>'rest_address'
    FROM json_each(?)";
const PUT_BROKERS: &str = "INSERT OR REPLACE INTO brokers
    SELECT value->>'broker_id', value->>'incarnation_id', value->>'broker_epoch',
           value->>'rpc_address', value->>'rack', value->>'fenced', value->>'storage_id',
           value->>'drain'
    FROM json_each(?)";
const PUT_GATEWAYS: &str = "INSERT OR REPLACE INTO gateways
    SELECT value->>'gateway_id', value->>'incarnation_id', value->>'rack', value->'endpoints'
    FROM json_each(?)";
const PUT_TOPICS: &str = "INSERT OR REPLACE INTO topics
    SELECT value->>'topic_id', value->>'name', value->'configs' FROM json_each(?)";
const PUT_PARTITIONS: &str = "INSERT OR REPLACE INTO partitions
    SELECT value->>0, value->1->>'partition', value->1->>'raft_group_id', value->1->'replicas',
           value->1->'isr', value->1->>'leader', value->1->>'leader_epoch',
           value->1->>'partition_epoch',
           value->1->>'reassignment', value->1->>'wanted_leader'
    FROM json_each(?)";
/// Rows of one statement: bounds the JSON text in memory.
const ROWS_PER_STATEMENT: usize = 5000;

async fn put<T: Serialize>(
    connection: &mut SqliteConnection,
    sql: &'static str,
    rows: &[T],
) -> Result<(), DbError> {
    for rows in rows.chunks(ROWS_PER_STATEMENT) {
        sqlx::query(sql)
            .bind(text("rows", &rows)?)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

async fn put_topics(
    connection: &mut SqliteConnection,
    topics: &[Arc<Topic>],
) -> Result<(), DbError> {
    #[derive(Serialize)]
    struct TopicRow<'a> {
        topic_id: TopicId,
        name: &'a str,
        configs: &'a std::collections::BTreeMap<String, String>,
    }
    let rows: Vec<_> = topics
        .iter()
        .map(|t| TopicRow {
            topic_id: t.topic_id,
            name: &t.name,
            configs: &t.configs,
        })
        .collect();
    put(connection, PUT_TOPICS, &rows).await?;
    let partitions: Vec<_> = topics
        .iter()
        .flat_map(|t| t.partitions.iter().map(|p| (t.topic_id, p)))
        .collect();
    put(connection, PUT_PARTITIONS, &partitions).await
}

async fn delete_topic(connection: &mut SqliteConnection, id: TopicId) -> Result<(), DbError> {
    for sql in [
        "DELETE FROM topics WHERE topic_id = ?",
        "DELETE FROM partitions WHERE topic_id = ?",
    ] {
        sqlx::query(sql)
            .bind(id.to_string())
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

async fn save_applied(
    connection: &mut SqliteConnection,
    applied: &AppliedRow,
) -> Result<(), DbError> {
    sqlx::query("INSERT OR REPLACE INTO raft_applied VALUES (1, ?, ?, ?, ?, ?)")
        .bind(applied.position.map(|p| signed(p.index)))
        .bind(applied.position.map(|p| signed(p.term)))
        .bind(applied.membership_position.map(|p| signed(p.index)))
        .bind(applied.membership_position.map(|p| signed(p.term)))
        .bind(&applied.membership)
        .execute(connection)
        .await?;
    Ok(())
}

async fn save_cluster(
    connection: &mut SqliteConnection,
    cluster: &ClusterRow,
) -> Result<(), DbError> {
    let pending_restore = cluster.pending_restore.as_ref();
    let pending_restore = pending_restore
        .map(|pending| text("pending restore", pending))
        .transpose()?;
    sqlx::query("INSERT OR REPLACE INTO cluster VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?)")
        .bind(&cluster.cluster_id)
        .bind(signed(cluster.revision))
        .bind(cluster.controller_leader.map(|id| signed(id.0)))
        .bind(signed(cluster.next_raft_group_id))
        .bind(cluster.next_producer_id)
        .bind(text("settings", &cluster.settings)?)
        .bind(text("restores", &cluster.restores)?)
        .bind(pending_restore)
        .execute(connection)
        .await?;
    Ok(())
}

async fn load_applied(connection: &mut SqliteConnection) -> Result<Option<AppliedRow>, DbError> {
    type Row = (Option<i64>, Option<i64>, Option<i64>, Option<i64>, String);
    let row: Option<Row> = sqlx::query_as(
        "SELECT log_index, term, membership_log_index, membership_term, membership
         FROM raft_applied",
    )
    .fetch_optional(connection)
    .await?;
    let position = |index: Option<i64>, term: Option<i64>| match (index, term) {
        (Some(index), Some(term)) => Ok::<_, DbError>(Some(LogPosition {
            index: unsigned("log index", index)?,
            term: unsigned("term", term)?,
        })),
        _ => Ok(None),
    };
    row.map(
        |(index, term, membership_index, membership_term, membership)| {
            Ok(AppliedRow {
                position: position(index, term)?,
                membership_position: position(membership_index, membership_term)?,
                membership,
            })
        },
    )
    .transpose()
}

async fn load_controllers(connection: &mut SqliteConnection) -> Result<Vec<Controller>, DbError> {
    let rows: Vec<(i64, String, String)> =
        sqlx::query_as("SELECT controller_id, rpc_address, rest_address FROM controllers")
            .fetch_all(connection)
            .await?;
    rows.into_iter()
        .map(|(id, rpc_address, rest_address)| {
            let controller_id = ControllerId(unsigned("controller id", id)?);
            Ok(Controller {
                controller_id,
                rpc_address,
                rest_address,
            })
        })
        .collect()
}

async fn load_brokers(connection: &mut SqliteConnection) -> Result<Vec<BrokerRow>, DbError> {
    type Row = (
        i32,
        String,
        i64,
        String,
        Option<String>,
        bool,
        String,
        String,
    );
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT broker_id, incarnation_id, broker_epoch, rpc_address, rack, fenced, storage_id,
                drain
         FROM brokers",
    )
    .fetch_all(connection)
    .await?;
    rows.into_iter()
        .map(
            |(broker_id, incarnation_id, epoch, rpc_address, rack, fenced, storage_id, drain)| {
                let broker = Broker {
                    broker_id: BrokerId(broker_id),
                    incarnation_id: uuid(&incarnation_id)?,
                    broker_epoch: BrokerEpoch(unsigned("broker epoch", epoch)?),
                    rpc_address,
                    rack,
                    fenced,
                    drain: json("drain", &format!("\"{drain}\""))?,
                };
                Ok(BrokerRow {
                    broker,
                    storage_id: uuid(&storage_id)?,
                })
            },
        )
        .collect()
}

async fn load_gateways(connection: &mut SqliteConnection) -> Result<Vec<Gateway>, DbError> {
    let rows: Vec<(String, String, Option<String>, String)> =
        sqlx::query_as("SELECT gateway_id, incarnation_id, rack, endpoints FROM gateways")
            .fetch_all(connection)
            .await?;
    rows.into_iter()
        .map(|(gateway_id, incarnation_id, rack, endpoints)| {
            Ok(Gateway {
                gateway_id,
                incarnation_id: uuid(&incarnation_id)?,
                rack,
                endpoints: json("endpoints", &endpoints)?,
            })
        })
        .collect()
}

async fn load_topics(connection: &mut SqliteConnection) -> Result<Vec<Arc<Topic>>, DbError> {
    let rows: Vec<(String, String, String)> =
        sqlx::query_as("SELECT topic_id, name, configs FROM topics ORDER BY topic_id")
            .fetch_all(&mut *connection)
            .await?;
    let mut partitions = load_partitions(connection).await?.into_iter().peekable();
    let mut topics = Vec::with_capacity(rows.len());
    for (topic_id, name, configs) in rows {
        let mut topic = Topic {
            topic_id: TopicId(uuid(&topic_id)?),
            name: name.into(),
            configs: json("configs", &configs)?,
            partitions: Vec::new(),
        };
        while let Some((_, partition)) = partitions.next_if(|(id, _)| *id == topic_id) {
            topic.partitions.push(partition);
        }
        topics.push(Arc::new(topic));
    }
    Ok(topics)
}

/// All partitions with their topic's id, by topic and index.
async fn load_partitions(
    connection: &mut SqliteConnection,
) -> Result<Vec<(String, Partition)>, DbError> {
    #[derive(sqlx::FromRow)]
    struct Row {
        topic_id: String,
        partition_index: i32,
        raft_group_id: i64,
        replicas: String,
        isr: String,
        leader: Option<i32>,
        leader_epoch: i32,
        partition_epoch: i32,
        reassignment: Option<String>,
        wanted_leader: Option<i32>,
    }
    let rows: Vec<Row> =
        sqlx::query_as("SELECT * FROM partitions ORDER BY topic_id, partition_index")
            .fetch_all(connection)
            .await?;
    rows.into_iter()
        .map(|row| {
            let reassignment = row.reassignment.as_deref();
            let partition = Partition {
                partition: PartitionIndex(row.partition_index),
                raft_group_id: RaftGroupId(unsigned("raft group id", row.raft_group_id)?),
                replicas: json("replicas", &row.replicas)?,
                isr: json("isr", &row.isr)?,
                leader: row.leader.map(BrokerId),
                leader_epoch: LeaderEpoch(row.leader_epoch),
                partition_epoch: PartitionEpoch(row.partition_epoch),
                reassignment: reassignment
                    .map(|text| json("reassignment", text))
                    .transpose()?,
                wanted_leader: row.wanted_leader.map(BrokerId),
            };
            Ok((row.topic_id, partition))
        })
        .collect()
}

pub(super) fn uuid(text: &str) -> Result<Uuid, DbError> {
    text.parse().map_err(|_| DbError::Corrupt {
        what: "uuid",
        why: text.to_owned(),
    })
}

pub(super) fn text<T: Serialize>(what: &'static str, value: &T) -> Result<String, DbError> {
    serde_json::to_string(value).map_err(|error| DbError::Corrupt {
        what,
        why: error.to_string(),
    })
}

pub(super) fn json<T: DeserializeOwned>(what: &'static str, text: &str) -> Result<T, DbError> {
    serde_json::from_str(text).map_err(|error| DbError::Corrupt {
        what,
        why: error.to_string(),
    })
}
