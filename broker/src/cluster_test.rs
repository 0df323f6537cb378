//! Three brokers in one process.
