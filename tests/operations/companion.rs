//! Another program that runs beside the test, and ends with it.

use std::process::{Child, Command, Stdio};

#[derive(Debug)]
pub(crate) struct Companion(Child);

impl Companion {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().expect("it starts"))
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}
