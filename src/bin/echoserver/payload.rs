//! The bytes that a connection sends: a function of the connection and the offset in its stream, without a period.
//!
//! Each block is the same noise, combined with a key of its own. A lost, repeated, swapped or foreign buffer
//! therefore differs from what is expected, whatever its size; and generating a byte costs little more than
//! copying it.

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
        let mut positions = 0..bytes.len();
        let at = positions.find(|&at| bytes[at] != expected[at])?;
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
mod tests {
    use super::*;

    fn bytes(connection: u64, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Payload::new(connection).fill(offset, &mut bytes);
        bytes
    }

    #[test]
    fn stream_does_not_depend_on_how_it_is_cut() {
        let whole = bytes(7, 0, 3 * BLOCK);
        for start in [0, 1, 5, 3_001, 4_090, 4_096] {
            for length in [1, 7, 13, 64, 4_096, 8_000] {
                let mut part = bytes(7, start as u64, length);
                assert_eq!(part, whole[start..start + length], "{start} {length}");
                let found = Payload::new(7).find_difference(start as u64, &mut part);
                assert_eq!(found, None);
            }
        }
    }

    #[test]
    fn one_wrong_byte_is_found_wherever_it_is() {
        for at in [0, 1, 8, 2_499, 4_095, 4_096, 9_999] {
            let mut wrong = bytes(1, 500, 10_000);
            let expected = wrong[at];
            wrong[at] ^= 1;
            let found = Payload::new(1).find_difference(500, &mut wrong);
            assert_eq!(found, Some((at, expected)));
        }
    }

    /// No stretch of 8 bytes occurs twice, in a stream or in two.
    #[test]
    fn streams_do_not_repeat() {
        let places = [(0, 0), (1, 0), (0, 1 << 40)];
        let streams = places.map(|(connection, offset)| bytes(connection, offset, 1 << 18));
        let windows = streams.iter().flat_map(|stream| stream.windows(8));
        let mut windows: Vec<_> = windows.collect();
        windows.sort_unstable();
        assert!(windows.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
