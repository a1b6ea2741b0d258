//! The smallest line protocol: each line comes back in capitals, and `quit` ends the connection.
//!
//! `cargo run --example upper`, then `telnet localhost 5555`.
use echoserver::{Action, Buffer, Config, Handler, Server};

struct Upper;

impl Handler for Upper {
    fn process(&mut self, input: &mut Buffer, output: &mut Buffer) -> Action {
        // A line that has not ended yet stays in `input` until the rest of it has come.
        while let Some(end) = input.data().iter().position(|&byte| byte == b'\n') {
            let line = &mut input.data_mut()[..=end];
            if line.trim_ascii() == b"quit" {
                return Action::Close;
            }
            line.make_ascii_uppercase();
            // Whole or not at all; what finds no room now finds it in the next call.
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
