//! The end-to-end tier of `make test`: one binary, a module per behaviour.
//!
//! Invariant: every test starts what it needs itself, on free ports, and none depends on another.

mod layering;
mod tidy;

mod admin;
mod api_versions;
mod clients;
mod group_tools;
mod groups;
mod lessons;
mod malformed;
mod one_endpoint;

mod checker;
mod controller_disk;
mod controllers_down;
mod copies;
mod damage;
mod durability;
mod failover;
mod figures;
mod full_disk;
mod log_life;
mod paused;
mod placement_cli;
mod reassignment;
mod scale;
mod start_order;
