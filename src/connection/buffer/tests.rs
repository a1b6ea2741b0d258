use super::*;

fn filled(capacity: usize, bytes: &[u8]) -> Buffer {
    let mut buffer = Buffer::new(capacity).unwrap();
    assert!(buffer.push(bytes));
    buffer
}

#[test]
fn keeps_order_and_stays_contiguous() {
    let mut buffer = filled(6, b"abcd");
    buffer.consume(3);
    assert!(buffer.push(b"efghi"), "free space at the front is used");
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
    let (mut from, mut to) = (filled(4, b"abc"), Buffer::new(4).unwrap());
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
fn append_copies_between_different_capacities() {
    let (mut from, mut small) = (filled(4, b"abcd"), Buffer::new(3).unwrap());
    assert_eq!(small.append(&mut from), 3);
    assert_eq!((small.data(), from.data()), (&b"abc"[..], &b"d"[..]));
    assert_eq!((small.capacity(), from.capacity()), (3, 4));
    let mut large = Buffer::new(8).unwrap();
    assert_eq!(large.append(&mut small), 3);
    assert_eq!((large.data(), large.capacity()), (&b"abc"[..], 8));
}

#[test]
fn push_some_appends_what_fits() {
    let mut buffer = filled(4, b"ab");
    buffer.consume(1);
    assert_eq!(buffer.push_some(b"cdef"), 3);
    assert_eq!(buffer.data(), b"bcde");
    assert_eq!(buffer.push_some(b"f"), 0);
}

#[test]
fn spare_is_filled_in_place() {
    let mut buffer = filled(6, b"abcd");
    buffer.consume(2);
    let spare = buffer.spare();
    assert_eq!(spare.len(), 4, "all free space is at the end");
    spare[..3].copy_from_slice(b"efg");
    buffer.commit(3);
    buffer.commit(0);
    assert_eq!(buffer.data(), b"cdefg");
    assert_eq!(buffer.spare().len(), 1);
}

#[test]
#[should_panic(expected = "cannot commit 3 bytes of 2")]
fn commit_checks_its_bound() {
    filled(4, b"ab").commit(3);
}

/// Whatever happens to the bytes that were searched.
#[test]
fn search_for_a_line_does_not_start_over() {
    let mut buffer = filled(8, b"abc");
    assert_eq!(buffer.line_length(), None);
    // This breaks the promise of the search, and shows what it looks at.
    buffer.storage[0] = b'\n';
    assert_eq!(buffer.line_length(), None);
    assert!(buffer.push(b"d\nef"));
    assert_eq!(buffer.line_length(), Some(5));
    assert_eq!(buffer.line_length(), Some(5));
    buffer.consume(5);
    assert_eq!(buffer.line_length(), None);
    assert!(buffer.push(b"g\n"));
    assert_eq!(buffer.line_length(), Some(4));
}

#[test]
fn search_for_a_line_sees_every_change() {
    let searched = |bytes| {
        let buffer = filled(8, bytes);
        assert_eq!(buffer.line_length(), None);
        buffer
    };
    let mut changed = searched(b"abc");
    changed.data_mut()[1] = b'\n';
    assert_eq!(changed.line_length(), Some(2));

    let mut refilled = searched(b"abc");
    refilled.consume(1);
    refilled.consume(2);
    assert!(refilled.push(b"x\nyz"));
    assert_eq!(refilled.line_length(), Some(2));

    let mut shortened = searched(b"abc");
    shortened.truncate(1);
    assert!(shortened.push(b"\nbc"));
    assert_eq!(shortened.line_length(), Some(2));

    let (mut from, mut to) = (searched(b"abc"), searched(b"abc"));
    from.clear();
    assert!(from.push(b"\n"));
    to.truncate(0);
    assert_eq!(to.append(&mut from), 1);
    assert_eq!(to.line_length(), Some(1));
    assert!(from.push(b"\n"));
    assert_eq!(from.line_length(), Some(1));
}

#[test]
fn truncate_keeps_the_front() {
    let mut buffer = filled(4, b"abcd");
    buffer.consume(1);
    for count in [4, usize::MAX] {
        buffer.truncate(count);
        assert_eq!(buffer.data(), b"bcd");
    }
    buffer.truncate(2);
    assert_eq!(buffer.data(), b"bc");
    buffer.truncate(0);
    assert!(buffer.is_empty());
}

#[test]
fn fill_uses_all_free_space() {
    let mut buffer = filled(4, b"abcd");
    buffer.consume(3);
    assert_eq!(
        buffer.fill_from(&mut &b"efghij"[..], 9).unwrap(),
        (3, false)
    );
    assert_eq!(buffer.data(), b"defg");
    assert_eq!(
        buffer.fill_from(&mut &b"hij"[..], 9).unwrap(),
        (0, false),
        "no room"
    );
}

#[test]
fn flush_keeps_unwritten_bytes() {
    let mut buffer = filled(4, b"abcd");
    let mut narrow = [0; 3];
    assert_eq!(buffer.flush_into(&mut &mut narrow[..], 9).unwrap(), 3);
    assert_eq!((&narrow, buffer.data()), (b"abc", &b"d"[..]));
}

#[test]
fn data_mut_changes_bytes_in_place() {
    let mut buffer = filled(4, b"abc");
    buffer.consume(1);
    buffer.data_mut().make_ascii_uppercase();
    assert_eq!(buffer.data(), b"BC");
}

#[test]
fn debug_shows_length_and_capacity() {
    assert_eq!(format!("{:?}", filled(4, b"ab")), "Buffer(2 of 4 bytes)");
}

#[test]
#[should_panic(expected = "cannot consume 3 bytes of 2")]
fn consume_checks_its_bound() {
    filled(4, b"ab").consume(3);
}

#[test]
fn pair_that_was_used_last_is_used_next() {
    let mut pool = Pool::new(16).unwrap();
    let first = pool.take();
    pool.refill().unwrap();
    let address: *const Buffers = &raw const *first;
    pool.give_back(first);
    assert_eq!(&raw const *pool.take(), address);
    pool.refill().unwrap();
    assert_ne!(&raw const *pool.take(), address, "there is another");
}

#[test]
fn pool_is_refilled_only_if_it_is_empty() {
    let mut pool = Pool::new(16).unwrap();
    OUT_OF_MEMORY.set(true);
    pool.refill().unwrap();
    let _kept = pool.take();
    assert_eq!(pool.refill(), Err(CloseReason::OutOfMemory));
    OUT_OF_MEMORY.set(false);
    pool.refill().unwrap();
    pool.take();
}

#[test]
fn pool_keeps_a_bounded_number() {
    let capacity = 256 << 10;
    assert_eq!(Pool::max_bytes(capacity), 5 * 2 * (256 << 10));
    let mut pool = Pool::new(capacity).unwrap();
    let mut take = || {
        let taken = pool.take();
        pool.refill().unwrap();
        taken
    };
    let taken: Vec<_> = (0..6).map(|_| take()).collect();
    assert_eq!((pool.held(), pool.pairs), (6, 7));
    for pair in taken {
        pool.give_back(pair);
    }
    assert_eq!((pool.spare.len(), pool.held(), pool.pairs), (4, 0, 5));
}

#[test]
fn pool_has_no_more_pairs_than_its_limit() {
    let mut pool = Pool::new(16).unwrap();
    pool.max_pairs = 2;
    let first = pool.take();
    pool.refill().unwrap();
    let second = pool.take();
    assert_eq!(pool.refill(), Err(CloseReason::BufferMemory));
    assert_eq!(pool.held(), 2);
    pool.give_back(first);
    pool.refill().unwrap();
    pool.give_back(second);
    assert_eq!((pool.held(), pool.pairs), (0, 2));
    let _spare = pool.take();
    pool.refill().unwrap();
}

/// Also on a processor of 32 bits.
#[test]
fn memory_of_the_largest_buffers_is_known() {
    assert_eq!(Buffers::max_bytes(1 << 30), 2 << 30);
    assert_eq!(Buffers::max_bytes(1), 2 * page_size());
}
