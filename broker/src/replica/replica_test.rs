//! What a partition promises, tried on three replicas in one process. Here: what a partition is given,
//! and what is read from it.

mod idempotence_test;
mod in_sync_test;
mod leadership_test;
mod produce_test;
mod read_test;

use std::time::Duration;

use bytes::Bytes;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use chronik_types::record_batch::batches;
use tokio::time::Instant;

use super::queue::{Acks, ProduceItem};
use super::read::ReadRequest;
use super::test_batches::{idempotent, value, with_records};
use super::test_cluster::{Cluster, LIMIT};
use super::{AppendError, ReadError};

const SHORT: Duration = Duration::from_millis(500);

/// Records for the partition, from a client that waits until `deadline`.
fn item(records: Vec<u8>, acks: Acks, deadline: Instant) -> ProduceItem {
    ProduceItem {
        records: Bytes::from(records),
        acks,
        deadline,
        leader_epoch: None,
        trace: None,
    }
}

fn fetch(offset: i64) -> ReadRequest {
    ReadRequest {
        offset: Offset(offset),
        max_bytes: 1 << 20,
        current_leader_epoch: LeaderEpoch(-1),
        last_fetched_epoch: LeaderEpoch(-1),
    }
}

/// Base offset, leader epoch and bytes after the stamped fields of each batch.
fn contents(read: &[Bytes]) -> Vec<(i64, i32, Vec<u8>)> {
    let mut out = Vec::new();
    for bytes in read {
        for batch in batches(bytes) {
            let (at, header) = batch.unwrap();
            header.verify_crc(&bytes[at..]).unwrap();
            let body = bytes[at + 17..at + header.size_bytes()].to_vec();
            out.push((header.base_offset.0, header.leader_epoch.0, body));
        }
    }
    out
}
