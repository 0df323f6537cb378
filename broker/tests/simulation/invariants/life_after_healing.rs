//! Once all faults are healed, every partition takes writes and every consumer reads to the end,
//! within a bounded time.

/// What still has to happen, and until when.
pub struct LifeAfterHealing {
    healed_at_ms: u64,
    limit_ms: u64,
}

impl LifeAfterHealing {
    pub fn new(healed_at_ms: u64, limit_ms: u64) -> LifeAfterHealing {
        LifeAfterHealing {
            healed_at_ms,
            limit_ms,
        }
    }

    /// `missing` says what does not work yet. True: everything does.
    pub fn check(&self, now_ms: u64, missing: &[String]) -> Result<bool, String> {
        let waited_ms = now_ms - self.healed_at_ms;
        if !missing.is_empty() && waited_ms > self.limit_ms {
            return Err(format!(
                "no life {waited_ms} ms after healing: {}",
                missing.join("; ")
            ));
        }
        Ok(missing.is_empty())
    }
}
