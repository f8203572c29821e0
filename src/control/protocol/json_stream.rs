//! PURE. Cuts a stream of bytes into JSON objects.
//!
//! A client may send no newline, many, two requests in one write or one request in a hundred writes (`qemu.qmp` sends
//! no newline at all), so the end of a request is where its brackets close. [`Decoder`] reads each byte once: the
//! work is linear however the bytes are cut, and the memory is bounded by [`MAX_BYTES`].
//!
//! After malformed input, reading resumes after the next newline or 0xFF (the reset byte of QEMU's clients). A request that
//! is only too long or too deep is skipped up to the end of its brackets, and an extra closing bracket is skipped alone, so
//! that the next request of a client without newlines is read.

use serde_json::Value;

/// The longest request, in bytes.
pub const MAX_BYTES: usize = 64 * 1024;

/// The deepest nesting. It is below `serde_json`'s own limit of 128, so that the client gets the message of this module.
pub const MAX_DEPTH: u32 = 64;

/// Why bytes are not a request. This is reported once for all bytes that are skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MalformedInput {
    /// A byte that is not allowed at this place in a JSON object.
    Stray(u8),
    /// The request is longer than [`MAX_BYTES`].
    TooLong,
    /// The request is nested deeper than [`MAX_DEPTH`].
    TooDeep,
    /// 0xFF in the middle of a request: the client abandoned the request.
    Reset,
    /// The brackets close, but the text is not JSON. This is the parser's message.
    Invalid(String),
}

impl std::fmt::Display for MalformedInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MalformedInput::Stray(byte) if byte.is_ascii_graphic() => {
                write!(f, "a request is a JSON object, and '{}' cannot stand here", *byte as char)
            }
            MalformedInput::Stray(byte) => {
                write!(f, "a request is a JSON object, and byte 0x{byte:02x} cannot stand here")
            }
            MalformedInput::TooLong => write!(f, "the request is longer than {MAX_BYTES} bytes"),
            MalformedInput::TooDeep => write!(f, "the request is nested deeper than {MAX_DEPTH} levels"),
            MalformedInput::Reset => write!(f, "the request was cut off by a reset byte (0xff)"),
            MalformedInput::Invalid(why) => write!(f, "the request is not valid JSON: {why}"),
        }
    }
}

/// The position of the next byte in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JsonContext {
    /// Between requests.
    Outside,
    /// In a request, outside of a string.
    Inside,
    /// In a string.
    Text,
    /// After a backslash in a string.
    Escape,
    /// In malformed input, up to the next newline.
    Lost,
}

/// Cuts a stream of bytes into JSON objects.
#[derive(Debug)]
pub struct Decoder {
    frame: Vec<u8>,
    depth: u32,
    place: JsonContext,
    /// The error was reported already: the rest of this request is skipped.
    skipping: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder { frame: Vec::new(), depth: 0, place: JsonContext::Outside, skipping: false }
    }
}

impl Decoder {
    /// Takes bytes from the front of `input` until a request ends or is malformed. Returns the number of bytes taken, and the
    /// request; `None` if all bytes were taken and the request is not complete.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Option<Result<Value, MalformedInput>>) {
        for (at, &byte) in input.iter().enumerate() {
            if let Some(found) = self.step(byte) {
                return (at + 1, Some(found));
            }
        }
        (input.len(), None)
    }

    fn step(&mut self, byte: u8) -> Option<Result<Value, MalformedInput>> {
        if byte == 0xff {
            let cut = self.place != JsonContext::Outside && self.place != JsonContext::Lost && !self.skipping;
            self.reset();
            return cut.then_some(Err(MalformedInput::Reset));
        }
        match self.place {
            JsonContext::Outside => match byte {
                b' ' | b'\t' | b'\r' | b'\n' => return None,
                b'{' => self.place = JsonContext::Inside,
                b'}' | b']' => return Some(Err(MalformedInput::Stray(byte))),
                _ => return self.lose(byte),
            },
            JsonContext::Lost => {
                if byte == b'\n' {
                    self.reset();
                }
                return None;
            }
            JsonContext::Inside => match byte {
                b'"' => self.place = JsonContext::Text,
                b'{' | b'}' | b'[' | b']' | b':' | b',' | b' ' | b'\t' | b'\r' | b'\n' => {}
                // Numbers, and the letters of true, false and null.
                b'0'..=b'9' | b'+' | b'-' | b'.' | b'E' | b'a'..=b'z' => {}
                _ => return self.lose(byte),
            },
            JsonContext::Text => match byte {
                b'"' => self.place = JsonContext::Inside,
                b'\\' => self.place = JsonContext::Escape,
                0..=0x1f => return self.lose(byte),
                _ => {}
            },
            JsonContext::Escape => match byte {
                0..=0x1f => return self.lose(byte),
                _ => self.place = JsonContext::Text,
            },
        }
        self.keep(byte)
    }

    /// Stores a byte of a request and returns whether the request ends with it.
    fn keep(&mut self, byte: u8) -> Option<Result<Value, MalformedInput>> {
        if !self.skipping {
            self.frame.push(byte);
        }
        if self.place == JsonContext::Inside {
            match byte {
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth -= 1,
                _ => {}
            }
            if self.depth == 0 {
                let frame = std::mem::take(&mut self.frame);
                let whole = !self.skipping;
                self.reset();
                return whole.then(|| {
                    serde_json::from_slice(&frame).map_err(|error| MalformedInput::Invalid(error.to_string()))
                });
            }
        }
        if self.skipping {
            return None;
        }
        if self.depth > MAX_DEPTH {
            return self.skip(MalformedInput::TooDeep);
        }
        if self.frame.len() >= MAX_BYTES {
            return self.skip(MalformedInput::TooLong);
        }
        None
    }

    /// Skips the request up to the end of its brackets.
    fn skip(&mut self, why: MalformedInput) -> Option<Result<Value, MalformedInput>> {
        self.skipping = true;
        self.frame = Vec::new();
        Some(Err(why))
    }

    /// Skips everything up to the next newline.
    fn lose(&mut self, byte: u8) -> Option<Result<Value, MalformedInput>> {
        let known = self.skipping;
        self.reset();
        if byte != b'\n' {
            self.place = JsonContext::Lost;
        }
        (!known).then_some(Err(MalformedInput::Stray(byte)))
    }

    fn reset(&mut self) {
        *self = Decoder::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Feeds `input` in pieces of `piece` bytes; one text per outcome.
    fn outcomes(input: &[u8], piece: usize) -> Vec<Result<Value, MalformedInput>> {
        let mut decoder = Decoder::default();
        let mut all = Vec::new();
        for mut part in input.chunks(piece) {
            while !part.is_empty() {
                let (taken, found) = decoder.feed(part);
                part = &part[taken..];
                all.extend(found);
                assert!(decoder.frame.len() <= MAX_BYTES);
            }
        }
        all
    }

    fn same_however_cut(input: &[u8]) -> Vec<Result<Value, MalformedInput>> {
        let whole = outcomes(input, input.len().max(1));
        for piece in [1, 2, 3, 7, 4096] {
            assert_eq!(outcomes(input, piece), whole, "pieces of {piece}");
        }
        whole
    }

    #[test]
    fn requests_need_no_newline_and_may_share_a_write() {
        let found = same_however_cut(br#"{"a":"}{\"]"}  {"b":[1,{"c":null}]}{"d":"#);
        assert_eq!(found, [Ok(json!({"a": "}{\"]"})), Ok(json!({"b": [1, {"c": null}]}))]);
    }

    #[test]
    fn malformed_input_is_reported_once_and_ends_with_the_line() {
        let found = same_however_cut(b"GET / HTTP/1.1 {\"a\":1}\n{\"a\":2}\r\n\r\n");
        assert_eq!(found, [Err(MalformedInput::Stray(b'G')), Ok(json!({"a": 2}))]);
        let found = same_however_cut(b"{ \"a\": X, {{{{ \n{\"a\":3}");
        assert_eq!(found, [Err(MalformedInput::Stray(b'X')), Ok(json!({"a": 3}))]);
        let found = same_however_cut(b"{\"open string\n{\"a\":4}");
        assert_eq!(found, [Err(MalformedInput::Stray(b'\n')), Ok(json!({"a": 4}))]);
        let found = same_however_cut(b"\x16\x03\x01{\n{\"a\":5}");
        assert_eq!(found, [Err(MalformedInput::Stray(0x16)), Ok(json!({"a": 5}))]);
    }

    #[test]
    fn brackets_that_close_wrongly_are_invalid_json() {
        let found = same_however_cut(b"{\"a\":[1}}{\"a\":5}");
        assert!(matches!(found[0], Err(MalformedInput::Invalid(_))), "{found:?}");
        assert_eq!(found[1], Ok(json!({"a": 5})));
        assert_eq!(found.len(), 2, "{found:?}");
        let found = same_however_cut(b"{\"a\":]}{\"a\":6}");
        assert!(matches!(found[0], Err(MalformedInput::Invalid(_))), "{found:?}");
        assert_eq!(found[1..], [Err(MalformedInput::Stray(b'}')), Ok(json!({"a": 6}))]);
    }

    #[test]
    fn a_reset_byte_starts_a_new_request() {
        let found = same_however_cut(b"\xff{\"a\": \"half\xff{\"a\":6}");
        assert_eq!(found, [Err(MalformedInput::Reset), Ok(json!({"a": 6}))]);
    }

    #[test]
    fn a_request_that_is_too_long_is_skipped_to_its_end() {
        let mut input = b"{\"a\":\"".to_vec();
        input.resize(1 << 20, b'x');
        input.extend_from_slice(b"\"}{\"a\":7}");
        assert_eq!(outcomes(&input, 4096), [Err(MalformedInput::TooLong), Ok(json!({"a": 7}))]);
        let mut fits = b"{\"a\":\"".to_vec();
        fits.resize(MAX_BYTES - 2, b'x');
        fits.extend_from_slice(b"\"}");
        assert!(outcomes(&fits, 4096)[0].is_ok(), "exactly the limit is allowed");
    }

    #[test]
    fn a_request_that_is_too_deep_is_skipped_to_its_end() {
        let mut input = b"{\"a\":".to_vec();
        input.extend(std::iter::repeat_n(b'[', 10_000));
        input.extend(std::iter::repeat_n(b']', 10_000));
        input.extend_from_slice(b"}{\"a\":8}");
        assert_eq!(same_however_cut(&input), [Err(MalformedInput::TooDeep), Ok(json!({"a": 8}))]);
    }

    #[test]
    fn the_decoder_reads_a_request_after_any_bytes() {
        // A cheap generator is enough: what matters is that nothing panics and that a reset always restores the decoder.
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let alphabet = b"{}[]\",:\\ \n\xff\x00a1tX\xc3";
        for _ in 0..2000 {
            let mut input = Vec::new();
            for _ in 0..60 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                input.push(alphabet[(seed % alphabet.len() as u64) as usize]);
            }
            input.extend_from_slice(b"\xff{\"mended\":1}");
            assert_eq!(same_however_cut(&input).last(), Some(&Ok(json!({"mended": 1}))));
        }
    }
}
