//! Table raft_identity.

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::DbError;
use super::raft_tables::{signed, unsigned};
use crate::founding::{Founder, Identity, NodeId};

pub async fn load(connection: &mut SqliteConnection) -> Result<Option<Identity>, DbError> {
    type Row = (String, Option<i64>, Option<i64>, String);
    let row: Option<Row> =
        sqlx::query_as("SELECT disk_id, controller_id, incarnation, founders FROM raft_identity")
            .fetch_optional(connection)
            .await?;
    let Some((disk_id, controller_id, incarnation, founders)) = row else {
        return Ok(None);
    };
    let corrupt = |why: String| DbError::Corrupt {
        what: "identity",
        why,
    };
    let node_id = match (controller_id, incarnation) {
        (Some(controller_id), Some(incarnation)) => Some(
            NodeId::new(
                unsigned("controller id", controller_id)?,
                unsigned("incarnation", incarnation)?,
            )
            .ok_or_else(|| corrupt(format!("{controller_id} and {incarnation}")))?,
        ),
        _ => None,
    };
    let founders: Vec<Founder> =
        serde_json::from_str(&founders).map_err(|error| corrupt(error.to_string()))?;
    Ok(Some(Identity {
        disk_id: Uuid::try_parse(&disk_id).map_err(|error| corrupt(error.to_string()))?,
        node_id,
        founders,
    }))
}

pub async fn save(connection: &mut SqliteConnection, identity: &Identity) -> Result<(), DbError> {
    let founders = serde_json::to_string(&identity.founders).map_err(|error| DbError::Corrupt {
        what: "identity",
        why: error.to_string(),
    })?;
    sqlx::query(
        "INSERT OR REPLACE INTO raft_identity (id, disk_id, controller_id, incarnation, founders)
         VALUES (1, ?, ?, ?, ?)",
    )
    .bind(identity.disk_id.to_string())
    .bind(identity.node_id.map(|id| signed(id.controller_id())))
    .bind(identity.node_id.map(|id| signed(id.incarnation())))
    .bind(founders)
    .execute(connection)
    .await?;
    Ok(())
}
