//! `chronik cluster backup`.
//!
//! Invariant: a file of the wanted name is a whole backup, synced; one that was there stays as it is.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::json;

use super::{cell, client, show};
use crate::arguments::Access;

pub async fn run(access: &Access, to: &Path) -> anyhow::Result<()> {
    refuse_to_overwrite(to)?;
    let partial = partial_name(to)?;
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .open(&partial)
        .with_context(|| format!("cannot create {}", partial.display()))?;
    let downloaded = download(access, &mut file).await;
    let placed = match downloaded {
        Ok(label) => place(&file, &partial, to).map(|()| label),
        Err(error) => Err(error),
    };
    if placed.is_err() {
        // What went wrong is told already; a leftover is named after what it is.
        let _ = fs::remove_file(&partial);
    }
    let label = placed?;
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

fn place(file: &File, partial: &Path, to: &Path) -> anyhow::Result<()> {
    file.sync_all().context("cannot sync the backup")?;
    // A link never takes the place of a file that has come meanwhile.
    if fs::hard_link(partial, to).is_ok() {
        // The backup is there under its name; a leftover is named after what it is.
        let _ = fs::remove_file(partial);
    } else {
        // A file that is there, or a file system without links, where a look before has to do.
        refuse_to_overwrite(to)?;
        fs::rename(partial, to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    let folder = match to.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.with_context(|| format!("cannot sync {}", folder.display()))
}

fn refuse_to_overwrite(to: &Path) -> anyhow::Result<()> {
    if to.symlink_metadata().is_ok() {
        bail!("{} exists already; choose another name", to.display());
    }
    Ok(())
}

fn partial_name(to: &Path) -> anyhow::Result<PathBuf> {
    let Some(name) = to.file_name() else {
        bail!("{} is not the name of a file", to.display());
    };
    let mut name = name.to_owned();
    name.push(".partial");
    Ok(to.with_file_name(name))
}
