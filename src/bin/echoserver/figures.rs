//! Numbers as text.

use std::fmt;

/// A number with separators: 3,000,000.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count<Number>(pub(crate) Number);

impl<Number: fmt::Display> fmt::Display for Count<Number> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let groups = digits.as_bytes().rchunks(3).rev();
        let groups: Vec<_> = groups.map(String::from_utf8_lossy).collect();
        f.pad(&groups.join(","))
    }
}
