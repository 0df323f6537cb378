//! `chronik cluster backup`.
//!
//! Invariant: a file of the wanted name is a whole backup, synced; one that was there stays as it is.

use std::fs::{File, Permissions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use serde_json::json;

use super::{cell, client, show};
use crate::arguments::Access;

pub async fn run(access: &Access, to: &Path) -> anyhow::Result<()> {
    let Some(name) = to.file_name() else {
        bail!("{} is not the name of a file", to.display());
    };
    if to.symlink_metadata().is_ok() {
        bail!(exists(to));
    }
    let folder = match to.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // Removed with the value, unless it gets its name. Who may read it is the umask's business, as for
    // any file: the controller that restores it may run as another user.
    let mut partial = tempfile::Builder::new()
        .prefix(name)
        .suffix(".partial")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .with_context(|| format!("cannot create a file in {}", folder.display()))?;
    let label = download(access, partial.as_file_mut()).await?;
    let synced = partial.as_file().sync_all();
    synced.context("cannot sync the backup")?;
    partial
        .persist_noclobber(to)
        .map_err(|failed| match failed.error.kind() {
            ErrorKind::AlreadyExists => anyhow!(exists(to)),
            _ => anyhow!(failed.error).context(format!("cannot write {}", to.display())),
        })?;
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.with_context(|| format!("cannot sync {}", folder.display()))?;
    let answer = json!({
        "file": to.display().to_string(),
        "revision": label.revision,
        "backup_id": label.backup_id,
        "size_bytes": label.size_bytes,
    });
    show(access, &answer, |answer| {
        format!(
            "{}: the metadata at revision {}, {} bytes\n",
            cell(&answer["file"]),
            cell(&answer["revision"]),
            cell(&answer["size_bytes"])
        )
    });
    Ok(())
}

struct Label {
    revision: u64,
    backup_id: String,
    size_bytes: u64,
}

async fn download(access: &Access, file: &mut File) -> anyhow::Result<Label> {
    let mut answer = client(access)?
        .download("/v1/cluster/backup")
        .await
        .context("cannot back up")?;
    let header = |name: &str| {
        let value = answer
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok());
        value.map(str::to_owned)
    };
    let (revision, backup_id) = (header("chronik-revision"), header("chronik-backup-id"));
    let revision = revision.and_then(|text| text.parse().ok());
    let (Some(revision), Some(backup_id)) = (revision, backup_id) else {
        bail!("the answer is no backup; is this a Chronik controller?");
    };
    let expected = answer.content_length();
    let mut size_bytes = 0_u64;
    while let Some(chunk) = answer.chunk().await.context("the backup broke off")? {
        file.write_all(&chunk).context("cannot write the backup")?;
        size_bytes += chunk.len() as u64;
    }
    if expected.is_some_and(|expected| expected != size_bytes) {
        bail!("the backup broke off after {size_bytes} bytes");
    }
    Ok(Label {
        revision,
        backup_id,
        size_bytes,
    })
}

fn exists(to: &Path) -> String {
    format!("{} exists already; choose another name", to.display())
}
