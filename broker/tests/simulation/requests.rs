//! What clients ask of a broker, and how its process serves them: in the order in which they come,
//! each answered when it is done.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use chronik_broker::replica::{
    Acks, AppendError, Appended, ProduceItem, ReadError, ReadRequest, ReadResult,
};
use chronik_broker::replicas::Replicas;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How long a broker may take for a produce request.
pub const PRODUCE_LIMIT: Duration = Duration::from_millis(2_000);
const READ_MAX_BYTES: usize = 16 << 10;

pub struct Request {
    pub id: u64,
    pub group: RaftGroupId,
    pub ask: Ask,
}

pub enum Ask {
    Produce(Bytes, Acks),
    /// As a consumer does: of the leader, with the epoch of the last record it has.
    Read(Offset, LeaderEpoch),
    /// Committed records of any replica.
    ReadAny(Offset),
}

pub struct Response {
    pub id: u64,
    pub answer: Answer,
}

pub enum Answer {
    Produced(Result<Appended, AppendError>),
    Read(Result<ReadResult, ReadError>),
}

/// Serves requests for the life of the process.
pub async fn serve(
    replicas: Replicas,
    mut requests: mpsc::UnboundedReceiver<Request>,
    responses: Arc<Mutex<Vec<Response>>>,
) {
    while let Some(Request { id, group, ask }) = requests.recv().await {
        let respond = {
            let responses = responses.clone();
            move |answer| responses.lock().unwrap().push(Response { id, answer })
        };
        let Some(replica) = replicas.get(group) else {
            // It is not open yet.
            respond(match ask {
                Ask::Produce(..) => Answer::Produced(Err(AppendError::NotLeader { leader: None })),
                Ask::Read(..) | Ask::ReadAny(_) => {
                    Answer::Read(Err(ReadError::NotLeader { leader: None }))
                }
            });
            continue;
        };
        match ask {
            Ask::Produce(records, acks) => {
                let deadline = Instant::now() + PRODUCE_LIMIT;
                let item = ProduceItem {
                    records,
                    acks,
                    deadline,
                    leader_epoch: None,
                    trace: None,
                };
                // In order: the first stage is done before the next request is looked at.
                match replica.enqueue(item) {
                    Err(error) => respond(Answer::Produced(Err(error))),
                    Ok(appended) => {
                        tokio::spawn(async move {
                            respond(Answer::Produced(appended.until(deadline).await));
                        });
                    }
                }
            }
            Ask::Read(offset, last_fetched_epoch) => {
                tokio::spawn(async move {
                    let request = ReadRequest {
                        offset,
                        max_bytes: READ_MAX_BYTES,
                        current_leader_epoch: LeaderEpoch(-1),
                        last_fetched_epoch,
                    };
                    respond(Answer::Read(replica.read(request).await));
                });
            }
            Ask::ReadAny(offset) => {
                tokio::spawn(async move {
                    // Read first, so that it is never below what was read.
                    let records = replica.read_committed_from(offset, READ_MAX_BYTES).await;
                    let high_watermark = replica.high_watermark();
                    respond(Answer::Read(records.map(|records| ReadResult {
                        high_watermark,
                        log_start_offset: replica.log_start_offset(),
                        records,
                        diverging: None,
                    })));
                });
            }
        }
    }
}
