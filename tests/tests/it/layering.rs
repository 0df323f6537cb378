//! Who may import whom. A new edge between crates is a change of this table.

use std::collections::BTreeSet;
use std::process::Command;

use chronik_tests::project_root;
use serde_json::Value;

/// Crate (without its prefix) and what it may use of this workspace. `tests` may use anything.
const EDGES: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("storage", &["types"]),
    ("proto", &["types"]),
    ("telemetry", &[]),
    ("controller", &["proto", "types", "telemetry"]),
    ("gateway", &["proto", "types", "telemetry"]),
    ("broker", &["storage", "proto", "types", "telemetry"]),
    ("cli", &["proto", "types"]),
];

const MAY_USE_ANYTHING: &[&str] = &["tests"];

/// Crates that only some may use, wherever they come from: the seams of the design.
const RESERVED: &[(&str, &[&str])] = &[
    ("sqlx", &["controller"]),
    ("openraft", &["controller", "broker"]),
    ("kafka-wire", &["gateway"]),
    ("axum", &["controller", "telemetry"]),
];

fn packages() -> Vec<Value> {
    let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()))
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .current_dir(project_root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    metadata["packages"]
        .as_array()
        .expect("a list of packages")
        .clone()
}

fn short(name: &str) -> Option<&str> {
    name.strip_prefix("chronik-")
}

/// Dependencies that end up in the product; dev-dependencies may be anything.
fn dependencies(package: &Value) -> impl Iterator<Item = &str> {
    let list = package["dependencies"].as_array().into_iter().flatten();
    list.filter(|dependency| dependency["kind"] != "dev")
        .filter_map(|dependency| dependency["name"].as_str())
}

#[test]
fn crates_import_only_what_the_table_allows() {
    let mut seen = BTreeSet::new();
    for package in packages() {
        let name = package["name"].as_str().expect("a package has a name");
        let name = short(name).unwrap_or_else(|| panic!("{name} is not named chronik-*"));
        seen.insert(name.to_owned());
        if MAY_USE_ANYTHING.contains(&name) {
            continue;
        }
        let (_, allowed) = EDGES
            .iter()
            .find(|(from, _)| *from == name)
            .unwrap_or_else(|| panic!("{name} is not in the table of edges"));
        for dependency in dependencies(&package) {
            if let Some(to) = short(dependency) {
                assert!(allowed.contains(&to), "{name} must not import {to}");
            }
        }
    }
    for (name, _) in EDGES {
        assert!(
            seen.contains(*name),
            "the table of edges names {name}, which does not exist"
        );
    }
}

/// A broker that breaks its promises exists for one test; nothing else may build or ship it.
#[test]
fn no_product_is_built_with_sabotage() {
    for package in packages() {
        let name = package["name"].as_str().expect("a package has a name");
        let features = package["features"].as_object().expect("a table");
        for (feature, enables) in features {
            let by_itself = name == "chronik-broker" && feature == "sabotage";
            assert!(
                by_itself || !enables.to_string().contains("sabotage"),
                "{name}: feature {feature} turns sabotage on"
            );
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let asked = dependency["features"].to_string();
            assert!(!asked.contains("sabotage"), "{name} asks for sabotage");
        }
        for target in package["targets"].as_array().into_iter().flatten() {
            let is_sabotaged = target["name"] == "chronik-broker-sabotaged";
            let requires = target["required-features"].to_string();
            assert!(
                !is_sabotaged || requires.contains("sabotage"),
                "{name} builds a sabotaged broker without being asked"
            );
        }
    }
    let mark = b"THIS BROKER IS SABOTAGED";
    for product in [
        "chronik-broker",
        "chronik-gateway",
        "chronik-controller",
        "chronik",
    ] {
        let path = chronik_tests::bin_dir().join(product);
        let binary =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let found = binary.windows(mark.len()).any(|bytes| bytes == mark);
        assert!(!found, "{} is sabotaged", path.display());
    }
}

#[test]
fn seams_are_crossed_only_where_they_belong() {
    for package in packages() {
        let name = package["name"]
            .as_str()
            .and_then(short)
            .expect("checked by the other test");
        for dependency in dependencies(&package) {
            if let Some((_, allowed)) = RESERVED
                .iter()
                .find(|(reserved, _)| *reserved == dependency)
            {
                assert!(allowed.contains(&name), "{name} must not use {dependency}");
            }
        }
    }
}
