//! A Kafka client of a few lines: raw frames, and typed calls through the message library.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kafka_wire::{
    OutboundFrameLimits, RequestResponsePair, encode_request, response_header_version_for,
};
use kafka_wire_core::{ApiVersion, DecodeLimits, Decoder, KafkaDecode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(20);

pub struct KafkaClient {
    stream: TcpStream,
    correlation_id: i32,
}

impl KafkaClient {
    pub async fn connect(address: SocketAddr) -> Self {
        Self {
            stream: TcpStream::connect(address).await.unwrap(),
            correlation_id: 0,
        }
    }

    /// Sends a request and answers its correlation id.
    pub async fn send<R: RequestResponsePair>(&mut self, request: &R, version: i16) -> i32 {
        self.correlation_id += 1;
        let mut frame = BytesMut::new();
        encode_request(
            &mut frame,
            self.correlation_id,
            Some("test".into()),
            request,
            ApiVersion::new(version),
            OutboundFrameLimits::new(1 << 30),
        )
        .unwrap();
        self.stream.write_all(&frame).await.unwrap();
        self.correlation_id
    }

    /// Reads the next response, which must be of that kind.
    pub async fn receive<R: RequestResponsePair>(&mut self, version: i16) -> (i32, R::Response) {
        let frame = self.frame().await.expect("the connection was closed");
        let header = response_header_version_for::<R>(ApiVersion::new(version)).unwrap();
        let correlation_id = i32::from_be_bytes(frame[..4].try_into().unwrap());
        let body = frame.slice(if header == 0 { 4.. } else { 5.. });
        let mut decoder = Decoder::new(body, DecodeLimits::default()).unwrap();
        let response = R::Response::decode(&mut decoder, ApiVersion::new(version)).unwrap();
        decoder.finish().unwrap();
        (correlation_id, response)
    }

    pub async fn call<R: RequestResponsePair>(&mut self, request: &R, version: i16) -> R::Response {
        let sent = self.send(request, version).await;
        let (correlation_id, response) = self.receive::<R>(version).await;
        assert_eq!(correlation_id, sent);
        response
    }

    /// Sends raw bytes; the gateway may have closed the connection already.
    pub async fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// Sends bytes as one frame: their size, then them.
    pub async fn send_frame(&mut self, frame: &[u8]) {
        self.send_raw(&(frame.len() as i32).to_be_bytes()).await;
        self.send_raw(frame).await;
    }

    /// The next response frame without its size. None: the connection was closed.
    pub async fn frame(&mut self) -> Option<Bytes> {
        timeout(DEADLINE, async {
            let size = self.stream.read_i32().await.ok()?;
            let mut frame = vec![0; usize::try_from(size).unwrap()];
            self.stream.read_exact(&mut frame).await.ok()?;
            Some(Bytes::from(frame))
        })
        .await
        .expect("neither an answer nor a close in time")
    }
}
