//! Brokers and a controller that do as a test tells them, behind the real gRPC services. Here:
//! the process that each of them is.
//!
//! Invariant: a fake that is dropped ends every connection at once, like a killed process.

pub mod broker;
pub mod controller;

use std::net::SocketAddr;
use std::pin::Pin;

use futures::Stream;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Response, Status};

type Answer<T> = Result<Response<T>, Status>;
type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A runtime of its own, so that dropping it ends every connection at once, like a killed process.
struct Process(Option<Runtime>);

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn serve(
    add: impl FnOnce(&mut tonic::transport::Server) -> tonic::transport::server::Router,
) -> (SocketAddr, Process) {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(1).enable_all().build().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let router = add(&mut tonic::transport::Server::builder());
    runtime.spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        router
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    });
    (address, Process(Some(runtime)))
}
