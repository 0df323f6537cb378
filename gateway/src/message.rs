//! A macro for the message library's structs, which can only be built from their defaults.

/// `message!(Type { field: value, .. })`: the type's default with some fields set.
macro_rules! message {
    ($type:ty { $($field:ident : $value:expr),* $(,)? }) => {{
        #[allow(unused_mut)]
        let mut message = <$type>::default();
        $(message.$field = $value;)*
        message
    }};
}
