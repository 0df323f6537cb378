//! A fake broker: what a test tells it to do, and what it has been asked.

mod data;
mod groups;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use chronik_proto::v1::{self, PartitionError};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Process, serve};

/// What a fake broker does with produce requests.
#[derive(Debug, Clone, PartialEq)]
pub enum ProduceMode {
    Answer,
    /// Answers only when this many have come, the last one first.
    Reverse(usize),
    Silent,
    /// Answers when `BrokerState::released` is cancelled.
    Hold,
    /// Ends the stream at the first request.
    Break,
    Refuse(PartitionError, Option<v1::Leader>),
}

pub struct BrokerState {
    pub mode: Mutex<ProduceMode>,
    pub produced: Mutex<Vec<v1::ProduceRequest>>,
    /// Records by Raft group, given to whoever fetches.
    pub records: Mutex<HashMap<u64, Bytes>>,
    pub fetches: Mutex<Vec<v1::FetchStart>>,
    pub not_leader_of: Mutex<HashMap<u64, v1::Leader>>,
    pub finished: Mutex<usize>,
    pub changed: Notify,
    pub released: CancellationToken,
}

impl BrokerState {
    /// Waits until that many produce requests have come.
    pub async fn wait_for_produced(&self, count: usize) {
        let arrived = async {
            loop {
                let changed = self.changed.notified();
                if self.produced.lock().unwrap().len() >= count {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), arrived)
            .await
            .unwrap();
    }
}

/// A running fake broker; stops when dropped.
pub struct FakeBroker {
    pub broker_id: i32,
    pub address: SocketAddr,
    pub state: Arc<BrokerState>,
    _process: Process,
}

impl FakeBroker {
    pub fn start(broker_id: i32) -> Self {
        let state = Arc::new(BrokerState {
            mode: Mutex::new(ProduceMode::Answer),
            produced: Mutex::default(),
            records: Mutex::default(),
            fetches: Mutex::default(),
            not_leader_of: Mutex::default(),
            finished: Mutex::default(),
            changed: Notify::new(),
            released: CancellationToken::new(),
        });
        let service = BrokerService {
            broker_id,
            state: state.clone(),
        };
        let (address, process) = serve(move |server| {
            server
                .add_service(v1::data_server::DataServer::new(service.clone()))
                .add_service(v1::groups_server::GroupsServer::new(service))
        });
        Self {
            broker_id,
            address,
            state,
            _process: process,
        }
    }

    pub fn set_mode(&self, mode: ProduceMode) {
        *self.state.mode.lock().unwrap() = mode;
    }

    /// What fetches of the partition of this Raft group get from now on.
    pub fn set_records(&self, raft_group_id: u64, records: Bytes) {
        let mut all = self.state.records.lock().unwrap();
        all.insert(raft_group_id, records);
    }
}

#[derive(Clone)]
struct BrokerService {
    broker_id: i32,
    state: Arc<BrokerState>,
}
