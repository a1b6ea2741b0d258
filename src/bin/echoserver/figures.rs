//! Numbers as text.

use std::fmt;

/// A number with separators: 3,000,000.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count<Number>(pub(crate) Number);

impl<Number: fmt::Display> fmt::Display for Count<Number> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::new();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
}
