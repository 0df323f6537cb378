//! Raw frames on a Kafka port, for what no well-behaved client sends.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A connection that sends whatever it is told to.
pub struct RawConnection {
    stream: TcpStream,
}

/// What came back.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Frame(Vec<u8>),
    Closed,
}

impl RawConnection {
    pub fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address)
            .unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
        stream
            .set_read_timeout(Some(ANSWER_DEADLINE))
            .expect("the timeout is not zero");
        stream
            .set_write_timeout(Some(ANSWER_DEADLINE))
            .expect("the timeout is not zero");
        Self { stream }
    }

    /// Sends bytes as they are. False: the other side has closed the connection.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    pub fn send_frame(&mut self, payload: &[u8]) -> bool {
        let length = u32::try_from(payload.len()).expect("frames of tests are small");
        let mut frame = length.to_be_bytes().to_vec();
        frame.extend_from_slice(payload);
        self.send(&frame)
    }

    /// Says that nothing more will be sent.
    pub fn end_of_input(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }

    /// The next frame. Panics if the other side neither answers nor closes.
    pub fn answer(&mut self, after: &str) -> Answer {
        let mut length = [0; 4];
        match self.read_exact(&mut length, after) {
            Answer::Closed => return Answer::Closed,
            Answer::Frame(_) => {}
        }
        let length = u32::from_be_bytes(length) as usize;
        assert!(
            length <= 16 << 20,
            "an answer of {length} bytes after {after}"
        );
        let mut payload = vec![0; length];
        match self.read_exact(&mut payload, after) {
            Answer::Closed => Answer::Closed,
            Answer::Frame(_) => Answer::Frame(payload),
        }
    }

    fn read_exact(&mut self, into: &mut [u8], after: &str) -> Answer {
        match self.stream.read_exact(into) {
            Ok(()) => Answer::Frame(Vec::new()),
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                panic!("neither an answer nor a close after {after}")
            }
            Err(_) => Answer::Closed,
        }
    }
}

/// Header of a request, versions 1 (classic) and 2 (flexible), with client id "test".
pub fn request_header(api_key: i16, version: i16, correlation_id: i32, flexible: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&api_key.to_be_bytes());
    bytes.extend_from_slice(&version.to_be_bytes());
    bytes.extend_from_slice(&correlation_id.to_be_bytes());
    bytes.extend_from_slice(&4_i16.to_be_bytes());
    bytes.extend_from_slice(b"test");
    if flexible {
        bytes.push(0);
    }
    bytes
}

/// Asks for ApiVersions v0 and checks that the answer is one: the port serves.
pub fn assert_serves(address: &str, after: &str) {
    let mut connection = RawConnection::open(address);
    assert!(
        connection.send_frame(&request_header(18, 0, 77, false)),
        "refused after {after}"
    );
    match connection.answer(after) {
        Answer::Frame(frame) => {
            assert!(
                frame.len() > 10,
                "a short ApiVersions answer after {after}: {frame:?}"
            );
            assert_eq!(
                frame[..4],
                77_i32.to_be_bytes(),
                "correlation id after {after}"
            );
            assert_eq!(frame[4..6], [0, 0], "error code after {after}");
        }
        Answer::Closed => panic!("{address} closes a good connection after {after}"),
    }
}

/// Small, fast, repeatable random numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.any() % bound
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.any() as u8).collect()
    }
}
