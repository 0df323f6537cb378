//! Tests of `layout`: what a restart keeps, what flags may change, what is refused.

use std::net::TcpListener;

use super::*;

const FREE: Wanted = Wanted {
    controllers: None,
    brokers: None,
    gateways: None,
    kafka_port: Some(0),
    rest_port: Some(0),
};

fn plan(kept: Option<Layout>, wanted: Wanted) -> Result<Layout, PlanError> {
    Layout::plan(kept, wanted, &mut Ports::apart())
}

#[test]
fn a_fresh_cluster_has_three_controllers_three_brokers_and_an_endpoint_per_broker() {
    let layout = plan(None, FREE).unwrap();
    assert_eq!((layout.controllers.len(), layout.brokers.len()), (3, 3));
    assert_eq!(layout.gateways.len(), 1);
    assert_eq!(layout.gateways[0].kafka.len(), 3);
    let mut all: Vec<u16> = layout
        .controllers
        .iter()
        .flat_map(|c| [c.rpc, c.rest])
        .collect();
    all.extend(layout.brokers.iter().flat_map(|b| [b.rpc, b.http]));
    all.extend(
        layout
            .gateways
            .iter()
            .flat_map(|g| g.kafka.iter().copied().chain([g.http])),
    );
    assert!(all.iter().all(|&port| port != 0), "{layout:?}");
    let total = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), total, "a port is used twice: {layout:?}");
}

#[test]
fn help_tells_what_a_cluster_is_without_flags() {
    use clap::CommandFactory as _;
    let command = crate::arguments::Arguments::command();
    let dev = command.find_subcommand("dev").unwrap();
    for (name, default) in [
        ("kafka_port", DEFAULT_KAFKA_PORT),
        ("rest_port", DEFAULT_REST_PORT),
        ("controllers", DEFAULT_CONTROLLERS),
        ("brokers", DEFAULT_BROKERS),
        ("gateways", DEFAULT_GATEWAYS),
    ] {
        let argument = dev.get_arguments().find(|a| a.get_id() == name).unwrap();
        let help = argument.get_help().unwrap().to_string();
        assert!(
            help.contains(&format!("[default: {default}]")),
            "{name}: {help}"
        );
    }
    // As the README has it.
    assert_eq!((DEFAULT_KAFKA_PORT, DEFAULT_REST_PORT), (9092, 8080));
}

#[test]
fn a_restart_keeps_every_port_and_survives_the_file() {
    let first = plan(None, FREE).unwrap();
    let text = toml::to_string(&first).unwrap();
    let kept: Layout = toml::from_str(&text).unwrap();
    assert_eq!(kept, first);
    assert_eq!(plan(Some(kept.clone()), Wanted::default()).unwrap(), first);
    assert_eq!(plan(Some(kept), FREE).unwrap(), first);
}

#[test]
fn endpoints_follow_the_kafka_port_over_all_gateways() {
    // The free ports of one run are used as fixed ones of the next.
    let mut ports = Ports::apart();
    let base = loop {
        let port = ports.pick().unwrap();
        let mut probe = Ports::apart();
        if (1..4).all(|offset| probe.hold(port + offset).is_ok()) {
            break port;
        }
    };
    drop(ports);
    let wanted = Wanted {
        controllers: Some(1),
        brokers: Some(2),
        gateways: Some(2),
        kafka_port: Some(base),
        rest_port: Some(0),
    };
    let layout = plan(None, wanted).unwrap();
    let endpoints: Vec<u16> = layout
        .gateways
        .iter()
        .flat_map(|g| g.kafka.clone())
        .collect();
    assert_eq!(endpoints, [base, base + 1, base + 2, base + 3]);
}

#[test]
fn brokers_and_gateways_may_be_added() {
    let first = plan(
        None,
        Wanted {
            brokers: Some(1),
            controllers: Some(1),
            ..FREE
        },
    )
    .unwrap();
    let more = Wanted {
        brokers: Some(3),
        gateways: Some(2),
        ..Wanted::default()
    };
    let second = plan(Some(first.clone()), more).unwrap();
    assert_eq!(second.brokers[0], first.brokers[0]);
    assert_eq!(second.gateways[0].kafka[0], first.gateways[0].kafka[0]);
    assert_eq!(
        second
            .gateways
            .iter()
            .map(|g| g.kafka.len())
            .collect::<Vec<_>>(),
        [3, 3]
    );
}

#[test]
fn what_holds_data_is_not_taken_away() {
    let first = plan(None, FREE).unwrap();
    let fewer = Wanted {
        brokers: Some(2),
        ..Wanted::default()
    };
    assert!(matches!(
        plan(Some(first.clone()), fewer),
        Err(PlanError::BrokersKept { kept: 3 })
    ));
    let other = Wanted {
        controllers: Some(1),
        ..Wanted::default()
    };
    assert!(matches!(
        plan(Some(first), other),
        Err(PlanError::ControllersFixed { kept: 3 })
    ));
}

#[test]
fn a_taken_port_is_named_with_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let error = plan(
        None,
        Wanted {
            kafka_port: Some(port),
            ..FREE
        },
    )
    .unwrap_err()
    .to_string();
    assert!(
        error.contains(&port.to_string()) && error.contains("--kafka-port"),
        "{error}"
    );

    let mut kept = plan(None, FREE).unwrap();
    kept.brokers[1].rpc = port;
    let error = plan(Some(kept), Wanted::default()).unwrap_err().to_string();
    assert!(
        error.contains("gRPC of broker 2") && error.contains("cluster.toml"),
        "{error}"
    );
}

#[test]
fn endpoints_do_not_run_past_the_last_port() {
    let wanted = Wanted {
        brokers: Some(3),
        kafka_port: Some(65_535),
        ..FREE
    };
    assert!(matches!(
        plan(None, wanted),
        Err(PlanError::TooManyPorts { .. })
    ));
}
