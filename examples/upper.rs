//! A small line protocol: answers each line in upper case, and closes the connection on `quit`.
//!
//! Start it with `cargo run --example upper`, then connect with `telnet localhost 5555`. Ctrl-C ends it.
use echoserver::{Action, Config, Context, Event, Handler, Server};

/// The handler of one connection. It needs no state.
struct Upper;

impl Handler for Upper {
    fn process(&mut self, _event: Event, context: &mut Context<'_>) -> Action {
        // An incomplete line stays in `input`, and so does one whose answer does not fit.
        while let Some(line) = context.input.line() {
            if line.trim_ascii() == b"quit" {
                return Action::Close;
            }
            let length = line.len();
            context.input.data_mut()[..length].make_ascii_uppercase();
            if !context.output.push(&context.input.data()[..length]) {
                return Action::Flush;
            }
            context.input.consume(length);
        }
        Action::Continue
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or("127.0.0.1:5555".to_owned());
    let server = Server::bind(Config::new(address.parse()?))?;
    let handle = server.handle();
    ctrlc::set_handler(move || handle.shut_down())?;
    println!("listening on {}", server.addresses()[0]);
    server.run(|_connection| Upper)?;
    Ok(())
}
