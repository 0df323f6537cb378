//! A log's content on its way to another broker: what it consists of, sending, and taking it in.
//!
//! Invariant: what is sent cannot change while it is sent, and what is received becomes a log, or a
//! part of one, at once and only after every byte of it was checked.

mod export;
mod install;
mod manifest;
mod rebuild;
mod unfinished;

pub use export::Export;
pub use install::{InstallRequest, Installer};
pub use manifest::{LogManifest, ManifestSegment, SegmentFile};
pub use rebuild::Rebuild;
pub use unfinished::{BegunCopy, Unfinished, find_left, forget_left, is_description};
