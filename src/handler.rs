//! The protocol interface: one [`Handler`] per connection, which works on bytes only.

use crate::connection::buffer::Buffer;

/// A protocol implementation. One value per connection, created on accept and dropped on close.
///
/// A handler consumes bytes from the front of `input` and appends its answer to `output`. It has no
/// access to the socket: reading, writing, scheduling and closing are done for it.
///
/// A handler must not block, because its worker serves many other connections on the same thread. It
/// is called only when its connection makes progress: it has no timers and cannot send on its own.
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

/// What the server does with the connection after [`Handler::process`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Keep the connection open.
    Continue,
    /// Send the contents of `output`, then close the connection. Input that was not consumed is
    /// discarded.
    Close,
}

/// The echo protocol: sends every byte back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Echo;

impl Handler for Echo {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        output.append(input);
        Action::Continue
    }
}
