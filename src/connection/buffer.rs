//! A byte queue of fixed capacity, and a pool of such buffers.
//!
//! A buffer is contiguous: bytes are appended at the end and consumed from the front, and its data is
//! always one slice. It never grows, so the memory of a server is bounded.
//!
//! A connection owns buffers only while they hold bytes. Otherwise it borrows a pair of its worker's [`Pool`] while it
//! runs. The pool reuses buffers last in, first out, because the last ones are likely to be in the CPU's cache.
//!
//! The storage is an anonymous memory map. Unlike a heap block, it is returned to the system when it is
//! dropped, its pages use memory only once they are written, and a failed allocation is an error instead
//! of the end of the process.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read, Write};
use std::mem;

use memmap2::MmapMut;

use crate::stats::CloseReason;
use crate::system::page_size;

/// A queue of bytes with a fixed capacity: they are appended at the end and consumed from the front, and are always contiguous.
///
/// For a handler that contains another one: see [`Context::with`](crate::Context::with). Its storage is whole pages, which
/// use memory once they are written, and stay until the buffer is dropped: a handler of many idle connections drops its empty
/// buffers. [`Config::max_memory`](crate::Config::max_memory) does not include them.
pub struct Buffer {
    storage: MmapMut,
    // The data is `storage[start..end]`. Both are 0 while it is empty, so `is_empty` reads `end` only.
    start: usize,
    end: usize,
    /// How many bytes at the front are known to hold no line feed; 0 while it is empty.
    searched: Cell<usize>,
}

impl Buffer {
    /// Creates an empty buffer that holds at most `capacity` bytes.
    ///
    /// # Errors
    ///
    /// Fails if the memory is not available.
    pub fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self {
            storage: MmapMut::map_anon(capacity)?,
            start: 0,
            end: 0,
            searched: Cell::new(0),
        })
    }

    /// Returns the bytes in the buffer, oldest first.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.storage[self.start..self.end]
    }

    /// Returns the bytes in the buffer, to be changed in place.
    #[must_use]
    pub fn data_mut(&mut self) -> &mut [u8] {
        self.searched.set(0);
        &mut self.storage[self.start..self.end]
    }

    /// Returns the number of bytes in the buffer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Returns whether the buffer holds no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// Returns the largest number of bytes the buffer can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.storage.len()
    }

    /// Returns how many more bytes fit.
    #[must_use]
    pub fn room(&self) -> usize {
        self.capacity() - self.len()
    }

    /// Removes the first `count` bytes.
    ///
    /// # Panics
    ///
    /// Panics if the buffer holds fewer bytes.
    pub fn consume(&mut self, count: usize) {
        let len = self.len();
        assert!(count <= len, "cannot consume {count} bytes of {len}");
        if count == len {
            self.clear();
        } else {
            self.start += count;
            self.searched.set(self.searched.get().saturating_sub(count));
        }
    }

    /// Removes all bytes.
    pub fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
        self.searched.set(0);
    }

    /// Returns the length of the first line with its line feed, if there is one. What an earlier call has searched is not
    /// searched again.
    pub(crate) fn line_length(&self) -> Option<usize> {
        let searched = self.searched.get();
        let unsearched = &self.data()[searched..];
        let found = unsearched.iter().position(|&byte| byte == b'\n');
        let without = found.unwrap_or(unsearched.len());
        self.searched.set(searched + without);
        found.map(|at| searched + at + 1)
    }

    /// Appends all of `bytes` if they fit, otherwise nothing. Returns whether they fit.
    #[must_use = "if this is false, nothing was appended"]
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        let fits = bytes.len() <= self.room();
        if fits {
            self.extend(bytes);
        }
        fits
    }

    /// Appends as many of `bytes` as fit; returns their number.
    pub fn push_some(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.room());
        self.extend(&bytes[..count]);
        count
    }

    /// Removes bytes from the end, so that at most the first `count` are left.
    pub fn truncate(&mut self, count: usize) {
        match count {
            0 => self.clear(),
            _ => self.end = self.end.min(self.start.saturating_add(count)),
        }
        self.searched.set(self.searched.get().min(count));
    }

    /// Returns the free space, to be filled in place: [`commit`](Self::commit) appends what was written. It is not cleared.
    #[must_use]
    pub fn spare(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.compact();
        }
        &mut self.storage[self.end..]
    }

    /// Appends the first `count` bytes of [`spare`](Self::spare).
    ///
    /// # Panics
    ///
    /// Panics if `spare` is shorter.
    pub fn commit(&mut self, count: usize) {
        let room = self.capacity() - self.end;
        assert!(count <= room, "cannot commit {count} bytes of {room}");
        self.end += count;
    }

    /// Moves as many bytes as fit from the front of `other` to the end of this buffer, and returns
    /// their number.
    ///
    /// If this buffer is empty and both have the same capacity, they swap their storage and no byte is copied.
    pub fn append(&mut self, other: &mut Buffer) -> usize {
        if self.is_empty() && self.capacity() == other.capacity() {
            mem::swap(&mut self.storage, &mut other.storage);
            (self.start, self.end) = (other.start, other.end);
            other.clear();
            return self.len();
        }
        self.append_copy(other)
    }

    #[inline(never)] // inlined, it adds 15 instructions to each message
    fn append_copy(&mut self, other: &mut Buffer) -> usize {
        let count = self.push_some(other.data());
        other.consume(count);
        count
    }

    /// Makes one read of at most `max` bytes. Returns the number of bytes, where 0 means EOF or no room, and
    /// whether the read has returned fewer than it could have.
    pub(crate) fn fill_from(
        &mut self,
        reader: &mut impl Read,
        max: usize,
    ) -> io::Result<(usize, bool)> {
        let free = self.spare();
        let len = free.len().min(max);
        let count = reader.read(&mut free[..len])?;
        self.end += count;
        Ok((count, count < len))
    }

    /// Makes one write of at most `max` bytes, and removes those that were written.
    pub(crate) fn flush_into(&mut self, writer: &mut impl Write, max: usize) -> io::Result<usize> {
        let data = self.data();
        let count = writer.write(&data[..max.min(data.len())])?;
        self.consume(count);
        Ok(count)
    }

    /// Appends `bytes`, which must fit.
    fn extend(&mut self, bytes: &[u8]) {
        if bytes.len() > self.capacity() - self.end {
            self.compact();
        }
        let end = self.end;
        self.storage[end..end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    /// Moves the data to the start of the storage, so that all free space is at its end.
    #[inline(never)] // inlined, it adds 7 instructions to each message
    fn compact(&mut self) {
        self.storage.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} of {} bytes)", self.len(), self.capacity())
    }
}

#[cfg(any(test, feature = "testing"))]
thread_local! {
    /// The simulated system has no memory for the buffers of another connection.
    pub(crate) static OUT_OF_MEMORY: Cell<bool> = const { Cell::new(false) };
}

/// The input and output buffers of one connection.
#[derive(Debug)]
pub(crate) struct Buffers {
    pub(crate) input: Buffer,
    pub(crate) output: Buffer,
}

impl Buffers {
    /// Creates two empty buffers of `capacity` bytes each.
    fn new(capacity: usize) -> io::Result<Box<Self>> {
        #[cfg(any(test, feature = "testing"))]
        if OUT_OF_MEMORY.get() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Box::new(Self {
            input: Buffer::new(capacity)?,
            output: Buffer::new(capacity)?,
        }))
    }

    /// Returns the memory that two full buffers of `capacity` bytes use: whole pages.
    pub(crate) fn max_bytes(capacity: usize) -> u64 {
        2 * (capacity as u64).next_multiple_of(page_size())
    }

    /// Returns the number of bytes in both buffers.
    pub(crate) fn len(&self) -> usize {
        self.input.len() + self.output.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.input.is_empty() && self.output.is_empty()
    }
}

/// The empty buffers of a worker.
#[derive(Debug)]
pub(crate) struct Pool {
    /// The pair that was used last, which the next connection gets. Absent only while a connection is driven.
    next: Option<Box<Buffers>>,
    spare: Vec<Box<Buffers>>,
    max_spare: usize,
    capacity: usize,
    /// What [`Buffers::max_bytes`] says, which each tick needs.
    pair_bytes: u64,
    /// The pairs of the pool, and those that connections hold.
    pairs: usize,
    /// Limit for all of them, at least 2. Unlimited unless it is set.
    pub(crate) max_pairs: usize,
}

impl Pool {
    /// Limit for the spare buffers; others are returned to the system.
    const MAX_SPARE_BYTES: u64 = 2 << 20;

    /// Creates a pool of buffers of `capacity` bytes each.
    ///
    /// # Errors
    ///
    /// If the memory for the first pair is not available.
    pub(crate) fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self {
            next: Some(Buffers::new(capacity)?),
            spare: Vec::new(),
            max_spare: Self::max_spare(capacity),
            capacity,
            pair_bytes: Buffers::max_bytes(capacity),
            pairs: 1,
            max_pairs: usize::MAX,
        })
    }

    /// Returns the largest number of bytes that a pool of buffers of `capacity` bytes holds.
    pub(crate) fn max_bytes(capacity: usize) -> u64 {
        (Self::max_spare(capacity) as u64 + 1) * Buffers::max_bytes(capacity)
    }

    /// Returns how many pairs of spare buffers are kept at most.
    fn max_spare(capacity: usize) -> usize {
        (Self::MAX_SPARE_BYTES / Buffers::max_bytes(capacity).max(1)).clamp(1, 256) as usize
    }

    /// Returns how many pairs connections hold.
    pub(crate) fn held(&self) -> usize {
        self.pairs - self.spare.len() - usize::from(self.next.is_some())
    }

    /// Returns how many bytes these are.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.held() as u64 * self.pair_bytes
    }

    /// Whether a pair was taken, and neither given back nor replaced.
    pub(crate) fn is_empty(&self) -> bool {
        self.next.is_none()
    }

    /// Takes a pair for the connection that is driven next. It must be [given back](Self::give_back), or the pool
    /// [refilled](Self::refill).
    ///
    /// # Panics
    ///
    /// If neither was done.
    pub(crate) fn take(&mut self) -> Box<Buffers> {
        self.next.take().expect("a pool is never left empty")
    }

    /// Ensures that there is a pair for the next connection.
    ///
    /// # Errors
    ///
    /// If there is none, and the limit is reached or no memory is available: the reason to close a connection.
    pub(crate) fn refill(&mut self) -> Result<(), CloseReason> {
        if self.next.is_some() {
            return Ok(());
        }
        self.next = self.spare.pop();
        if self.next.is_none() {
            if self.pairs >= self.max_pairs {
                return Err(CloseReason::BufferMemory);
            }
            let buffers = Buffers::new(self.capacity).map_err(|_| CloseReason::OutOfMemory)?;
            self.next = Some(buffers);
            self.pairs += 1;
        }
        Ok(())
    }

    /// Takes back a pair, which must be empty.
    #[inline(always)]
    pub(crate) fn give_back(&mut self, buffers: Box<Buffers>) {
        if let Some(before) = self.next.replace(buffers) {
            if self.spare.len() < self.max_spare {
                self.spare.push(before);
            } else {
                self.pairs -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests;
