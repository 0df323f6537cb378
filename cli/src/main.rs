//! `chronik`: operators' commands over the controllers' REST API, and `chronik dev`, a local
//! cluster of real processes.
//!
//! Invariant: exit code 0 means done, 1 means refused or failed, 64 means a command line that
//! makes no sense. Results go to standard output, everything else to standard error.

mod arguments;

mod commands;
mod dev;

mod output;
mod rest;

use std::process::ExitCode;

use clap::Parser as _;

use crate::arguments::{Arguments, Command};

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // `--help` and `--version` come this way too. A closed pipe is nobody's error.
            let _ = error.print();
            return if error.use_stderr() {
                EXIT_USAGE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("chronik: cannot start the async runtime: {error}");
            return EXIT_FAILED.into();
        }
    };
    let outcome = match arguments.command {
        Command::Dev(arguments) => runtime.block_on(dev::run(arguments)),
        Command::Admin(arguments) => runtime.block_on(commands::run(arguments)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chronik: {error:#}");
            let usage = error.is::<arguments::UsageError>();
            if usage {
                EXIT_USAGE.into()
            } else {
                EXIT_FAILED.into()
            }
        }
    }
}
