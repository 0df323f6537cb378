//! Tables raft_vote, raft_purged and raft_log.

use std::ops::RangeInclusive;
use std::sync::Arc;

use serde::Serialize;
use sqlx::SqliteConnection;

use super::DbError;

/// Term and index of a log entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LogPosition {
    pub term: u64,
    pub index: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VoteRow {
    pub term: u64,
    pub voted_for: u64,
    pub committed: bool,
}

/// One row of raft_log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogRow {
    pub log_index: u64,
    pub term: u64,
    pub kind: &'static str,
    /// JSON.
    pub payload: Arc<str>,
}

pub const KIND_BLANK: &str = "blank";
pub const KIND_COMMAND: &str = "command";
pub const KIND_MEMBERSHIP: &str = "membership";

/// SQLite's integers are signed; no index or term comes near their end.
pub fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub fn unsigned(what: &'static str, number: i64) -> Result<u64, DbError> {
    u64::try_from(number).map_err(|_| DbError::Corrupt {
        what,
        why: format!("{number} < 0"),
    })
}

pub async fn load_vote(connection: &mut SqliteConnection) -> Result<Option<VoteRow>, DbError> {
    let row: Option<(i64, i64, bool)> =
        sqlx::query_as("SELECT term, voted_for, committed FROM raft_vote")
            .fetch_optional(connection)
            .await?;
    row.map(|(term, voted_for, committed)| {
        let (term, voted_for) = (unsigned("vote", term)?, unsigned("vote", voted_for)?);
        Ok(VoteRow {
            term,
            voted_for,
            committed,
        })
    })
    .transpose()
}

pub async fn save_vote(connection: &mut SqliteConnection, vote: VoteRow) -> Result<(), DbError> {
    sqlx::query(
        "INSERT OR REPLACE INTO raft_vote (id, term, voted_for, committed) VALUES (1, ?, ?, ?)",
    )
    .bind(signed(vote.term))
    .bind(signed(vote.voted_for))
    .bind(vote.committed)
    .execute(connection)
    .await?;
    Ok(())
}

pub async fn load_purged(
    connection: &mut SqliteConnection,
) -> Result<Option<LogPosition>, DbError> {
    let row: Option<(i64, i64)> = sqlx::query_as("SELECT log_index, term FROM raft_purged")
        .fetch_optional(connection)
        .await?;
    row.map(|(index, term)| {
        Ok(LogPosition {
            term: unsigned("term", term)?,
            index: unsigned("log index", index)?,
        })
    })
    .transpose()
}

pub async fn purge(connection: &mut SqliteConnection, upto: LogPosition) -> Result<(), DbError> {
    sqlx::query("INSERT OR REPLACE INTO raft_purged (id, log_index, term) VALUES (1, ?, ?)")
        .bind(signed(upto.index))
        .bind(signed(upto.term))
        .execute(&mut *connection)
        .await?;
    sqlx::query("DELETE FROM raft_log WHERE log_index <= ?")
        .bind(signed(upto.index))
        .execute(connection)
        .await?;
    Ok(())
}

pub async fn insert_log(connection: &mut SqliteConnection, rows: &[LogRow]) -> Result<(), DbError> {
    for row in rows {
        sqlx::query("INSERT INTO raft_log (log_index, term, kind, payload) VALUES (?, ?, ?, ?)")
            .bind(signed(row.log_index))
            .bind(signed(row.term))
            .bind(row.kind)
            .bind(&*row.payload)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

pub async fn truncate_after(
    connection: &mut SqliteConnection,
    index: Option<u64>,
) -> Result<(), DbError> {
    sqlx::query("DELETE FROM raft_log WHERE log_index > ?")
        .bind(index.map_or(-1, signed))
        .execute(connection)
        .await?;
    Ok(())
}

pub async fn read_log(
    connection: &mut SqliteConnection,
    range: RangeInclusive<u64>,
) -> Result<Vec<LogRow>, DbError> {
    let rows: Vec<(i64, i64, String, String)> = sqlx::query_as(
        "SELECT log_index, term, kind, payload FROM raft_log
         WHERE log_index BETWEEN ? AND ? ORDER BY log_index",
    )
    .bind(signed(*range.start()))
    .bind(signed(*range.end()))
    .fetch_all(connection)
    .await?;
    rows.into_iter()
        .map(|(log_index, term, kind, payload)| {
            let kind = [KIND_BLANK, KIND_COMMAND, KIND_MEMBERSHIP]
                .into_iter()
                .find(|known| *known == kind)
                .ok_or(DbError::Corrupt {
                    what: "log entry",
                    why: format!("kind {kind}"),
                })?;
            Ok(LogRow {
                log_index: unsigned("log index", log_index)?,
                term: unsigned("term", term)?,
                kind,
                payload: payload.into(),
            })
        })
        .collect()
}
