//! The file-system seam: everything the storage asks of a disk. Skeleton.

/// The operations the storage needs.
pub trait Disk: Send + Sync {}

/// The operating system's file system.
pub struct RealDisk;

impl Disk for RealDisk {}
