//! Whatever comes in on the Kafka port, the process goes on serving, in bounded memory.

use chronik_tests::cluster::{Cluster, Options};
use chronik_tests::figures::{memory_mib, report};
use chronik_tests::wire::{Answer, Random, RawConnection, assert_serves, request_header};

const FRAMES: u64 = 4000;
const MEMORY_GROWTH_MIB_MAX: f64 = 200.0;

/// API keys and highest versions that a gateway serves; `admin.rs` holds the same against Kafka's own tool.
const APIS: &[(i16, u64)] = &[
    (0, 13),
    (1, 18),
    (2, 11),
    (3, 13),
    (8, 10),
    (9, 10),
    (10, 6),
    (11, 9),
    (12, 4),
    (13, 5),
    (14, 5),
    (15, 6),
    (16, 5),
    (18, 5),
    (19, 7),
    (20, 6),
    (21, 2),
    (22, 5),
    (23, 4),
    (32, 4),
    (35, 5),
    (37, 3),
    (43, 2),
    (44, 1),
    (45, 1),
    (46, 0),
    (60, 2),
    (64, 0),
];

fn small(name: &str) -> Cluster {
    Cluster::start_with(
        name,
        Options {
            controllers: 1,
            brokers: 1,
            ..Options::default()
        },
    )
}

#[test]
fn lengths_and_counts_that_lie_end_the_connection_and_nothing_else() {
    let mut cluster = small("lies");
    let address = cluster.kafka()[0].clone();
    let gateway = cluster.service("gateway-1").process.clone();
    let before = memory_mib(gateway.pid);

    // Metadata v12, 20 bytes of body: a compact array of 2^31 - 2 topics.
    let mut metadata = request_header(3, 12, 1, true);
    metadata.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0x07]);
    metadata.extend_from_slice(&[0; 15]);
    // Metadata v1: an array of 2^31 - 1 topics.
    let mut old_metadata = request_header(3, 1, 2, false);
    old_metadata.extend_from_slice(&i32::MAX.to_be_bytes());
    // Produce v9 and Fetch v12 with huge counts after a plausible start.
    let mut produce = request_header(0, 9, 3, true);
    produce.extend_from_slice(&[0, 0xff, 0xff, 0, 0, 0x75, 0x30]);
    produce.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0x0f]);
    let mut fetch = request_header(1, 12, 4, true);
    fetch.extend_from_slice(&[0xff; 40]);
    // Headers that end early, or hold a client id longer than the frame.
    let truncated = vec![0, 3, 0];
    let mut long_client_id = request_header(3, 1, 5, false);
    long_client_id[8..10].copy_from_slice(&i16::MAX.to_be_bytes());
    for (what, frame) in [
        ("Metadata v12 with 2^31 topics", metadata),
        ("Metadata v1 with 2^31 topics", old_metadata),
        ("Produce with 2^32 topics", produce),
        ("Fetch of 0xff", fetch),
        ("a header of 3 bytes", truncated),
        ("a client id longer than the frame", long_client_id),
    ] {
        let mut connection = RawConnection::open(&address);
        connection.send_frame(&frame);
        connection.end_of_input();
        assert_eq!(
            connection.answer(what),
            Answer::Closed,
            "{what} was answered"
        );
        assert_serves(&address, what);
    }
    for (what, length) in [
        ("a length of -1", u32::MAX),
        ("a length of 2 GiB", i32::MAX as u32),
        ("zero", 0),
    ] {
        let mut connection = RawConnection::open(&address);
        connection.send(&length.to_be_bytes());
        connection.send(&[0; 64]);
        assert_eq!(
            connection.answer(what),
            Answer::Closed,
            "{what} was answered"
        );
        assert_serves(&address, what);
    }
    let grown = memory_mib(gateway.pid) - before;
    assert!(
        grown < MEMORY_GROWTH_MIB_MAX,
        "the gateway grew by {grown:.0} MiB"
    );
    assert!(gateway.is_alive(), "the gateway has ended");
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn unknown_versions_are_told_in_a_form_every_client_reads() {
    let mut cluster = small("versions");
    let address = cluster.kafka()[0].clone();
    // ApiVersions too high: the answer has version 0 and error 35.
    let mut connection = RawConnection::open(&address);
    let mut request = request_header(18, 99, 9, true);
    request.extend_from_slice(&[5, b't', b'e', b's', b't', 2, b'1', 0]);
    connection.send_frame(&request);
    match connection.answer("ApiVersions v99") {
        Answer::Frame(frame) => {
            assert_eq!(frame[..4], 9_i32.to_be_bytes());
            assert_eq!(frame[4..6], 35_i16.to_be_bytes());
        }
        Answer::Closed => panic!("ApiVersions v99 closes the connection"),
    }
    // The same connection goes on with a version that is served.
    assert!(connection.send_frame(&request_header(18, 0, 10, false)));
    assert!(matches!(
        connection.answer("ApiVersions v0"),
        Answer::Frame(_)
    ));
    cluster.assert_no_panic();
    cluster.stop();
}

#[test]
fn random_frames_leave_the_process_serving() {
    let mut cluster = small("random");
    let address = cluster.kafka()[0].clone();
    let gateway = cluster.service("gateway-1").process.clone();
    let broker = cluster.service("broker-1").process.clone();
    let before = memory_mib(gateway.pid);
    let mut random = Random(20_261_123);
    for number in 0..FRAMES {
        let size = usize::try_from(random.below(200)).expect("less than 200");
        let mut frame = match random.below(4) {
            // Noise.
            0 => random.bytes(size),
            // Any API in any version.
            1 => {
                let key = random.any() as i16;
                request_header(
                    key % 100,
                    (random.any() as i16) % 30,
                    1,
                    random.below(2) == 0,
                )
            }
            // An API that is served, with noise for a body.
            2 => {
                let (key, highest) = APIS[random.below(APIS.len() as u64) as usize];
                let version = random.below(highest + 1) as i16;
                let mut frame = request_header(key, version, 1, random.below(2) == 0);
                frame.extend_from_slice(&random.bytes(size));
                frame
            }
            // The same, with small numbers: gets further into the decoders.
            _ => {
                let (key, highest) = APIS[random.below(APIS.len() as u64) as usize];
                let version = random.below(highest + 1) as i16;
                let mut frame = request_header(key, version, 1, random.below(2) == 0);
                frame.extend((0..size).map(|_| random.below(5) as u8));
                frame
            }
        };
        // Some frames promise more than they hold, or less.
        let mut length = u32::try_from(frame.len()).expect("frames are small");
        if random.below(8) == 0 {
            length = length
                .wrapping_add(random.below(40) as u32)
                .wrapping_sub(20);
        }
        frame.splice(0..0, length.to_be_bytes());
        let mut connection = RawConnection::open(&address);
        connection.send(&frame);
        connection.end_of_input();
        // Not every frame gets an answer (acks=0), so none is waited for.
        drop(connection);
        if number % 100 == 99 {
            assert_serves(&address, &format!("random frame {number}"));
        }
    }
    assert_serves(&address, "all random frames");
    let grown = memory_mib(gateway.pid) - before;
    report(&format!(
        "{FRAMES} random frames: the gateway grew by {grown:.1} MiB"
    ));
    assert!(
        grown < MEMORY_GROWTH_MIB_MAX,
        "the gateway grew by {grown:.0} MiB"
    );
    assert!(
        gateway.is_alive() && broker.is_alive(),
        "a process has ended"
    );
    cluster.assert_no_panic();
    cluster.stop();
}
