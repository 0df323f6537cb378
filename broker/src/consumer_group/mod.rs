//! Classic consumer groups and their offsets.
