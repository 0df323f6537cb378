//! Vocabulary shared by every part of Chronik. No I/O, no async: only values and their invariants.

pub mod id;

pub mod epoch;
pub mod offset;

pub mod record_batch;

pub mod cluster_image;
pub mod topic_config;
