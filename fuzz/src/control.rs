//! Fuzzes the bytes that a client writes to the control socket, in pieces of any size.

use serde_json::Value;
use virtioblkd::internal::control::protocol::json_stream::{Decoder, MAX_BYTES, MalformedInput};
use virtioblkd::internal::control::{Access, protocol};

/// Runs one input. The first byte is the size of the pieces.
pub fn run(data: &[u8]) {
    let [piece, text @ ..] = data else { return };
    let whole = outcomes(text, text.len().max(1));
    assert_eq!(outcomes(text, usize::from(*piece).max(1)), whole, "however it is cut");
    for value in whole.into_iter().flatten() {
        for (negotiated, access) in [(false, Access::ReadOnly), (true, Access::Operate), (true, Access::All)] {
            let request = protocol::parse(value.clone(), negotiated, access);
            let reply = protocol::reply(request.id.as_ref(), request.command.map(|_| Value::Null));
            assert!(reply.ends_with(b"\r\n") && !reply[..reply.len() - 2].contains(&b'\n'), "one line");
            // An error quotes only a part of what it refuses, and the reply repeats the `id`. So a short request has a short
            // reply.
            assert!(reply.len() < 6 * MAX_BYTES + 1024, "{}", reply.len());
            serde_json::from_slice::<Value>(&reply).expect("JSON");
        }
    }
}

fn outcomes(text: &[u8], piece: usize) -> Vec<Result<Value, MalformedInput>> {
    let mut decoder = Decoder::default();
    let mut found = Vec::new();
    for mut rest in text.chunks(piece) {
        while !rest.is_empty() {
            let (taken, outcome) = decoder.feed(rest);
            assert!(taken > 0 && taken <= rest.len());
            rest = &rest[taken..];
            found.extend(outcome);
        }
    }
    found
}
