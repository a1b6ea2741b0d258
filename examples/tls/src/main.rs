//! An echo server with TLS. With a certificate for this machine:
//!
//! ```sh
//! openssl req -x509 -newkey ed25519 -nodes -days 30 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
//!   -keyout key.pem -out certificate.pem
//! cargo run --manifest-path examples/tls/Cargo.toml 127.0.0.1:5559 certificate.pem key.pem
//! openssl s_client -quiet -CAfile certificate.pem -verify_return_error localhost:5559
//! ```

use std::env;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use echoserver::{Config, Echo, Server};
use echoserver_tls::Tls;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [address, certificates, key] = &arguments[..] else {
        return Err(
            "the arguments are an address, a file of certificates and one of their key".into(),
        );
    };
    let certificates = CertificateDer::pem_file_iter(certificates)?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    let tls = ServerConfig::builder().with_no_client_auth();
    let tls = Arc::new(tls.with_single_cert(certificates, key)?);
    let server = Server::bind(Config {
        // A handshake has no other time limit.
        idle_timeout: Some(Duration::from_secs(300)),
        ..Config::new(address.parse()?)
    })?;
    let handle = server.handle();
    ctrlc::set_handler(move || handle.shut_down())?;
    println!("listening on {}", server.addresses()[0]);
    server
        .run(|_connection| Tls::new(Echo, Arc::clone(&tls)).expect("the configuration is valid"))?;
    Ok(())
}
