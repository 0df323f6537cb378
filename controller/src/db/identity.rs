//! Table raft_identity.

use sqlx::SqliteConnection;

use super::DbError;
use super::raft_tables::{signed, unsigned};
use super::state_tables::{json, text, uuid};
use crate::founding::{Identity, NodeId};

pub async fn load(connection: &mut SqliteConnection) -> Result<Option<Identity>, DbError> {
    type Row = (String, Option<i64>, Option<i64>, String);
    let row: Option<Row> =
        sqlx::query_as("SELECT disk_id, controller_id, incarnation, founders FROM raft_identity")
            .fetch_optional(connection)
            .await?;
    let Some((disk_id, controller_id, incarnation, founders)) = row else {
        return Ok(None);
    };
    let node_id = match (controller_id, incarnation) {
        (Some(controller_id), Some(incarnation)) => Some(
            NodeId::new(
                unsigned("controller id", controller_id)?,
                unsigned("incarnation", incarnation)?,
            )
            .ok_or_else(|| DbError::Corrupt {
                what: "identity",
                why: format!("{controller_id} and {incarnation}"),
            })?,
        ),
        _ => None,
    };
    Ok(Some(Identity {
        disk_id: uuid(&disk_id)?,
        node_id,
        founders: json("founders", &founders)?,
    }))
}

pub async fn save(connection: &mut SqliteConnection, identity: &Identity) -> Result<(), DbError> {
    sqlx::query(
        "INSERT OR REPLACE INTO raft_identity (id, disk_id, controller_id, incarnation, founders)
         VALUES (1, ?, ?, ?, ?)",
    )
    .bind(identity.disk_id.to_string())
    .bind(identity.node_id.map(|id| signed(id.controller_id())))
    .bind(identity.node_id.map(|id| signed(id.incarnation())))
    .bind(text("founders", &identity.founders)?)
    .execute(connection)
    .await?;
    Ok(())
}
