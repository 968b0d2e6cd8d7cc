//! The edge daemon's binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|verb| verb == "shim") {
        return skerry_edge::runtime::process::shim::main(args);
    }
    ExitCode::SUCCESS
}
