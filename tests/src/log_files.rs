//! The files of partitions' logs on a broker's disk, as anybody can see them.
//!
//! Invariant: nothing is written here; what is looked at may go meanwhile, the broker's folder may not.

use std::path::PathBuf;

use crate::cluster::Cluster;

/// Folders of the partitions' logs of one broker.
pub fn folders(cluster: &Cluster, broker: &str) -> Vec<PathBuf> {
    let partitions = cluster.data_dir().join(broker).join("storage/partitions");
    // A place that is not there would pass for a broker without partitions.
    let entries = std::fs::read_dir(&partitions)
        .unwrap_or_else(|error| panic!("{}: {error}", partitions.display()));
    let folders = entries.map(|entry| entry.expect("the folder is read").path());
    sorted(folders)
}

/// Files of one broker with an extension, folder by folder in the order of their offsets.
pub fn files(cluster: &Cluster, broker: &str, extension: &str) -> Vec<PathBuf> {
    let entries = folders(cluster, broker)
        .into_iter()
        // A folder or file may go while it is looked at.
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten());
    let files = entries.map(|entry| entry.path());
    sorted(files.filter(|path| path.extension().is_some_and(|found| found == extension)))
}

fn sorted(paths: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = paths.collect();
    paths.sort();
    paths
}

/// What the records of all partitions take on one broker's disk, in bytes.
pub fn size(cluster: &Cluster, broker: &str) -> u64 {
    let files = files(cluster, broker, "log").into_iter();
    // A file may go between two looks.
    let sizes = files.flat_map(std::fs::metadata);
    sizes.map(|metadata| metadata.len()).sum()
}

/// The bytes of all records on one broker, in the order of `files`.
pub fn content(cluster: &Cluster, broker: &str) -> Vec<u8> {
    let read = |path: PathBuf| {
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    files(cluster, broker, "log")
        .into_iter()
        .flat_map(read)
        .collect()
}
