//! The latest cluster image, and what is computed from it once per image.
//!
//! Invariants: readers never wait; the revision never goes back within one cluster; the copy on
//! disk is only ever an older image, never a torn one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use chronik_proto::v1;
use chronik_types::cluster_image::{ClusterImage, Gateway};
use chronik_types::record_batch::crc32c;
use prost::Message;
use tokio::sync::watch;
use tracing::warn;

use crate::endpoints::EndpointMap;

/// File of the last image in the data folder: CRC-32C of the rest, then a protobuf ClusterImage.
const IMAGE_FILE: &str = "cluster-image.bin";

/// An image and what follows from it.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub image: ClusterImage,
    pub endpoints: EndpointMap,
}

impl Snapshot {
    /// Whether any image has been received yet.
    pub fn is_known(&self) -> bool {
        !self.image.cluster_id.is_empty()
    }
}

/// Holds the latest snapshot. Written by the controller client only.
#[derive(Debug)]
pub struct MetadataCache {
    current: ArcSwap<Snapshot>,
    changed: watch::Sender<u64>,
    own: Gateway,
}

impl MetadataCache {
    pub fn new(own: Gateway) -> Self {
        Self {
            current: ArcSwap::default(),
            changed: watch::Sender::new(0),
            own,
        }
    }

    /// This gateway, as it registers itself.
    pub fn own(&self) -> &Gateway {
        &self.own
    }

    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Fires at every new image.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Replaces the image.
    pub fn store(&self, image: ClusterImage) {
        let before = self.current.load();
        let same_mapping = before.is_known()
            && before.image.brokers == image.brokers
            && before.image.gateways == image.gateways;
        let endpoints = if same_mapping {
            before.endpoints.clone()
        } else {
            EndpointMap::new(&image, &self.own)
        };
        let revision = image.revision;
        self.current.store(Arc::new(Snapshot { image, endpoints }));
        self.changed.send_replace(revision);
    }

    /// Waits until `condition` holds for the current snapshot, and answers that one.
    pub async fn wait_until(&self, condition: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
        let mut changed = self.subscribe();
        loop {
            changed.mark_unchanged();
            let snapshot = self.load();
            if condition(&snapshot) {
                return snapshot;
            }
            // Fails only when the cache is gone, and it is borrowed here.
            if changed.changed().await.is_err() {
                return snapshot;
            }
        }
    }
}

/// The image that an earlier process left, if it is whole.
pub fn read_from_disk(folder: &Path) -> Option<ClusterImage> {
    let bytes = match std::fs::read(folder.join(IMAGE_FILE)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(%error, "the last cluster image cannot be read; waiting for a controller");
            return None;
        }
    };
    let image = decode(&bytes);
    if image.is_none() {
        warn!("the last cluster image on disk is damaged; waiting for a controller");
    }
    image
}

/// Writes the image so that a reader finds either the old or the new one. Blocks.
pub fn write_to_disk(folder: &Path, image: &ClusterImage) -> io::Result<()> {
    let path: PathBuf = folder.join(IMAGE_FILE);
    let temporary = folder.join(format!("{IMAGE_FILE}.new"));
    let body = v1::ClusterImage::from(image).encode_to_vec();
    let mut bytes = crc32c(&body).to_be_bytes().to_vec();
    bytes.extend_from_slice(&body);
    let file = std::fs::File::create(&temporary)?;
    io::Write::write_all(&mut &file, &bytes)?;
    file.sync_data()?;
    std::fs::rename(temporary, path)
}

fn decode(bytes: &[u8]) -> Option<ClusterImage> {
    let (crc, body) = bytes.split_first_chunk::<4>()?;
    if u32::from_be_bytes(*crc) != crc32c(body) {
        return None;
    }
    ClusterImage::try_from(v1::ClusterImage::decode(body).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn own() -> Gateway {
        Gateway {
            gateway_id: "g".to_owned(),
            incarnation_id: Uuid::nil(),
            rack: None,
            endpoints: Vec::new(),
        }
    }

    #[test]
    fn an_image_on_disk_comes_back_and_a_damaged_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read_from_disk(folder.path()), None);
        let image = ClusterImage {
            cluster_id: "c".to_owned(),
            revision: 5,
            ..ClusterImage::default()
        };
        write_to_disk(folder.path(), &image).unwrap();
        assert_eq!(read_from_disk(folder.path()), Some(image));
        let path = folder.path().join(IMAGE_FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(read_from_disk(folder.path()), None);
    }

    #[tokio::test]
    async fn waiters_see_the_image_they_wait_for() {
        let cache = MetadataCache::new(own());
        let image = |revision| ClusterImage {
            cluster_id: "c".to_owned(),
            revision,
            ..ClusterImage::default()
        };
        let wait = cache.wait_until(|snapshot| snapshot.image.revision >= 2);
        let change = async {
            cache.store(image(1));
            tokio::task::yield_now().await;
            cache.store(image(2));
        };
        let (snapshot, ()) = tokio::join!(wait, change);
        assert_eq!(snapshot.image.revision, 2);
    }
}
