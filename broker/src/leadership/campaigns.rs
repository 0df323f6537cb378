//! Which of many campaigns go first: partitions that are in use before those that rest.
//!
//! Invariant: at most `RUNNING_MAX` campaigns run at the same time, so that the death of a broker
//! that led thousands of partitions is a queue and not a storm. Every group in the queue is looked
//! at again when its turn comes.

use std::collections::VecDeque;

use chronik_types::id::RaftGroupId;

/// Campaigns at the same time.
const RUNNING_MAX: usize = 256;

/// Groups that are to campaign, in two lanes.
#[derive(Debug, Default)]
pub struct CampaignQueue {
    in_use: VecDeque<RaftGroupId>,
    at_rest: VecDeque<RaftGroupId>,
    running: usize,
}

impl CampaignQueue {
    pub fn push(&mut self, group: RaftGroupId, in_use: bool) {
        match in_use {
            true => self.in_use.push_back(group),
            false => self.at_rest.push_back(group),
        }
    }

    /// The next group whose campaign may start now. `started` must follow if it does.
    pub fn pop(&mut self) -> Option<RaftGroupId> {
        if self.is_full() {
            return None;
        }
        self.in_use.pop_front().or_else(|| self.at_rest.pop_front())
    }

    /// As many campaigns run as may.
    pub fn is_full(&self) -> bool {
        self.running >= RUNNING_MAX
    }

    pub fn running(&self) -> u32 {
        u32::try_from(self.running).unwrap_or(u32::MAX)
    }

    pub fn started(&mut self) {
        self.running = self.running.saturating_add(1);
    }

    pub fn ended(&mut self) {
        self.running = self.running.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_goes_first_and_few_run_at_once() {
        let mut queue = CampaignQueue::default();
        for group in 0..2 * RUNNING_MAX as u64 {
            queue.push(RaftGroupId(group), group % 10 == 3);
        }
        let mut order = Vec::new();
        while let Some(group) = queue.pop() {
            queue.started();
            order.push(group.0);
        }
        assert_eq!(order.len(), RUNNING_MAX);
        let in_use = order.iter().take_while(|group| **group % 10 == 3);
        assert_eq!(in_use.count(), 2 * RUNNING_MAX / 10);
        assert_eq!(order[2 * RUNNING_MAX / 10..][..3], [0, 1, 2]);
        assert_eq!(queue.pop(), None);
        queue.ended();
        // One that somebody asks for meanwhile passes all that rest.
        queue.push(RaftGroupId(777), true);
        assert_eq!(queue.pop(), Some(RaftGroupId(777)));
    }
}
