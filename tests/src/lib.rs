//! The harness of the end-to-end tests: real clusters of real processes, driven by real clients.
//!
//! Invariants: nothing here is part of the system under test; every process that a test starts is
//! ended by its own pid when the test ends in any way; waiting is always for a condition, with a
//! deadline; data and logs of a failed test are kept and their place is printed.

pub mod agreement;
pub mod cluster;
pub mod ledger;
pub mod log_files;
pub mod numbered;
pub mod probe;
pub mod process;
pub mod rest;
pub mod scale;
pub mod tools;

pub mod figures;
pub mod turn;
pub mod wait;
pub mod wire;

pub mod checker;

use std::path::PathBuf;

/// The top folder of the project.
pub fn project_root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this crate is a folder of the workspace")
        .to_owned()
}

/// The folder with the binaries under test: built by `scripts/test.sh`, not here.
pub fn bin_dir() -> PathBuf {
    match std::env::var_os("CHRONIK_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => project_root().join("target/release"),
    }
}
