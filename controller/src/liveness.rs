//! Sessions of brokers and gateways: heartbeats and now -> who expires. Pure, in the memory of the
//! leading controller only: a heartbeat costs no transaction.
//!
//! Invariant: a session that was renewed within the timeout never expires, and one that was not
//! expires once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chronik_types::cluster_image::ClusterImage;
use chronik_types::epoch::BrokerEpoch;
use chronik_types::id::BrokerId;
use uuid::Uuid;

use crate::command::{BrokerSession, GatewaySession};

#[derive(Debug)]
pub struct Liveness {
    timeout: Duration,
    brokers: HashMap<BrokerId, (BrokerEpoch, Instant)>,
    gateways: HashMap<String, (Uuid, Instant)>,
}

/// Sessions that ran out together.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Expired {
    pub brokers: Vec<BrokerSession>,
    pub gateways: Vec<GatewaySession>,
}

impl Liveness {
    pub fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            brokers: HashMap::new(),
            gateways: HashMap::new(),
        }
    }

    /// A new leader knows no heartbeats: everybody gets a full timeout.
    pub fn reset(&mut self, image: &ClusterImage, now: Instant) {
        let deadline = now + self.timeout;
        let live = image.brokers.values().filter(|broker| !broker.fenced);
        self.brokers = live
            .map(|b| (b.broker_id, (b.broker_epoch, deadline)))
            .collect();
        let gateways = image.gateways.values();
        self.gateways = gateways
            .map(|g| (g.gateway_id.clone(), (g.incarnation_id, deadline)))
            .collect();
    }

    pub fn renew_broker(&mut self, session: BrokerSession, now: Instant) {
        let renewed = (session.broker_epoch, now + self.timeout);
        let kept = self.brokers.entry(session.broker_id).or_insert(renewed);
        // A late heartbeat of an earlier incarnation does not count.
        if kept.0 <= session.broker_epoch {
            *kept = renewed;
        }
    }

    pub fn renew_gateway(&mut self, session: &GatewaySession, now: Instant) {
        let renewed = (session.incarnation_id, now + self.timeout);
        self.gateways.insert(session.gateway_id.clone(), renewed);
    }

    pub fn end_broker(&mut self, session: BrokerSession) {
        if self
            .brokers
            .get(&session.broker_id)
            .is_some_and(|kept| kept.0 == session.broker_epoch)
        {
            self.brokers.remove(&session.broker_id);
        }
    }

    pub fn end_gateway(&mut self, session: &GatewaySession) {
        let kept = self.gateways.get(&session.gateway_id);
        if kept.is_some_and(|kept| kept.0 == session.incarnation_id) {
            self.gateways.remove(&session.gateway_id);
        }
    }

    /// Takes out the sessions whose time is over.
    pub fn expire(&mut self, now: Instant) -> Expired {
        let mut expired = Expired::default();
        self.brokers.retain(|broker_id, (broker_epoch, deadline)| {
            let over = *deadline <= now;
            if over {
                let (broker_id, broker_epoch) = (*broker_id, *broker_epoch);
                expired.brokers.push(BrokerSession {
                    broker_id,
                    broker_epoch,
                });
            }
            !over
        });
        self.gateways
            .retain(|gateway_id, (incarnation_id, deadline)| {
                let over = *deadline <= now;
                if over {
                    let (gateway_id, incarnation_id) = (gateway_id.clone(), *incarnation_id);
                    expired.gateways.push(GatewaySession {
                        gateway_id,
                        incarnation_id,
                    });
                }
                !over
            });
        expired
            .brokers
            .sort_unstable_by_key(|session| session.broker_id);
        expired.gateways.sort_unstable();
        expired
    }

    /// Puts sessions back that could not be ended, to expire again at `at`.
    pub fn restore(&mut self, expired: Expired, at: Instant) {
        for session in expired.brokers {
            self.brokers
                .entry(session.broker_id)
                .or_insert((session.broker_epoch, at));
        }
        for session in expired.gateways {
            self.gateways
                .entry(session.gateway_id)
                .or_insert((session.incarnation_id, at));
        }
    }

    /// When to look again: the first deadline, and never later than one timeout from now, since a
    /// session that begins meanwhile cannot end before.
    pub fn next_check(&self, now: Instant) -> Instant {
        let brokers = self.brokers.values().map(|(_, deadline)| *deadline);
        let gateways = self.gateways.values().map(|(_, deadline)| *deadline);
        brokers
            .chain(gateways)
            .min()
            .unwrap_or(now + self.timeout)
            .min(now + self.timeout)
    }
}

impl Expired {
    pub fn is_empty(&self) -> bool {
        self.brokers.is_empty() && self.gateways.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(3);

    fn session(broker_id: i32, epoch: u64) -> BrokerSession {
        BrokerSession {
            broker_id: BrokerId(broker_id),
            broker_epoch: BrokerEpoch(epoch),
        }
    }

    #[test]
    fn a_silent_session_expires_once_and_a_renewed_one_does_not() {
        let start = Instant::now();
        let mut liveness = Liveness::new(TIMEOUT);
        liveness.renew_broker(session(1, 5), start);
        liveness.renew_broker(session(2, 6), start);
        assert_eq!(liveness.next_check(start), start + TIMEOUT);
        liveness.renew_broker(session(2, 6), start + Duration::from_secs(1));
        let expired = liveness.expire(start + TIMEOUT);
        assert_eq!(expired.brokers, [session(1, 5)]);
        assert!(liveness.expire(start + TIMEOUT).is_empty());
        assert_eq!(
            liveness.next_check(start + TIMEOUT),
            start + Duration::from_secs(4)
        );
        liveness.restore(expired, start + Duration::from_secs(10));
        assert_eq!(
            liveness
                .expire(start + Duration::from_secs(20))
                .brokers
                .len(),
            2
        );
    }

    #[test]
    fn an_older_incarnation_neither_renews_nor_ends_a_session() {
        let start = Instant::now();
        let mut liveness = Liveness::new(TIMEOUT);
        liveness.renew_broker(session(1, 7), start);
        liveness.renew_broker(session(1, 5), start + Duration::from_secs(2));
        liveness.end_broker(session(1, 5));
        assert_eq!(liveness.expire(start + TIMEOUT).brokers, [session(1, 7)]);
        let gateway = |id: u128| GatewaySession {
            gateway_id: "g".to_owned(),
            incarnation_id: Uuid::from_u128(id),
        };
        liveness.renew_gateway(&gateway(2), start);
        liveness.end_gateway(&gateway(1));
        assert_eq!(liveness.expire(start + TIMEOUT).gateways, [gateway(2)]);
    }
}
