//! Tasks that wait for something to happen, woken when it does.
//!
//! Invariant: each is on the list once, however often it is polled.

use std::task::Waker;

#[derive(Default)]
pub struct Wakers {
    waiting: Vec<Waker>,
}

impl Wakers {
    pub fn add(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|known| known.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }

    /// All of them, to be woken when the lock that guards this is free again.
    pub fn take(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.waiting)
    }
}
