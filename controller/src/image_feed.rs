//! The applied image and its latest changes, for watchers and everything else that reads.
//!
//! Invariant: the history is a run of consecutive revisions that ends at the image's. A watcher
//! holds no queue here: it names the revision it is at, and gets what is missing or a full image.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chronik_types::cluster_image::{ClusterImage, ImageChange};
use tokio::sync::watch;

/// Most changes handed out at once.
const CHANGES_PER_READ_MAX: usize = 256;

/// Shared by the state machine, which publishes, and all readers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageFeed {
    history: Arc<Mutex<History>>,
    image: watch::Sender<Arc<ClusterImage>>,
    /// There is an image, and it must not be shown yet.
    held_back: Arc<AtomicBool>,
}

/// What a watcher needs next.
#[derive(Debug, Clone, PartialEq)]
pub enum Missing {
    Nothing,
    /// In order, the first one right on top of the watcher's revision.
    Changes(Vec<Arc<ImageChange>>),
    Image(Arc<ClusterImage>),
}

#[derive(Debug)]
struct History {
    changes: VecDeque<Arc<ImageChange>>,
    changes_max: usize,
    /// Entries of all changes together; a large change counts for what it is.
    entry_count: usize,
    entries_max: usize,
}

impl ImageFeed {
    pub fn new(image: Arc<ClusterImage>, changes_max: usize) -> Self {
        let history = History {
            changes: VecDeque::new(),
            changes_max,
            entry_count: 0,
            entries_max: changes_max.saturating_mul(50),
        };
        Self {
            history: Arc::new(Mutex::new(history)),
            image: watch::Sender::new(image),
            held_back: Arc::default(),
        }
    }

    /// The image as of the last applied command.
    pub fn image(&self) -> Arc<ClusterImage> {
        self.image.borrow().clone()
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<ClusterImage>> {
        self.image.subscribe()
    }

    /// Shows an empty image, of no cluster, until the next `reset`.
    pub fn hold_back(&self) {
        let mut history = self.lock();
        history.clear();
        self.held_back.store(true, Ordering::Release);
        self.image.send_replace(Arc::default());
    }

    pub fn is_held_back(&self) -> bool {
        self.held_back.load(Ordering::Acquire)
    }

    /// Publishes an image and the changes that led to it from the one before.
    pub fn publish(&self, image: Arc<ClusterImage>, changes: Vec<ImageChange>) {
        if self.is_held_back() {
            return;
        }
        let mut history = self.lock();
        for change in changes {
            history.push(Arc::new(change));
        }
        self.image.send_replace(image);
    }

    /// Publishes an image that did not come from the one before: an installed snapshot, or the first
    /// after a restore.
    pub fn reset(&self, image: Arc<ClusterImage>) {
        let mut history = self.lock();
        history.clear();
        self.held_back.store(false, Ordering::Release);
        self.image.send_replace(image);
    }

    /// What a watcher at `revision` needs; 0 stands for no image.
    pub fn missing_since(&self, revision: u64) -> Missing {
        let history = self.lock();
        let image = self.image();
        if revision == image.revision && revision != 0 {
            return Missing::Nothing;
        }
        let Some(first) = history.changes.front().map(|change| change.revision) else {
            return Missing::Image(image);
        };
        let next = revision.saturating_add(1);
        if revision == 0 || next < first || revision > image.revision {
            return Missing::Image(image);
        }
        let skipped = usize::try_from(next - first).unwrap_or(usize::MAX);
        let changes = history
            .changes
            .iter()
            .skip(skipped)
            .take(CHANGES_PER_READ_MAX);
        Missing::Changes(changes.cloned().collect())
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl History {
    fn clear(&mut self) {
        self.changes.clear();
        self.entry_count = 0;
    }

    fn push(&mut self, change: Arc<ImageChange>) {
        self.entry_count = self.entry_count.saturating_add(entry_count(&change));
        self.changes.push_back(change);
        while self.changes.len() > self.changes_max
            || (self.entry_count > self.entries_max && self.changes.len() > 1)
        {
            let Some(oldest) = self.changes.pop_front() else {
                break;
            };
            self.entry_count = self.entry_count.saturating_sub(entry_count(&oldest));
        }
    }
}

fn entry_count(change: &ImageChange) -> usize {
    let in_topics: usize = change
        .topics
        .iter()
        .map(|topic| topic.partitions.len())
        .sum();
    in_topics + change.partitions.len() + change.brokers.len() + change.gateways.len() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(revision: u64) -> ImageChange {
        ImageChange {
            revision,
            ..Default::default()
        }
    }

    fn feed(changes_max: usize, revisions: u64) -> ImageFeed {
        let mut image = ClusterImage::default();
        let feed = ImageFeed::new(Arc::new(image.clone()), changes_max);
        for revision in 1..=revisions {
            image.apply(change(revision));
            feed.publish(Arc::new(image.clone()), vec![change(revision)]);
        }
        feed
    }

    fn revisions(missing: Missing) -> Vec<u64> {
        match missing {
            Missing::Changes(changes) => changes.iter().map(|change| change.revision).collect(),
            other => panic!("expected changes, got {other:?}"),
        }
    }

    #[test]
    fn a_watcher_gets_exactly_what_it_misses() {
        let feed = feed(10, 5);
        assert_eq!(revisions(feed.missing_since(2)), [3, 4, 5]);
        assert_eq!(feed.missing_since(5), Missing::Nothing);
        assert_eq!(feed.missing_since(0), Missing::Image(feed.image()));
    }

    #[test]
    fn who_is_too_far_behind_or_from_elsewhere_gets_an_image() {
        let feed = feed(3, 10);
        assert_eq!(revisions(feed.missing_since(7)), [8, 9, 10]);
        assert_eq!(feed.missing_since(6), Missing::Image(feed.image()));
        assert_eq!(feed.missing_since(11), Missing::Image(feed.image()));
        feed.reset(Arc::new(ClusterImage {
            revision: 20,
            ..Default::default()
        }));
        assert_eq!(feed.missing_since(10), Missing::Image(feed.image()));
    }
}
