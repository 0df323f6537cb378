//! Compiles the .proto files with protox, so that no protoc needs to be installed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = [
        "controller",
        "controller_raft",
        "broker",
        "broker_raft",
        "image",
    ]
    .map(|name| format!("chronik/{name}.proto"));
    println!("cargo:rerun-if-changed=chronik");
    let descriptors = protox::compile(&files, ["."])?;
    tonic_prost_build::configure()
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}
