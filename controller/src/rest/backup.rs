//! A backup of the metadata, as one file.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use tokio::io::AsyncReadExt;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::Api;
use super::error::Problem;
use crate::backup;
use crate::controller::Role;

/// The revision that a backup holds.
const REVISION: &str = "chronik-revision";
const BACKUP_ID: &str = "chronik-backup-id";
const CHUNK_BYTES: usize = 64 * 1024;
/// Backups under way at once: each has its file on the controller's disk.
pub(super) const BACKUPS_MAX: usize = 2;
/// A client that takes nothing for this long is given up, for others that wait.
const STALL_MAX: Duration = Duration::from_secs(30);

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
    let permit = api.backups.clone().try_acquire_owned().map_err(|_| {
        Problem::unavailable("this controller gives as many backups as it may at a time; ask again")
    })?;
    let dump = controller.node().dump().await.map_err(Problem::internal)?;
    let dump = dump.ok_or_else(|| Problem::unavailable("this controller has no metadata yet"))?;
    // Goes on without its request when the client leaves: it removes its file.
    let folder = controller.config().data_dir.clone();
    let writing = tokio::spawn(async move { (backup::write(&folder, &dump).await, permit) });
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!(%error, "a backup could not be written");
        Problem::internal(error.to_string())
    };
    let (written, permit) = writing.await.map_err(|error| failed(&error))?;
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
    let (chunks, body) = mpsc::channel(1);
    tokio::spawn(send(file, chunks, STALL_MAX, permit));
    Ok((headers, Body::from_stream(ReceiverStream::new(body))).into_response())
}

/// Sends the file to its client. What ends early is shorter than it says, which breaks the connection off.
async fn send(
    mut file: tokio::fs::File,
    chunks: mpsc::Sender<std::io::Result<Bytes>>,
    stall_max: Duration,
    _permit: OwnedSemaphorePermit,
) {
    loop {
        let mut chunk = vec![0; CHUNK_BYTES];
        let read = file.read(&mut chunk).await.map(|length| {
            chunk.truncate(length);
            Bytes::from(chunk)
        });
        if read.as_ref().is_ok_and(Bytes::is_empty) {
            return;
        }
        let failed = read.is_err();
        if chunks.send_timeout(read, stall_max).await.is_err() || failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_given_up() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 3 * CHUNK_BYTES]).unwrap();
        file.rewind().unwrap();
        let backups = Arc::new(Semaphore::new(1));
        let permit = backups.clone().try_acquire_owned().unwrap();
        let (chunks, mut body) = mpsc::channel(1);
        send(file.into(), chunks, Duration::from_millis(10), permit).await;
        assert_eq!(backups.available_permits(), 1);
        assert_eq!(body.recv().await.unwrap().unwrap().len(), CHUNK_BYTES);
        assert!(body.recv().await.is_none());
    }
}
