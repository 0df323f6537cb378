//! Files of the state alone, without Raft's log and vote: a backup, and the database of a controller
//! that is to begin with one.
//!
//! Invariant: a file is complete and synced when its function returns. What is read from a backup is
//! what was written into it, or an error.

use std::path::Path;

use crc_fast::{CrcAlgorithm, Digest};
use futures::TryStreamExt;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};
use uuid::Uuid;

use super::raft_tables::{self, LogPosition, VoteRow};
use super::state_tables::{self, AppliedRow};
use super::{DbError, MIGRATIONS, execute, identity, migrate};
use crate::founding::Identity;
use crate::state::StateDump;

/// What a backup is, besides the state that it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    pub backup_id: Uuid,
    pub created_at_ms: i64,
}

/// Why a file is not taken for a backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("it is damaged, or no backup of a Chronik controller: {0}")]
    Damaged(String),
    #[error("it is no backup: {0}")]
    NoBackup(&'static str),
    #[error("it was made by a newer version of Chronik, whose schema this one does not know")]
    Newer,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What Raft finds in the database of a controller that begins with a backup.
#[derive(Debug, Clone)]
pub struct RaftStart {
    pub applied: AppliedRow,
    pub purged: LogPosition,
    pub vote: VoteRow,
}

/// Writes a backup into a file that does not exist.
pub async fn write(file: &Path, dump: &StateDump, label: &BackupLabel) -> Result<(), DbError> {
    let mut connection = create(file).await?;
    let applied = AppliedRow {
        position: None,
        membership_position: None,
        membership: "null".to_owned(),
    };
    state_tables::replace(&mut connection, dump, &applied).await?;
    let backup_id = label.backup_id.to_string();
    let checksum = checksum_of(&mut connection, &backup_id, label.created_at_ms).await?;
    sqlx::query("INSERT INTO backup (id, backup_id, created_at_ms, checksum) VALUES (1, ?, ?, ?)")
        .bind(backup_id)
        .bind(label.created_at_ms)
        .bind(checksum)
        .execute(&mut connection)
        .await?;
    close(connection).await
}

/// Reads a backup, from a copy of it that may be written to: an older one is brought to the present
/// schema, after a look whether it is what was written.
pub async fn read(copy: &Path) -> Result<(StateDump, BackupLabel), BackupError> {
    let damaged = |error: sqlx::Error| BackupError::Damaged(error.to_string());
    let mut connection = options(copy).connect().await.map_err(damaged)?;
    let verdict: String = sqlx::query_scalar("PRAGMA integrity_check(1)")
        .fetch_one(&mut connection)
        .await
        .map_err(damaged)?;
    if verdict != "ok" {
        return Err(BackupError::Damaged(verdict));
    }
    // Before anything that a newer version may have changed.
    if is_newer(&mut connection).await.map_err(damaged)? {
        return Err(BackupError::Newer);
    }
    let label = load_label(&mut connection).await.map_err(damaged)?;
    if let Some((backup_id, created_at_ms, checksum)) = &label {
        let found = checksum_of(&mut connection, backup_id, *created_at_ms).await;
        if found.map_err(damaged)? != *checksum {
            return Err(BackupError::Damaged("its checksum is wrong".to_owned()));
        }
    }
    migrate(&mut connection)
        .await
        .map_err(|error| BackupError::Damaged(error.to_string()))?;
    let (_, dump) = state_tables::load(&mut connection).await?;
    let Some((backup_id, created_at_ms, _)) = label else {
        return Err(BackupError::NoBackup(match dump {
            Some(_) => "it is the database of a controller",
            None => "it holds no state of a cluster",
        }));
    };
    let dump = dump.ok_or(BackupError::NoBackup("it holds no state of a cluster"))?;
    let backup_id = Uuid::try_parse(&backup_id)
        .map_err(|error| BackupError::Damaged(format!("its id: {error}")))?;
    connection.close().await.map_err(damaged)?;
    let label = BackupLabel {
        backup_id,
        created_at_ms,
    };
    Ok((dump, label))
}

/// Writes the database of a controller that has not taken part yet and begins with `dump`.
pub async fn write_restored(
    file: &Path,
    dump: &StateDump,
    raft: &RaftStart,
) -> Result<(), DbError> {
    let mut connection = create(file).await?;
    state_tables::replace(&mut connection, dump, &raft.applied).await?;
    raft_tables::purge(&mut connection, raft.purged).await?;
    raft_tables::save_vote(&mut connection, raft.vote).await?;
    identity::save(&mut connection, &Identity::of_new_disk(Uuid::new_v4())).await?;
    close(connection).await
}

/// Whether the file has seen a migration that is not known here.
async fn is_newer(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    if !has_table(connection, "_sqlx_migrations").await? {
        return Ok(false);
    }
    let versions: Vec<i64> = sqlx::query_scalar("SELECT version FROM _sqlx_migrations")
        .fetch_all(connection)
        .await?;
    Ok(versions
        .iter()
        .any(|version| !MIGRATIONS.version_exists(*version)))
}

async fn has_table(connection: &mut SqliteConnection, name: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?)",
    )
    .bind(name)
    .fetch_one(connection)
    .await
}

/// The backup's id, when it was made, and its checksum; none where nothing says that it is a backup.
async fn load_label(
    connection: &mut SqliteConnection,
) -> Result<Option<(String, i64, i64)>, sqlx::Error> {
    // Databases of an older schema, or of somebody else, have no such table.
    if !has_table(connection, "backup").await? {
        return Ok(None);
    }
    sqlx::query_as("SELECT backup_id, created_at_ms, checksum FROM backup")
        .fetch_optional(connection)
        .await
}

/// The label and every row of the state as one number, whatever tables and columns the file has: a backup keeps
/// its checksum when later schemas get more of them. Rows come in the order of their keys, which needs no sorting.
/// How the number is made must never change.
async fn checksum_of(
    connection: &mut SqliteConnection,
    backup_id: &str,
    created_at_ms: i64,
) -> Result<i64, sqlx::Error> {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    let mut add = |text: &str| {
        digest.update(text.as_bytes());
        digest.update(b"\n");
    };
    add(backup_id);
    add(&created_at_ms.to_string());
    // One query for each table. Names are quoted, as the file may be anybody's.
    let tables: Vec<(String, String, String)> = sqlx::query_as(
        r#"SELECT t.name, group_concat(c.name, ',' ORDER BY c.cid),
                format('SELECT %s FROM "%w" ORDER BY %s',
                    group_concat(format('quote("%w")', c.name), ' || '','' || ' ORDER BY c.cid),
                    t.name,
                    coalesce(group_concat(format('"%w"', c.name), ', ' ORDER BY c.pk)
                                 FILTER (WHERE c.pk > 0), '1'))
           FROM sqlite_schema AS t JOIN pragma_table_info(t.name) AS c
           WHERE t.type = 'table' AND t.name NOT IN ('backup', '_sqlx_migrations')
                 AND t.name NOT GLOB 'sqlite_*'
           GROUP BY t.name ORDER BY t.name"#,
    )
    .fetch_all(&mut *connection)
    .await?;
    for (table, columns, query) in tables {
        add(&table);
        add(&columns);
        let mut rows =
            sqlx::query_scalar::<_, String>(AssertSqlSafe(query)).fetch(&mut *connection);
        while let Some(row) = rows.try_next().await? {
            add(&row);
        }
    }
    Ok(digest.finalize().cast_signed())
}

/// One file, without a write-ahead log beside it; synced when it is complete.
fn options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .journal_mode(SqliteJournalMode::Delete)
        .synchronous(SqliteSynchronous::Full)
        .disable_statement_logging()
}

async fn create(file: &Path) -> Result<SqliteConnection, DbError> {
    let mut connection = options(file).create_if_missing(true).connect().await?;
    migrate(&mut connection)
        .await
        .map_err(|error| DbError::Migrate(std::sync::Arc::new(error)))?;
    execute(&mut connection, "BEGIN IMMEDIATE").await?;
    Ok(connection)
}

async fn close(mut connection: SqliteConnection) -> Result<(), DbError> {
    execute(&mut connection, "COMMIT").await?;
    connection.close().await?;
    Ok(())
}

#[cfg(test)]
#[path = "backup_test.rs"]
mod tests;
