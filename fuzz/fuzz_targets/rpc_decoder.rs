//! The control socket's byte machine: a stream decodes to the same messages however it arrives in pieces. The first
//! byte chooses the pieces. The rest is then read as a configuration file too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rpc::Config;
use rpc::wire::{Decoder, Message};

fuzz_target!(|input: &[u8]| {
    let Some((&step, bytes)) = input.split_first() else { return };
    let whole = decode(bytes, bytes.len().max(1));
    let pieces = decode(bytes, usize::from(step % 16) + 1);
    assert_eq!(whole, pieces);
    let _ = Config::parse(bytes, "fuzz.json").map_err(|error| error.to_string());
});

/// All messages up to the first error, and whether there was one.
fn decode(bytes: &[u8], step: usize) -> (Vec<Message>, bool) {
    let mut decoder = Decoder::new();
    let mut messages = Vec::new();
    for piece in bytes.chunks(step) {
        // Far below the decoder's limit, so a piece is always taken whole.
        assert_eq!(decoder.push(piece), piece.len());
        while let Some(message) = decoder.next_message() {
            match message {
                Ok(message) => messages.push(message),
                Err(_) => {
                    assert!(decoder.next_message().is_none() && decoder.room() == 0);
                    return (messages, true);
                }
            }
        }
        assert!(decoder.room() > 0);
    }
    (messages, false)
}
