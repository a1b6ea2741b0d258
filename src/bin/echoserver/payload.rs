//! The bytes that a connection sends: a function of the connection and the offset in its stream, without a period.
//!
//! Each block is the same noise, combined with a key of its own. A lost, repeated, swapped or foreign buffer
//! therefore differs from what is expected, whatever its size; and generating a byte costs little more than
//! copying it.

const BLOCK: usize = 4096;

static NOISE: [u8; BLOCK] = noise();

const fn noise() -> [u8; BLOCK] {
    let mut noise = [0; BLOCK];
    let mut at = 0;
    while at < BLOCK {
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
    pub(crate) fn fill(self, mut offset: u64, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let (noise, key) = self.rest_of_block(offset);
            let (part, rest) = bytes.split_at_mut(noise.len().min(bytes.len()));
            let (words, tail) = part.as_chunks_mut::<8>();
            let (noise_words, _) = noise.as_chunks::<8>();
            for (word, noise) in words.iter_mut().zip(noise_words) {
                *word = (u64::from_le_bytes(*noise) ^ key).to_le_bytes();
            }
            let noise_tail = &noise[words.len() * 8..];
            for (byte, (noise, key)) in tail
                .iter_mut()
                .zip(noise_tail.iter().zip(key.to_le_bytes()))
            {
                *byte = noise ^ key;
            }
            offset += part.len() as u64;
            bytes = rest;
        }
    }

    /// Returns the first position in `bytes` that differs from the stream at `offset`, and the byte expected there.
    pub(crate) fn find_difference(self, mut offset: u64, bytes: &[u8]) -> Option<(usize, u8)> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (noise, key) = self.rest_of_block(offset);
            let (part, after) = rest.split_at(noise.len().min(rest.len()));
            let (words, tail) = part.as_chunks::<8>();
            let (noise_words, _) = noise.as_chunks::<8>();
            let mut difference = 0;
            for (word, noise) in words.iter().zip(noise_words) {
                difference |= u64::from_le_bytes(*word) ^ u64::from_le_bytes(*noise) ^ key;
            }
            let noise_tail = &noise[words.len() * 8..];
            for (byte, (noise, key)) in tail.iter().zip(noise_tail.iter().zip(key.to_le_bytes())) {
                difference |= u64::from(byte ^ noise ^ key);
            }
            if difference != 0 {
                let mut expected = vec![0; part.len()];
                self.fill(offset, &mut expected);
                let at = (0..part.len()).find(|&at| part[at] != expected[at])?;
                return Some((bytes.len() - rest.len() + at, expected[at]));
            }
            offset += part.len() as u64;
            rest = after;
        }
        None
    }

    /// Returns the noise from `offset` to the end of its block, and the key for 8 bytes of it.
    fn rest_of_block(self, offset: u64) -> (&'static [u8], u64) {
        let start = (offset % BLOCK as u64) as usize;
        let key = mix(self.first_block.wrapping_add(offset / BLOCK as u64));
        (&NOISE[start..], key.rotate_right(8 * (start as u32 % 8)))
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
        for (start, length) in [
            (0, 1),
            (1, 7),
            (5, 64),
            (4_090, 13),
            (4_096, 4_096),
            (3_001, 9_000),
        ] {
            let part = &whole[start..start + length];
            assert_eq!(bytes(7, start as u64, length), part, "{start} {length}");
            assert_eq!(Payload::new(7).find_difference(start as u64, part), None);
        }
    }

    #[test]
    fn one_wrong_byte_is_found_wherever_it_is() {
        for at in [0, 1, 8, 2_499, 4_095, 4_096, 9_999] {
            let mut wrong = bytes(1, 500, 10_000);
            let expected = wrong[at];
            wrong[at] ^= 1;
            let found = Payload::new(1).find_difference(500, &wrong);
            assert_eq!(found, Some((at, expected)));
        }
    }

    /// No stretch of 8 bytes occurs twice, in a stream or in two.
    #[test]
    fn streams_do_not_repeat() {
        let streams = [
            bytes(0, 0, 1 << 18),
            bytes(1, 0, 1 << 18),
            bytes(0, 1 << 40, 1 << 18),
        ];
        let windows = streams.iter().flat_map(|stream| stream.windows(8));
        let mut windows: Vec<_> = windows
            .map(|window| u64::from_le_bytes(window.try_into().unwrap()))
            .collect();
        windows.sort_unstable();
        assert!(windows.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
