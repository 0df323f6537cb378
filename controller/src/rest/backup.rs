//! A backup of the metadata, as one file.

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::Stream;
use tokio::io::AsyncReadExt;

use super::Api;
use super::error::Problem;
use crate::backup;
use crate::controller::Role;

/// The revision that a backup holds.
const REVISION: &str = "chronik-revision";
const BACKUP_ID: &str = "chronik-backup-id";
const CHUNK_BYTES: usize = 256 * 1024;

/// All metadata of the cluster as a SQLite file, for `chronik-controller restore`: what this controller
/// has applied, at one moment. The header `chronik-revision` names the revision.
#[utoipa::path(get, path = "/v1/cluster/backup", tag = "cluster",
    responses(
        (status = 200, body = String, content_type = "application/vnd.sqlite3", headers(
            ("chronik-revision" = u64, description = "Revision of the metadata in the backup"),
            ("chronik-backup-id" = String, description = "Made up for this backup"))),
        (status = 500, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json")))]
pub async fn backup_cluster(State(api): State<Api>) -> Result<Response, Problem> {
    let controller = &api.controller;
    if *controller.role().borrow() == Role::Waiting || controller.feed().is_held_back() {
        return Err(Problem::unavailable(
            "the controllers have no leader, so this one may not know the latest metadata",
        ));
    }
    let dump = controller.node().dump().await.map_err(Problem::internal)?;
    let dump = dump.ok_or_else(|| Problem::unavailable("this controller has no metadata yet"))?;
    // Goes on without its request when the client leaves: it removes its file.
    let folder = controller.config().data_dir.clone();
    let writing = tokio::spawn(async move { backup::write(&folder, &dump).await });
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!(%error, "a backup could not be written");
        Problem::internal(error.to_string())
    };
    let written = writing.await.map_err(|error| failed(&error))?;
    let outgoing = written.map_err(|error| failed(&error))?;
    let (revision, backup_id) = (outgoing.revision, outgoing.backup_id);
    tracing::info!(revision, %backup_id, "backup of the metadata");
    let disposition = format!("attachment; filename=\"chronik-{revision}.backup\"");
    let headers = [
        (
            header::CONTENT_TYPE.as_str(),
            "application/vnd.sqlite3".to_owned(),
        ),
        (
            header::CONTENT_LENGTH.as_str(),
            outgoing.size_bytes.to_string(),
        ),
        (header::CONTENT_DISPOSITION.as_str(), disposition),
        (REVISION, revision.to_string()),
        (BACKUP_ID, backup_id.to_string()),
    ];
    let file = tokio::fs::File::from_std(outgoing.file);
    Ok((headers, Body::from_stream(chunks(file))).into_response())
}

fn chunks(file: tokio::fs::File) -> impl Stream<Item = std::io::Result<Bytes>> {
    futures::stream::try_unfold(file, |mut file| async move {
        let mut chunk = vec![0; CHUNK_BYTES];
        let length = file.read(&mut chunk).await?;
        chunk.truncate(length);
        Ok((length > 0).then(|| (Bytes::from(chunk), file)))
    })
}
