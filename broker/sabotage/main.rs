//! A broker that does one thing wrong, chosen by CHRONIK_SABOTAGE: what the consistency checker has to
//! find. Never part of a product; see `chronik_broker::sabotage`.

use std::process::ExitCode;

#[path = "../src/main.rs"]
mod product;

fn main() -> ExitCode {
    if let Err(why) = chronik_broker::sabotage::choose() {
        eprintln!("chronik-broker-sabotaged: {why}");
        return ExitCode::from(64);
    }
    product::main()
}
