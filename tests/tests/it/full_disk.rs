//! Disks that fill up under a whole cluster: records are refused by name, everything else goes on, and room is
//! enough to take records again.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::ledger::produce;
use chronik_tests::numbered::{read, write};
use chronik_tests::wait::{holds, wait_for};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(120);
const GIB: u64 = 1 << 30;
const RECORDS: u64 = 2_000;

/// What is free for users on the disk of a folder, in bytes.
fn available(folder: &Path) -> u64 {
    let path = CString::new(folder.as_os_str().as_encoded_bytes()).expect("no zero byte");
    // SAFETY: all zeroes are a value of this plain structure.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call, and the path ends with a zero byte.
    let result = unsafe { libc::statvfs(path.as_ptr(), &raw mut found) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    found.f_bavail * found.f_frsize
}

/// Grows a file, without writing to it, until the disk has less left than `wanted` bytes.
fn leave_less_than(file: &File, wanted: u64) {
    let size = file.metadata().expect("it is open").len();
    let more = available(&std::env::temp_dir()).saturating_sub(wanted);
    if more > 0 {
        let size = i64::try_from(size + more + GIB).expect("it fits");
        // SAFETY: the descriptor is open for the call.
        let result = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, size) };
        assert_eq!(result, 0, "{}", std::io::Error::from_raw_os_error(result));
    }
}

#[test]
fn a_full_disk_refuses_records_and_room_is_enough_to_go_on() {
    // What brokers keep free is near to what is free: others may take some of it meanwhile.
    let free = available(&std::env::temp_dir());
    assert!(
        free > 12 * GIB,
        "only {free} bytes are free for temporary files; 12 GiB are needed"
    );
    let reserve = free - 8 * GIB;
    let setting = "CHRONIK_BROKER_STORAGE__RESERVE_BYTES";
    let options = Options {
        alone: true,
        environment: vec![(setting.to_owned(), reserve.to_string())],
        ..Options::default()
    };
    let mut cluster = Cluster::start_with("full-disk", options);
    let rest = cluster.rest();
    rest.create_topic("full", 1, 3, json!({"min.insync.replicas": "2"}));
    rest.create_topic("refused", 1, 3, json!({}));
    rest.wait_until_healthy("full", DEADLINE);
    rest.wait_until_healthy("refused", DEADLINE);
    write(&cluster, "full", 0, RECORDS);

    let filler = cluster.file("filler");
    let filling = File::create(&filler).expect("the folder is writable");
    let once = ["-partitions", "1", "-records", "1", "-retries", "0"];
    let once = [&once[..], &["-idempotent=false"]].concat();
    // Brokers look at their disks ten times a second.
    wait_for("records to be refused", DEADLINE, || {
        // Others may give room back at any time.
        leave_less_than(&filling, reserve);
        let refused = produce(&cluster, "refused", &once, DEADLINE);
        let told = &refused.first_error;
        holds(told.contains("KAFKA_STORAGE_ERROR"), format!("{told:?}"))
    });
    let all: Vec<u64> = (0..RECORDS).collect();
    assert_eq!(read(&cluster, "full"), all, "reads go on");
    // Elections need a little, which the reserve has.
    let leader = rest.partition("full", 0).expect("REST answers").leader;
    let leader = format!("broker-{}", leader.expect("it is led"));
    cluster.kill_9(&leader);
    wait_for("another leader", DEADLINE, || {
        let led = rest.partition("full", 0)?.leader;
        let others = led.is_some_and(|led| format!("broker-{led}") != leader);
        holds(others, format!("{led:?}"))
    });
    assert_eq!(
        read(&cluster, "full"),
        all,
        "reads go on at the next leader"
    );
    cluster.start_service(&leader);
    rest.wait_until_healthy("full", DEADLINE);

    drop(filling);
    std::fs::remove_file(&filler).expect("it is there");
    write(&cluster, "full", RECORDS, 100);
    let all: Vec<u64> = (0..RECORDS + 100).collect();
    assert_eq!(read(&cluster, "full"), all);
    cluster.assert_no_panic();
    cluster.stop();
}
