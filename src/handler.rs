//! The protocol's place in the server: one [`Handler`] per connection, told of bytes and of nothing else.

use crate::connection::buffer::Buffer;

/// What becomes of bytes: one per connection, made when it opens and dropped when it closes.
///
/// A handler sees bytes, never sockets: it takes what it can use from the front of `input` and puts
/// its answer at the end of `output`. The connection reads, writes, yields and closes around it.
///
/// What a handler cannot do: speak unasked (it is only called when its connection has moved), and
/// block (its worker serves many other connections meanwhile, and they would all wait).
pub trait Handler {
    /// Called when there may be new input, or new room in `output`; also once, with an empty
    /// `input`, when the connection opens (the place of a greeting).
    ///
    /// * An unfinished message is left in `input`; the next call sees it again with more behind it.
    /// * An answer that does not fit is left for the next call. `process` is called again, with an
    ///   empty `output`, once everything in it has been sent, if it has left input behind, found too
    ///   little room (a push was refused, an append or a write cut short), or put more than it took.
    /// * Both buffers hold at most the server's `buffer_size` bytes. A message that fills `input`
    ///   and still isn't taken, or an answer that an empty `output` refuses, closes the connection
    ///   ([`CloseReason::BufferFull`](crate::CloseReason::BufferFull)).
    /// * What is left in `input` when the client has ended its stream is discarded.
    ///
    /// # Panics
    ///
    /// A panic ends this connection ([`CloseReason::Panic`](crate::CloseReason::Panic)) and no other. The
    /// handler is dropped without being called again.
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action;
}

/// What a [`Handler`] wants done with its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Keep it open.
    Continue,
    /// Send what is in `output`, then close. Input that was not taken is discarded.
    Close,
}

/// The echo protocol, whole: every byte goes back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Echo;

impl Handler for Echo {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        output.append(input);
        Action::Continue
    }
}
