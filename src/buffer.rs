//! A byte queue of fixed capacity, and the pool its storage comes from.
//!
//! A buffer is contiguous: data is appended at one end and taken from the other, and whoever looks
//! sees one slice. It never grows; the bound on a server's memory rests on that. A connection's
//! buffers own storage only while they hold bytes: a worker lends it from its [`Pool`] and takes
//! it back, last in first out, so the storage in use is the one that is still in the cache.

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
#[derive(Default)]
pub struct Buffer {
    storage: Box<[u8]>,
    // Data is storage[start..end]; both are 0 whenever it is empty. 32 bits keep a connection small.
    start: u32,
    end: u32,
}

impl Buffer {
    /// The largest capacity, in bytes: 1 GiB.
    pub const CAPACITY_MAX: usize = 1 << 30;

    /// An empty buffer that holds at most `capacity` bytes.
    ///
    /// # Panics
    ///
    /// If `capacity` is above [`Buffer::CAPACITY_MAX`].
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        assert!(
            capacity <= Self::CAPACITY_MAX,
            "a buffer of {capacity} bytes is above the limit of 1 GiB"
        );
        Self {
            storage: vec![0; capacity].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// The bytes it holds, oldest first.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.storage[self.start as usize..self.end as usize]
    }

    /// The bytes it holds, to be changed in place.
    #[must_use]
    pub fn data_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start as usize..self.end as usize]
    }

    /// How many bytes it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
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
            self.start += offset(count);
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
        fits
    }

    /// Moves bytes from the front of `other` to the end of this one, as many as fit; says how many.
    ///
    /// Nothing is copied where this one is empty: the two swap their storage.
    pub fn append(&mut self, other: &mut Buffer) -> usize {
        if self.is_empty() && self.capacity() == other.capacity() {
            mem::swap(self, other);
            return self.len();
        }
        let count = other.len().min(self.room());
        self.extend(&other.data()[..count]);
        other.consume(count);
        count
    }

    /// Reads once into all the room there is; 0 is the stream's end, or no room.
    pub(crate) fn fill_from(&mut self, reader: &mut impl Read) -> io::Result<usize> {
        self.compact();
        let count = reader.read(&mut self.storage[self.end as usize..])?;
        self.end += offset(count);
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
        if bytes.len() > self.capacity() - self.end as usize {
            self.compact();
        }
        let end = self.end as usize;
        self.storage[end..end + bytes.len()].copy_from_slice(bytes);
        self.end += offset(bytes.len());
    }

    /// Moves the data to the front, so that all the room is behind it.
    fn compact(&mut self) {
        if self.start > 0 {
            self.storage
                .copy_within(self.start as usize..self.end as usize, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }
}

/// A position within a storage, none of which is longer than [`Buffer::CAPACITY_MAX`].
fn offset(position: usize) -> u32 {
    debug_assert!(position <= Buffer::CAPACITY_MAX);
    position as u32
}

/// For `write!`: takes as much as fits, so an answer that must not be cut short is measured first,
/// or made elsewhere and [pushed](Buffer::push).
impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room());
        self.extend(&bytes[..count]);
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

/// A worker's spare storage.
#[derive(Debug)]
pub(crate) struct Pool {
    spare: Vec<Box<[u8]>>,
    spare_max: usize,
    size: usize,
}

impl Pool {
    /// The most bytes kept spare; above it storage goes back to the allocator.
    const SPARE_BYTES_MAX: usize = 8 << 20;

    /// A pool of storages of `size` bytes each, empty at first.
    pub(crate) fn new(size: usize) -> Self {
        Self {
            spare: Vec::new(),
            spare_max: (Self::SPARE_BYTES_MAX / size).clamp(2, 1024),
            size,
        }
    }

    /// The most bytes that a pool of storages of `size` bytes keeps.
    pub(crate) fn bytes_max(size: usize) -> usize {
        Self::new(size).spare_max * size
    }

    /// Gives `buffer` storage where it has none.
    pub(crate) fn lend(&mut self, buffer: &mut Buffer) {
        if buffer.storage.is_empty() {
            buffer.storage = self
                .spare
                .pop()
                .unwrap_or_else(|| vec![0; self.size].into_boxed_slice());
        }
    }

    /// Takes the storage of `buffer` back if it holds no byte.
    pub(crate) fn reclaim(&mut self, buffer: &mut Buffer) {
        if buffer.is_empty() {
            let storage = mem::take(&mut buffer.storage);
            // A handler may have put a buffer of its own in place of the one it was lent.
            if storage.len() == self.size && self.spare.len() < self.spare_max {
                self.spare.push(storage);
            }
        }
    }
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
        drop(Buffer::with_capacity(Buffer::CAPACITY_MAX + 1));
    }

    #[test]
    fn the_pool_reuses_the_latest_storage() {
        let mut pool = Pool::new(16);
        let (mut one, mut other) = (Buffer::default(), Buffer::default());
        pool.lend(&mut one);
        assert_eq!(one.capacity(), 16);
        let storage = one.storage.as_ptr();
        pool.reclaim(&mut one);
        assert_eq!(one.capacity(), 0);
        pool.lend(&mut other);
        assert_eq!(other.storage.as_ptr(), storage);
        assert!(other.push(b"x"));
        pool.reclaim(&mut other);
        assert_eq!(
            other.data(),
            b"x",
            "a buffer that holds bytes keeps its storage"
        );
    }

    #[test]
    fn the_pool_keeps_a_bounded_number_of_its_own_size() {
        let size = Pool::SPARE_BYTES_MAX / 4;
        assert_eq!(Pool::bytes_max(size), Pool::SPARE_BYTES_MAX);
        let mut pool = Pool::new(size);
        for _ in 0..6 {
            pool.reclaim(&mut Buffer::with_capacity(size));
            pool.reclaim(&mut Buffer::with_capacity(size - 1));
        }
        assert_eq!(pool.spare.len(), 4);
        assert!(pool.spare.iter().all(|storage| storage.len() == size));
    }
}
