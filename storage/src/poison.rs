//! The one flag that ends everything after a failed write or fsync. Once set it stays set, because
//! nobody knows any more what is on the disk.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use crate::error::StorageError;
use crate::sync::lock;
use crate::wakers::Wakers;

#[derive(Default)]
pub struct Poison {
    is_set: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    why: Option<Arc<str>>,
    wakers: Wakers,
}

impl Poison {
    /// The first reason stays. Gives the error to tell everybody.
    pub fn set(&self, why: &str) -> StorageError {
        let mut inner = lock(&self.inner);
        if inner.why.is_none() {
            tracing::error!(why, "storage stopped after a failed write");
        }
        let why = inner.why.get_or_insert_with(|| why.into()).clone();
        self.is_set.store(true, Ordering::Release);
        let wakers = inner.wakers.take();
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        StorageError::Poisoned { why }
    }

    pub fn check(&self) -> Result<(), StorageError> {
        if self.is_set.load(Ordering::Acquire) {
            Err(self.set(""))
        } else {
            Ok(())
        }
    }
}

/// Resolves with the reason when the storage is poisoned; the process must then stop.
pub struct Failed {
    pub(crate) poison: Arc<Poison>,
}

impl Future for Failed {
    type Output = StorageError;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<StorageError> {
        let mut inner = lock(&self.poison.inner);
        if let Some(why) = &inner.why {
            return Poll::Ready(StorageError::Poisoned { why: why.clone() });
        }
        inner.wakers.add(context.waker());
        Poll::Pending
    }
}
