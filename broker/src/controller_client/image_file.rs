//! The last cluster image on disk, so that a broker can start and serve while no controller
//! answers; and the id of the cluster that the data belongs to.
//!
//! Invariant: a file is replaced whole or not at all, and one that is torn or damaged is never
//! taken for an image.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use chronik_proto::v1;
use chronik_types::cluster_image::ClusterImage;
use prost::Message;

const IMAGE_FILE: &str = "cluster-image";
const CLUSTER_ID_FILE: &str = "cluster-id";
const MAGIC: &[u8; 8] = b"CHRIMG01";
/// Magic, CRC-32C of the rest, length of the rest.
const HEADER_SIZE: usize = 8 + 4 + 8;

/// Why there is no image to start from.
#[derive(Debug, thiserror::Error)]
pub enum ImageFileError {
    #[error("{} cannot be read", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is damaged: {why}", .path.display())]
    Damaged { path: PathBuf, why: String },
}

/// The image that was saved last; None where none was ever saved.
pub fn load(folder: &Path) -> Result<Option<ClusterImage>, ImageFileError> {
    let path = folder.join(IMAGE_FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ImageFileError::Io { path, source }),
    };
    match decode(&bytes) {
        Ok(image) => Ok(Some(image)),
        Err(why) => Err(ImageFileError::Damaged { path, why }),
    }
}

/// Replaces the saved image. Blocks on the disk.
pub fn save(folder: &Path, image: &ClusterImage) -> io::Result<()> {
    replace(folder, IMAGE_FILE, &encode(image))
}

/// The cluster that the data belongs to; None for a broker that never registered.
pub fn load_cluster_id(folder: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(folder.join(CLUSTER_ID_FILE)) {
        Ok(id) => Ok(Some(id.trim().to_owned()).filter(|id| !id.is_empty())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Remembers the cluster that the data belongs to. Blocks on the disk.
pub fn save_cluster_id(folder: &Path, cluster_id: &str) -> io::Result<()> {
    replace(
        folder,
        CLUSTER_ID_FILE,
        format!("{cluster_id}\n").as_bytes(),
    )
}

fn encode(image: &ClusterImage) -> Vec<u8> {
    let body = v1::ClusterImage::from(image).encode_to_vec();
    let mut bytes = Vec::with_capacity(HEADER_SIZE.saturating_add(body.len()));
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&crc(&body).to_be_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

fn decode(bytes: &[u8]) -> Result<ClusterImage, String> {
    let Some((header, body)) = bytes.split_at_checked(HEADER_SIZE) else {
        return Err(format!("it has {} bytes only", bytes.len()));
    };
    if &header[..8] != MAGIC {
        return Err("it does not start as an image".to_owned());
    }
    let expected_crc = header[8..12]
        .iter()
        .fold(0u32, |value, byte| value << 8 | u32::from(*byte));
    let length = header[12..]
        .iter()
        .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    if length != body.len() as u64 {
        return Err(format!(
            "it should have {length} bytes after its header, not {}",
            body.len()
        ));
    }
    if crc(body) != expected_crc {
        return Err("its checksum does not match".to_owned());
    }
    let wire = v1::ClusterImage::decode(body).map_err(|error| error.to_string())?;
    ClusterImage::try_from(wire).map_err(|error| error.to_string())
}

fn crc(bytes: &[u8]) -> u32 {
    // CRC-32C has 32 bits, whatever the function's type can hold.
    (crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) & 0xffff_ffff) as u32
}

fn replace(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let temporary = folder.join(format!("{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, folder.join(name))?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use chronik_types::cluster_image::Controller;
    use chronik_types::id::ControllerId;

    fn image() -> ClusterImage {
        let mut image = ClusterImage {
            cluster_id: "c".to_owned(),
            revision: 9,
            ..Default::default()
        };
        let controller = Controller {
            controller_id: ControllerId(1),
            rpc_address: "a:1".to_owned(),
            rest_address: "a:2".to_owned(),
        };
        image.controllers.insert(ControllerId(1), controller);
        image
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(load(folder.path()).unwrap(), None);
        save(folder.path(), &image()).unwrap();
        assert_eq!(load(folder.path()).unwrap(), Some(image()));
        assert_eq!(load_cluster_id(folder.path()).unwrap(), None);
        save_cluster_id(folder.path(), "c").unwrap();
        assert_eq!(
            load_cluster_id(folder.path()).unwrap(),
            Some("c".to_owned())
        );
    }

    #[test]
    fn no_damaged_image_is_taken() {
        let whole = encode(&image());
        assert_eq!(decode(&whole), Ok(image()));
        for length in 0..whole.len() {
            assert!(decode(&whole[..length]).is_err(), "torn at {length}");
        }
        for position in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[position] ^= 0x10;
            assert!(decode(&flipped).is_err(), "flipped at {position}");
        }
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(IMAGE_FILE), &whole[..20]).unwrap();
        assert!(matches!(
            load(folder.path()),
            Err(ImageFileError::Damaged { .. })
        ));
    }
}
