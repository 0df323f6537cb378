//! Every API in every version that is advertised, called by a second codec: franz-go's kmsg, which shares
//! nothing with the gateway's (`clients/franz-go/versions.go`).
//!
//! Invariant: what was called is what clients are promised, no version less and none more; every answer
//! decodes to its last byte and says what was asked for.

use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::tools::{franz_go, run_ok};

use crate::admin::VERSIONS;

const DEADLINE: Duration = Duration::from_secs(120);

/// "3: 0 to 13" of "Metadata(3): 0 to 13": kmsg has names of its own for some APIs.
fn without_name(line: &str) -> String {
    let (_, key_and_range) = line
        .split_once('(')
        .unwrap_or_else(|| panic!("a bad line: {line}"));
    key_and_range.replace(')', "")
}

#[test]
fn a_second_codec_understands_every_api_in_every_version() {
    let options = Options {
        controllers: 1,
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("second-codec", options);
    let arguments = ["-timeout", "100s"];
    let mut command = franz_go("versions", &cluster.bootstrap(), &arguments);
    let output = run_ok(&mut command, "", DEADLINE);
    let called: Vec<String> = output.lines().map(without_name).collect();
    let promised: Vec<String> = VERSIONS.into_iter().map(without_name).collect();
    assert_eq!(called, promised);
    cluster.assert_sound();
    cluster.stop();
}
