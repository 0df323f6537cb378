//! Raising the log start offset: agreed between the replicas by an entry of the group's log.
//!
//! Invariant: only a leader proposes it, never above its high watermark; a replica deletes nothing
//! before the entry is committed. An error other than `TimedOut` means that nothing was proposed.

use std::sync::Arc;

use chronik_types::offset::Offset;
use openraft::errors::{ClientWriteError, ForwardReason};
use openraft::impls::OneshotResponder;
use tokio::time::{Instant, timeout_at};

use super::error::{AppendError, LogStartError};
use super::lease::stopped;
use super::raft_config::{CommittedLeaderId, Control, EntryData, TypeConfig};
use super::{Leadership, Replica};

/// How one proposal ended.
enum Tried {
    Applied,
    LeaseExpired,
    Failed(AppendError),
}

impl Replica {
    /// Raises the log start offset to `offset`, `None` for the high watermark, and gives what it is
    /// then; at once where it is there already. Leader only.
    pub async fn raise_log_start(
        self: &Arc<Self>,
        offset: Option<Offset>,
        deadline: Instant,
    ) -> Result<Offset, LogStartError> {
        let leadership = self.wait_until_leading(deadline).await?;
        let high_watermark = self.high_watermark();
        let offset = offset.unwrap_or(high_watermark);
        // What is above the high watermark here may not be at a leader that this one has not heard of.
        if offset > high_watermark && !self.leads_still(leadership.leader_epoch).await {
            return Err(AppendError::NotLeader { leader: None }.into());
        }
        if offset < Offset::ZERO || offset > high_watermark {
            return Err(LogStartError::OutOfRange {
                offset,
                high_watermark,
            });
        }
        loop {
            let start = self.log_start_offset();
            if offset <= start {
                return Ok(start);
            }
            match self.propose_log_start(offset, &leadership, deadline).await {
                Tried::Applied => return Ok(self.log_start_offset()),
                Tried::Failed(error) => return Err(error.into()),
                Tried::LeaseExpired => self.renew_lease(deadline).await?,
            }
        }
    }

    /// A leader that has not applied its predecessors' entries does not know its high watermark.
    async fn wait_until_leading(&self, deadline: Instant) -> Result<Leadership, AppendError> {
        let mut receiver = self.state.leadership.subscribe();
        let settled = receiver.wait_for(|l| !l.is_leader || l.ready);
        match timeout_at(deadline, settled).await {
            Ok(Ok(leadership)) if leadership.ready => Ok(*leadership),
            Ok(_) => Err(self.not_leader()),
            // Nothing was proposed, but the client's time is up.
            Err(_elapsed) => Err(AppendError::TimedOut),
        }
    }

    async fn propose_log_start(
        &self,
        offset: Offset,
        leadership: &Leadership,
        deadline: Instant,
    ) -> Tried {
        let Ok(term) = u64::try_from(leadership.leader_epoch.0) else {
            return Tried::Failed(self.not_leader());
        };
        let Some(raft) = self.leading_raft().await else {
            return Tried::Failed(self.not_leader());
        };
        let (responder, receiver) = OneshotResponder::<TypeConfig, _>::new_pair();
        let proposed = raft
            .write(EntryData::Control(Control::LogStart(offset)))
            .with_leader(CommittedLeaderId { term })
            .responder(responder)
            .await;
        if let Err(fatal) = proposed {
            return Tried::Failed(stopped(&fatal));
        }
        match timeout_at(deadline, receiver).await {
            Ok(Ok(Ok(_))) => Tried::Applied,
            Ok(Ok(Err(ClientWriteError::ForwardToLeader(forward)))) => match forward.reason {
                ForwardReason::LeaseExpired => Tried::LeaseExpired,
                ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => {
                    Tried::Failed(self.not_leader())
                }
            },
            // Cut off under another leader, or no majority in time: it may come into force yet.
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => Tried::Failed(AppendError::TimedOut),
        }
    }
}
