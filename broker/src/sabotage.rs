//! Faults built into a broker on purpose, so that the consistency checker can be seen to find them.
//!
//! Invariants: compiled only with the feature `sabotage`, which only `chronik-broker-sabotaged`
//! requires and no product is built with; which fault it is, is said loudly at the start.

use std::sync::OnceLock;

/// What such a broker prints first. A test looks for it in the product's binary, in vain.
pub const MARK: &str = "THIS BROKER IS SABOTAGED AND LOSES DATA";

/// The environment's variable that names the fault.
pub const VARIABLE: &str = "CHRONIK_SABOTAGE";

/// What the broker does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// acks=all is answered when the leader has the entry, whoever else has it.
    AckBeforeCommit,
    /// Every batch of an idempotent producer is taken for the next one.
    ForgetSequences,
    /// Consumers get what is not committed yet.
    ReadUncommitted,
}

static CHOSEN: OnceLock<Sabotage> = OnceLock::new();

/// Reads the environment, once, and says what is going to be wrong.
pub fn choose() -> Result<(), String> {
    let name = std::env::var(VARIABLE).unwrap_or_default();
    let chosen = match name.as_str() {
        "ack-before-commit" => Sabotage::AckBeforeCommit,
        "forget-sequences" => Sabotage::ForgetSequences,
        "read-uncommitted" => Sabotage::ReadUncommitted,
        _ => {
            return Err(format!(
                "{VARIABLE} must be ack-before-commit, forget-sequences or read-uncommitted"
            ));
        }
    };
    eprintln!("ERROR {MARK}: {chosen:?}");
    CHOSEN.get_or_init(|| chosen);
    Ok(())
}

/// Whether this is the fault to commit.
pub fn is(fault: Sabotage) -> bool {
    CHOSEN.get() == Some(&fault)
}
