//! The protocol interface: one [`Handler`] per connection, which works on bytes only.

use crate::connection::buffer::Buffer;

/// A protocol implementation. One value per connection, created on accept and dropped on close.
///
/// A handler consumes bytes from the front of `input` and appends its answer to `output`. It has no
/// access to the socket: reading, writing, scheduling and closing are done for it.
///
/// A handler must not block, because its worker serves many other connections on the same thread. It has
/// no timers and cannot send without being called.
pub trait Handler {
    /// Called once when the connection opens, with an empty `input` (the place of a greeting), then when
    /// input has arrived, and after `output` was sent. `output` is always empty at the start of a call.
    ///
    /// * An unfinished message is left in `input`; the next call sees it again with more bytes appended.
    /// * An answer that does not fit is left for the next call. After all output was sent, `process` is
    ///   called again without new input if the last call consumed or appended something and left input, if
    ///   an append did not fit, or if it appended more bytes than it consumed. A call that neither
    ///   consumes nor appends anything is repeated only when input arrives.
    /// * Both buffers hold at most the server's `buffer_size` bytes. A message that fills `input`
    ///   and is not consumed, or an answer that does not fit into an empty `output`, closes the connection
    ///   ([`CloseReason::BufferFull`](crate::CloseReason::BufferFull)).
    /// * What is left in `input` at the client's EOF is discarded.
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
