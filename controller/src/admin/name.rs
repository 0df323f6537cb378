//! Topic names, by Kafka's rules.

const LENGTH_MAX: usize = 249;

/// Says what is wrong with a topic name, if anything.
pub fn check(name: &str) -> Result<(), String> {
    if name.is_empty() || name == "." || name == ".." {
        return Err("a topic name cannot be empty, '.' or '..'".to_owned());
    }
    if name.len() > LENGTH_MAX {
        return Err(format!("a topic name has at most {LENGTH_MAX} characters"));
    }
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if !name.bytes().all(legal) {
        return Err("a topic name has only ASCII letters, digits, '.', '_' and '-'".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_as_kafka_does() {
        for legal in [
            "a",
            "A.b_c-9",
            "__consumer_offsets",
            "...",
            &"x".repeat(249),
        ] {
            assert_eq!(check(legal), Ok(()), "{legal}");
        }
        for illegal in ["", ".", "..", "a b", "a/b", "ü", "a\0", &"x".repeat(250)] {
            assert!(check(illegal).is_err(), "{illegal}");
        }
    }
}
