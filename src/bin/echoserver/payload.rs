//! The bytes that a connection sends: a function of the connection and the offset in its stream, without a period.
//!
//! Each block is the same noise, combined with a key of its own. A lost, repeated, swapped or foreign buffer
//! therefore differs from what is expected, whatever its size; and generating a byte costs little more than
//! copying it.

use std::iter;

const BLOCK: usize = 4096;
const WORD: usize = 8;

/// The noise of a block, and of one more word, so that each position is the beginning of a word.
static NOISE: [u8; BLOCK + WORD] = noise();

const fn noise() -> [u8; BLOCK + WORD] {
    let mut noise = [0; BLOCK + WORD];
    let mut at = 0;
    while at < noise.len() {
        noise[at] = mix(at as u64).to_le_bytes()[0];
        at += 1;
    }
    noise
}

/// A bijection whose results look random (the finalizer of splitmix64).
const fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// The stream of one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payload {
    first_block: u64,
}

impl Payload {
    /// Connections with different numbers have different streams.
    pub(crate) fn new(connection: u64) -> Self {
        Self {
            first_block: mix(connection),
        }
    }

    /// Writes the bytes of the stream that follow `offset`.
    pub(crate) fn fill(self, offset: u64, bytes: &mut [u8]) {
        self.for_each_word(offset, bytes, |word, expected| *word = expected);
    }

    /// Returns the first position in `bytes` that differs from the stream at `offset`, and the byte expected there.
    /// Does not change `bytes`.
    pub(crate) fn find_difference(self, offset: u64, bytes: &mut [u8]) -> Option<(usize, u8)> {
        let mut difference = 0;
        self.for_each_word(offset, bytes, |word, expected| {
            difference |= u64::from_le_bytes(*word) ^ u64::from_le_bytes(expected);
        });
        if difference == 0 {
            return None;
        }
        let mut expected = vec![0; bytes.len()];
        self.fill(offset, &mut expected);
        let at = iter::zip(bytes, &expected).position(|(byte, expected)| byte != expected)?;
        Some((at, expected[at]))
    }

    /// Calls `visit` with each word of `bytes` and the word of the stream at its place. The last one is padded.
    #[inline]
    fn for_each_word(
        self,
        mut offset: u64,
        mut bytes: &mut [u8],
        mut visit: impl FnMut(&mut [u8; WORD], [u8; WORD]),
    ) {
        while !bytes.is_empty() {
            let start = (offset % BLOCK as u64) as usize;
            let key = mix(self.first_block.wrapping_add(offset / BLOCK as u64));
            let key = key.rotate_right(8 * (start as u32 % 8));
            let stream = |noise: &[u8; WORD]| (u64::from_le_bytes(*noise) ^ key).to_le_bytes();
            let (part, rest) = bytes.split_at_mut(bytes.len().min(BLOCK - start));
            let (words, tail) = part.as_chunks_mut();
            let (noise, _) = NOISE[start..].as_chunks();
            for (word, noise) in words.iter_mut().zip(noise) {
                visit(word, stream(noise));
            }
            if !tail.is_empty() {
                let expected = stream(&noise[words.len()]);
                let mut word = expected;
                word[..tail.len()].copy_from_slice(tail);
                visit(&mut word, expected);
                tail.copy_from_slice(&word[..tail.len()]);
            }
            offset += part.len() as u64;
            bytes = rest;
        }
    }
}

#[cfg(test)]
mod tests;
