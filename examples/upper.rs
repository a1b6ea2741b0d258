//! A small line protocol: answers each line in upper case, and closes the connection on `quit`.
//!
//! Start it with `cargo run --example upper`, then connect with `telnet localhost 5555`.
use echoserver::{Action, Buffer, Config, Handler, Server};

/// The handler of one connection. It needs no state.
struct Upper;

impl Handler for Upper {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        // An incomplete line stays in `input`; the next call sees it again with more bytes.
        while let Some(end) = input.data().iter().position(|&byte| byte == b'\n') {
            let line = &mut input.data_mut()[..=end];
            if line.trim_ascii() == b"quit" {
                return Action::Close;
            }
            line.make_ascii_uppercase();
            // Appends the whole line or nothing. A line that does not fit stays in `input`, and
            // `process` is called again after `output` has been sent.
            if !output.push(line) {
                break;
            }
            input.consume(end + 1);
        }
        Action::Continue
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or("[::]:5555".to_owned());
    let server = Server::bind(Config {
        listen: vec![address.parse()?],
        ..Config::default()
    })?;
    println!("listening on {}", server.addresses()[0]);
    server.run(|_peer| Upper)?;
    Ok(())
}
