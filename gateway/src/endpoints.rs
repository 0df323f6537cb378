//! Which endpoint of which gateway stands for which broker. Pure.
//!
//! Invariants: every gateway that has the same image answers the same; with at least as many
//! endpoints as brokers, each broker has an endpoint of its own; a broker or endpoint that comes
//! or goes moves few others.

use std::collections::{BTreeMap, HashMap, HashSet};

use chronik_types::cluster_image::{Broker, ClusterImage, Endpoint, Gateway};
use chronik_types::id::BrokerId;

/// The endpoint of each broker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointMap {
    by_broker: BTreeMap<BrokerId, Endpoint>,
}

impl EndpointMap {
    /// Maps all registered brokers (fenced ones too, so that a broker's restart moves nothing) to
    /// the endpoints of all registered gateways and of `own`, which may not be registered yet.
    pub fn new(image: &ClusterImage, own: &Gateway) -> EndpointMap {
        let mut gateways: BTreeMap<&str, &Gateway> = image
            .gateways
            .values()
            .map(|g| (g.gateway_id.as_str(), g))
            .collect();
        gateways.entry(&own.gateway_id).or_insert(own);
        let mut endpoints: Vec<(&Endpoint, Option<&str>)> = gateways
            .values()
            .flat_map(|g| g.endpoints.iter().map(|e| (e, g.rack.as_deref())))
            .collect();
        endpoints.sort();
        endpoints.dedup_by(|a, b| a.0 == b.0);

        let mut by_broker = BTreeMap::new();
        // More brokers than endpoints: rounds, each giving every endpoint at most one broker more.
        while by_broker.len() < image.brokers.len() && !endpoints.is_empty() {
            let waiting: Vec<&Broker> = image
                .brokers
                .values()
                .filter(|b| !by_broker.contains_key(&b.broker_id))
                .collect();
            one_round(&waiting, &endpoints, &mut by_broker);
        }
        EndpointMap { by_broker }
    }

    pub fn of(&self, broker_id: BrokerId) -> Option<&Endpoint> {
        self.by_broker.get(&broker_id)
    }

    /// The brokers that an endpoint stands for.
    pub fn brokers_at(&self, endpoint: &Endpoint) -> Vec<BrokerId> {
        self.by_broker
            .iter()
            .filter(|(_, at)| *at == endpoint)
            .map(|(broker_id, _)| *broker_id)
            .collect()
    }
}

/// Gives each broker at most one endpoint, each endpoint at most one broker: best pairs first,
/// same zone before any other.
fn one_round(
    brokers: &[&Broker],
    endpoints: &[(&Endpoint, Option<&str>)],
    by_broker: &mut BTreeMap<BrokerId, Endpoint>,
) {
    let mut pairs: Vec<(bool, u64, BrokerId, &Endpoint)> =
        Vec::with_capacity(brokers.len().saturating_mul(endpoints.len()));
    for broker in brokers {
        for (endpoint, rack) in endpoints {
            let same_zone = rack.is_some() && *rack == broker.rack.as_deref();
            pairs.push((
                same_zone,
                score(broker.broker_id, endpoint),
                broker.broker_id,
                endpoint,
            ));
        }
    }
    pairs.sort_by(|a, b| b.cmp(a));
    let mut taken: HashSet<&Endpoint> = HashSet::new();
    let mut placed: HashMap<BrokerId, &Endpoint> = HashMap::new();
    for (_, _, broker_id, endpoint) in pairs {
        if !placed.contains_key(&broker_id) && taken.insert(endpoint) {
            placed.insert(broker_id, endpoint);
        }
    }
    by_broker.extend(
        placed
            .into_iter()
            .map(|(id, endpoint)| (id, endpoint.clone())),
    );
}

/// Rendezvous hashing: FNV-1a, mixed. Must never change: all gateways have to agree.
fn score(broker_id: BrokerId, endpoint: &Endpoint) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let port = endpoint.port.to_be_bytes();
    let id = broker_id.0.to_be_bytes();
    for byte in endpoint.host.as_bytes().iter().chain(&port).chain(&id) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use chronik_types::epoch::BrokerEpoch;
    use uuid::Uuid;

    use super::*;

    fn gateway(id: &str, rack: Option<&str>, ports: &[u16]) -> Gateway {
        Gateway {
            gateway_id: id.to_owned(),
            incarnation_id: Uuid::nil(),
            rack: rack.map(str::to_owned),
            endpoints: ports
                .iter()
                .map(|port| Endpoint {
                    host: "127.0.0.1".to_owned(),
                    port: *port,
                })
                .collect(),
        }
    }

    fn image(brokers: &[(i32, Option<&str>)], gateways: Vec<Gateway>) -> ClusterImage {
        let mut image = ClusterImage::default();
        for (id, rack) in brokers {
            image.brokers.insert(
                BrokerId(*id),
                Broker {
                    broker_id: BrokerId(*id),
                    incarnation_id: Uuid::nil(),
                    broker_epoch: BrokerEpoch(1),
                    rpc_address: String::new(),
                    rack: rack.map(str::to_owned),
                    fenced: false,
                    drain: Default::default(),
                },
            );
        }
        for gateway in gateways {
            image.gateways.insert(gateway.gateway_id.clone(), gateway);
        }
        image
    }

    const PLAIN: [(i32, Option<&str>); 3] = [(1, None), (2, None), (3, None)];

    #[test]
    fn three_endpoints_stand_for_one_broker_each() {
        let own = gateway("g", None, &[9092, 9093, 9094]);
        for image in [image(&PLAIN, vec![own.clone()]), image(&PLAIN, vec![])] {
            let map = EndpointMap::new(&image, &own);
            for endpoint in &own.endpoints {
                assert_eq!(map.brokers_at(endpoint).len(), 1);
            }
        }
    }

    #[test]
    fn one_endpoint_stands_for_all() {
        let own = gateway("g", None, &[9092]);
        let map = EndpointMap::new(&image(&PLAIN, vec![own.clone()]), &own);
        assert_eq!(map.brokers_at(&own.endpoints[0]).len(), 3);
    }

    #[test]
    fn two_endpoints_share_three_brokers() {
        let own = gateway("g", None, &[9092, 9093]);
        let map = EndpointMap::new(&image(&PLAIN, vec![own.clone()]), &own);
        let mut counts: Vec<usize> = own
            .endpoints
            .iter()
            .map(|endpoint| map.brokers_at(endpoint).len())
            .collect();
        counts.sort();
        assert_eq!(counts, vec![1, 2]);
    }

    #[test]
    fn same_zone_comes_first() {
        let (a, b) = (
            gateway("a", Some("z1"), &[1]),
            gateway("b", Some("z2"), &[2]),
        );
        let brokers = [(1, Some("z2")), (2, Some("z1"))];
        let map = EndpointMap::new(&image(&brokers, vec![a.clone(), b.clone()]), &a);
        assert_eq!(map.of(BrokerId(1)), Some(&b.endpoints[0]));
        assert_eq!(map.of(BrokerId(2)), Some(&a.endpoints[0]));
    }

    #[test]
    fn all_gateways_agree_and_a_lost_gateway_moves_only_its_brokers() {
        let gateways: Vec<Gateway> = (0..4u16)
            .map(|n| {
                gateway(
                    &format!("g{n}"),
                    None,
                    &[n * 10 + 1, n * 10 + 2, n * 10 + 3],
                )
            })
            .collect();
        let brokers: Vec<(i32, Option<&str>)> = (0..6).map(|id| (id, None)).collect();
        let before = image(&brokers, gateways.clone());
        let map = EndpointMap::new(&before, &gateways[0]);
        assert_eq!(map, EndpointMap::new(&before, &gateways[3]));
        let after = image(&brokers, gateways[..3].to_vec());
        let moved = EndpointMap::new(&after, &gateways[0]);
        for (id, endpoint) in &map.by_broker {
            if !gateways[3].endpoints.contains(endpoint) {
                // An endpoint may be taken over by a broker that lost its own and scores higher.
                let now = moved.of(*id).unwrap();
                let taken = moved.brokers_at(endpoint);
                assert!(now == endpoint || !taken.is_empty());
            }
        }
    }
}
