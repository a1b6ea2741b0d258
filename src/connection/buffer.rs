//! A byte queue of fixed capacity, and the pool its storage comes from.
//!
//! A buffer is contiguous: data is appended at one end and taken from the other, and whoever looks
//! sees one slice. It never grows; the bound on a server's memory rests on that. A connection has
//! buffers only while they hold bytes: its worker lends it a pair from its [`Pool`] and takes it
//! back, last in first out, so the pair in use is the one that is still in the cache.

use std::fmt;
use std::io::{self, Read, Write};
use std::mem;

/// A queue of bytes with a fixed capacity.
///
/// ```
/// use echoserver::Buffer;
///
/// let mut buffer = Buffer::with_capacity(8);
/// assert!(buffer.push(b"hello"));
/// assert!(!buffer.push(b"world"), "all of it or nothing: three bytes of room are too few");
/// buffer.consume(4);
/// assert_eq!(buffer.data(), b"o");
/// assert_eq!(buffer.room(), 7);
/// ```
pub struct Buffer {
    storage: Box<[u8]>,
    // Data is storage[start..end]; both are 0 whenever it is empty, so `end` alone tells.
    start: usize,
    end: usize,
    /// Somebody wanted to append more than there was room for.
    short: bool,
}

impl Buffer {
    /// The largest capacity, in bytes: 1 GiB.
    pub const MAX_CAPACITY: usize = 1 << 30;

    /// An empty buffer that holds at most `capacity` bytes.
    ///
    /// # Panics
    ///
    /// If `capacity` is above [`Buffer::MAX_CAPACITY`].
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        assert!(
            capacity <= Self::MAX_CAPACITY,
            "a buffer of {capacity} bytes is above the limit of 1 GiB"
        );
        Self {
            storage: vec![0; capacity].into_boxed_slice(),
            start: 0,
            end: 0,
            short: false,
        }
    }

    /// The bytes it holds, oldest first.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.storage[self.start..self.end]
    }

    /// The bytes it holds, to be changed in place.
    #[must_use]
    pub fn data_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.end]
    }

    /// How many bytes it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// The most bytes it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.storage.len()
    }

    /// How many more bytes it can take.
    #[must_use]
    pub fn room(&self) -> usize {
        self.capacity() - self.len()
    }

    /// Drops the first `count` bytes.
    ///
    /// # Panics
    ///
    /// If it holds fewer.
    pub fn consume(&mut self, count: usize) {
        let len = self.len();
        assert!(count <= len, "cannot consume {count} bytes of {len}");
        if count == len {
            self.clear();
        } else {
            self.start += count;
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
    }

    /// Appends all of `bytes`, or, where there is no room for all, nothing. Says whether it did.
    #[must_use = "nothing was appended where this is false"]
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        let fits = bytes.len() <= self.room();
        if fits {
            self.extend(bytes);
        }
        self.short |= !fits;
        fits
    }

    /// Moves bytes from the front of `other` to the end of this one, as many as fit; says how many.
    ///
    /// Nothing is copied where this one is empty: the two swap their storage.
    pub fn append(&mut self, other: &mut Buffer) -> usize {
        if self.is_empty() && self.capacity() == other.capacity() {
            mem::swap(&mut self.storage, &mut other.storage);
            (self.start, self.end) = (other.start, other.end);
            other.clear();
            return self.len();
        }
        self.append_copy(other)
    }

    #[inline(never)]
    fn append_copy(&mut self, other: &mut Buffer) -> usize {
        let count = other.len().min(self.room());
        self.extend(&other.data()[..count]);
        other.consume(count);
        self.short |= !other.is_empty();
        count
    }

    /// Forgets what did not fit so far.
    pub(crate) fn clear_overflow(&mut self) {
        self.short = false;
    }

    /// Whether something did not fit since that was last forgotten.
    pub(crate) fn overflowed(&self) -> bool {
        self.short
    }

    /// Reads once into all the room there is; 0 is the stream's end, or no room.
    pub(crate) fn fill_from(&mut self, reader: &mut impl Read) -> io::Result<usize> {
        if self.start > 0 {
            self.compact();
        }
        let count = reader.read(&mut self.storage[self.end..])?;
        self.end += count;
        Ok(count)
    }

    /// Writes once from the front and drops what was written.
    pub(crate) fn flush_into(&mut self, writer: &mut impl Write) -> io::Result<usize> {
        let count = writer.write(self.data())?;
        self.consume(count);
        Ok(count)
    }

    /// Appends `bytes`, which the caller knows to fit.
    fn extend(&mut self, bytes: &[u8]) {
        if bytes.len() > self.capacity() - self.end {
            self.compact();
        }
        let end = self.end;
        self.storage[end..end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    /// Moves the data to the front, so that all the room is behind it.
    #[inline(never)]
    fn compact(&mut self) {
        self.storage.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }
}

/// For `write!`: takes as much as fits, so an answer that must not be cut short is measured first,
/// or made elsewhere and [pushed](Buffer::push).
impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room());
        self.extend(&bytes[..count]);
        self.short |= count < bytes.len();
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} of {} bytes)", self.len(), self.capacity())
    }
}

/// What a connection has while it holds bytes.
#[derive(Debug)]
pub(crate) struct Buffers {
    pub(crate) input: Buffer,
    pub(crate) output: Buffer,
}

impl Buffers {
    /// Bytes in both.
    pub(crate) fn len(&self) -> usize {
        self.input.len() + self.output.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.input.is_empty() && self.output.is_empty()
    }
}

/// A worker's buffers: a pair at hand for the connection that is running, and spare ones for those
/// that are left with bytes when they stop.
#[derive(Debug)]
pub(crate) struct Pool {
    hand: Box<Buffers>,
    spare: Vec<Box<Buffers>>,
    max_spare: usize,
    capacity: usize,
}

impl Pool {
    /// The most bytes kept spare; above it storage goes back to the allocator.
    const MAX_SPARE_BYTES: usize = 8 << 20;

    /// A pool of buffers of `capacity` bytes each.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            hand: pair(capacity),
            spare: Vec::new(),
            max_spare: Self::max_spare(capacity),
            capacity,
        }
    }

    /// The most bytes that a pool of buffers of `capacity` bytes keeps.
    pub(crate) fn max_bytes(capacity: usize) -> usize {
        (Self::max_spare(capacity) + 1) * 2 * capacity
    }

    /// How many pairs are kept spare.
    fn max_spare(capacity: usize) -> usize {
        (Self::MAX_SPARE_BYTES / (2 * capacity).max(1)).clamp(1, 1024)
    }

    /// The pair at hand. It is empty, and is to be left empty, or [taken away](Self::take_scratch).
    pub(crate) fn scratch(&mut self) -> &mut Buffers {
        &mut self.hand
    }

    /// Whether the pair at hand is as the next connection needs it: a connection may have left bytes
    /// in it, and a handler a buffer of its own.
    pub(crate) fn is_scratch_clean(&self) -> bool {
        self.hand.is_empty() && self.is_own(&self.hand)
    }

    /// Gives the pair at hand away, with what is in it, and puts another in its place.
    pub(crate) fn take_scratch(&mut self) -> Box<Buffers> {
        let next = self.spare.pop().unwrap_or_else(|| pair(self.capacity));
        mem::replace(&mut self.hand, next)
    }

    /// Takes an empty pair back.
    pub(crate) fn recycle(&mut self, buffers: Box<Buffers>) {
        if self.spare.len() < self.max_spare && self.is_own(&buffers) {
            self.spare.push(buffers);
        }
    }

    fn is_own(&self, buffers: &Buffers) -> bool {
        buffers.input.capacity() == self.capacity && buffers.output.capacity() == self.capacity
    }
}

fn pair(capacity: usize) -> Box<Buffers> {
    let buffer = || Buffer::with_capacity(capacity);
    Box::new(Buffers {
        input: buffer(),
        output: buffer(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(capacity: usize, bytes: &[u8]) -> Buffer {
        let mut buffer = Buffer::with_capacity(capacity);
        assert!(buffer.push(bytes));
        buffer
    }

    #[test]
    fn keeps_order_and_wraps_no_data() {
        let mut buffer = filled(6, b"abcd");
        buffer.consume(3);
        assert!(buffer.push(b"efghi"), "room at the front counts");
        assert_eq!(buffer.data(), b"defghi");
        assert_eq!(buffer.room(), 0);
        assert!(!buffer.push(b"j"));
        assert!(buffer.push(b""));
    }

    #[test]
    fn push_is_all_or_nothing() {
        let mut buffer = filled(4, b"ab");
        assert!(!buffer.push(b"cde"));
        assert_eq!(buffer.data(), b"ab");
        assert!(buffer.push(b"cd"));
        assert_eq!(buffer.data(), b"abcd");
    }

    #[test]
    fn append_swaps_into_an_empty_buffer() {
        let (mut from, mut to) = (filled(4, b"abc"), Buffer::with_capacity(4));
        let storage = from.data().as_ptr();
        assert_eq!(to.append(&mut from), 3);
        assert_eq!(to.data().as_ptr(), storage, "swapped, not copied");
        assert_eq!(
            (to.data(), from.is_empty(), from.capacity()),
            (&b"abc"[..], true, 4)
        );
    }

    #[test]
    fn append_copies_what_fits() {
        let (mut from, mut to) = (filled(4, b"cdef"), filled(4, b"ab"));
        assert_eq!(to.append(&mut from), 2);
        assert_eq!((to.data(), from.data()), (&b"abcd"[..], &b"ef"[..]));
        assert_eq!(to.append(&mut from), 0);
        assert_eq!(from.data(), b"ef");
    }

    #[test]
    fn append_respects_a_smaller_capacity() {
        let (mut from, mut to) = (filled(8, b"abcdefgh"), Buffer::with_capacity(2));
        assert_eq!(to.append(&mut from), 2);
        assert_eq!(
            (to.data(), from.data(), to.capacity()),
            (&b"ab"[..], &b"cdefgh"[..], 2)
        );
    }

    #[test]
    fn fill_offers_all_the_room() {
        let mut buffer = filled(4, b"abcd");
        buffer.consume(3);
        assert_eq!(buffer.fill_from(&mut &b"efghij"[..]).unwrap(), 3);
        assert_eq!(buffer.data(), b"defg");
        assert_eq!(buffer.fill_from(&mut &b"hij"[..]).unwrap(), 0, "no room");
    }

    #[test]
    fn flush_keeps_what_was_not_written() {
        let mut buffer = filled(4, b"abcd");
        let mut narrow = [0; 3];
        assert_eq!(buffer.flush_into(&mut &mut narrow[..]).unwrap(), 3);
        assert_eq!((&narrow, buffer.data()), (b"abc", &b"d"[..]));
    }

    #[test]
    fn data_is_changed_in_place_and_shown_as_its_size() {
        let mut buffer = filled(4, b"abc");
        buffer.consume(1);
        buffer.data_mut().make_ascii_uppercase();
        assert_eq!(buffer.data(), b"BC");
        assert_eq!(format!("{buffer:?}"), "Buffer(2 of 4 bytes)");
    }

    #[test]
    fn write_takes_what_fits() {
        let mut buffer = Buffer::with_capacity(5);
        assert!(write!(buffer, "{}", 123).is_ok());
        assert!(write!(buffer, "{}", 4567).is_err(), "cut short");
        assert_eq!(buffer.data(), b"12345");
    }

    #[test]
    #[should_panic(expected = "cannot consume 3 bytes of 2")]
    fn consume_checks_its_bound() {
        filled(4, b"ab").consume(3);
    }

    #[test]
    #[should_panic(expected = "above the limit")]
    fn capacity_is_bounded() {
        drop(Buffer::with_capacity(Buffer::MAX_CAPACITY + 1));
    }

    #[test]
    fn what_did_not_fit_is_remembered_until_told() {
        let mut buffer = filled(4, b"abc");
        assert!(!buffer.overflowed());
        assert!(!buffer.push(b"de"));
        assert!(buffer.overflowed());
        buffer.clear_overflow();
        assert!(!buffer.overflowed());
        assert_eq!(buffer.append(&mut filled(4, b"de")), 1);
        assert!(buffer.overflowed());
        buffer.clear_overflow();
        assert_eq!(buffer.write(b"f").unwrap(), 0);
        assert!(buffer.overflowed());
        buffer.clear_overflow();
        buffer.clear();
        assert_eq!(buffer.write(b"fghi").unwrap(), 4);
        assert!(!buffer.overflowed(), "it fitted, if only just");
    }

    #[test]
    fn the_hand_is_given_away_with_its_bytes_and_comes_back() {
        let mut pool = Pool::new(16);
        assert!(pool.is_scratch_clean());
        assert!(pool.scratch().output.push(b"stuck"));
        assert!(!pool.is_scratch_clean());
        let mut taken = pool.take_scratch();
        assert!(pool.is_scratch_clean());
        assert_eq!((taken.output.data(), taken.len()), (&b"stuck"[..], 5));
        taken.output.clear();
        let latest: *const Buffers = &raw const *taken;
        pool.recycle(taken);
        pool.take_scratch();
        assert_eq!(&raw const *pool.scratch(), latest);
    }

    #[test]
    fn the_pool_keeps_a_bounded_number_of_its_own_size() {
        let capacity = Pool::MAX_SPARE_BYTES / 8;
        assert_eq!(
            Pool::max_bytes(capacity),
            5 * 2 * capacity,
            "four, and the one at hand"
        );
        let mut pool = Pool::new(capacity);
        for _ in 0..6 {
            pool.recycle(pair(capacity));
            let mut foreign = pair(capacity);
            foreign.output = Buffer::with_capacity(capacity - 1);
            pool.recycle(foreign);
        }
        assert_eq!(pool.spare.len(), 4);
        assert!(
            pool.spare
                .iter()
                .all(|pair| pair.output.capacity() == capacity)
        );
        pool.scratch().input = Buffer::with_capacity(0);
        assert!(!pool.is_scratch_clean());
    }
}
