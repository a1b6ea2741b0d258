//! The example, over sockets and in the library's simulation.

mod ends;
mod exchanges;
mod harness;
mod memory;
mod simulation;
