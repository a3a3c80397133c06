//! Finds where one JSON value ends in a stream of bytes, looking at every byte once.
//!
//! The scanner checks the structure (RFC 8259 grammar except the inside of numbers and UTF-8, which are left to the
//! real parser), so that broken input is noticed at the first wrong byte and not when the peer stops sending.
//! SPDK's comments (`//` to the end of the line, `/* */`) are accepted and overwritten with spaces.

/// Limits on one JSON value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Open arrays and objects, at most 64.
    pub depth: u32,
    /// Scalars, keys, and beginnings and ends of arrays and objects, counted as SPDK counts its `spdk_json_val`s.
    pub values: u32,
}

/// What the grammar allows next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
}

/// The token that the scanner is inside of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    None,
    /// `hex`: digits of `\uXXXX` still to come.
    String {
        key: bool,
        escape: bool,
        hex: u8,
    },
    Number,
    /// The rest of `true`, `false` or `null`.
    Literal(&'static [u8]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comment {
    None,
    Slash,
    Line,
    Block,
    BlockStar,
}

/// The state between two bytes.
#[derive(Debug)]
pub(crate) struct Scanner {
    limits: Limits,
    expect: Expect,
    token: Token,
    comment: Comment,
    /// One bit per open container, the innermost lowest; 1 is an object.
    objects: u64,
    depth: u32,
    values: u32,
}

/// How a byte ended the value, if it did.
enum Step {
    More,
    /// The value ends after this byte.
    Ends,
    /// The value (a number at top level) ended before this byte.
    Ended,
}

impl Scanner {
    pub(crate) fn new(limits: Limits) -> Self {
        assert!(limits.depth <= u64::BITS, "one bit per level");
        Self {
            limits,
            expect: Expect::Value,
            token: Token::None,
            comment: Comment::None,
            objects: 0,
            depth: 0,
            values: 0,
        }
    }

    /// Whether the scanner stands between two values: nothing that it has seen since the last one is needed.
    pub(crate) fn between_values(&self) -> bool {
        self.depth == 0 && self.token == Token::None
    }

    /// Looks at the bytes that follow those of the last call. `Some(n)`: a value ends after `n` bytes of `bytes`,
    /// and the scanner is ready for the next one. `None`: more bytes are needed. Comments become spaces.
    ///
    /// # Errors
    /// The offset in `bytes` of the first wrong byte, and what is wrong. The scanner is of no use any more.
    pub(crate) fn scan(&mut self, bytes: &mut [u8]) -> Result<Option<usize>, (usize, String)> {
        for (at, byte) in bytes.iter_mut().enumerate() {
            let was_comment = self.comment != Comment::None;
            let step = self.step(*byte).map_err(|what| (at, what))?;
            if (was_comment || self.comment != Comment::None) && *byte != b'\n' {
                *byte = b' ';
            }
            match step {
                Step::More => {}
                Step::Ends => return Ok(Some(self.finish(at + 1))),
                Step::Ended => return Ok(Some(self.finish(at))),
            }
        }
        Ok(None)
    }

    fn finish(&mut self, end: usize) -> usize {
        *self = Self::new(self.limits);
        end
    }

    fn step(&mut self, byte: u8) -> Result<Step, String> {
        if self.comment != Comment::None {
            self.comment = next_comment(self.comment, byte)?;
            return Ok(Step::More);
        }
        match self.token {
            Token::String { key, escape, hex } => self.in_string(byte, key, escape, hex),
            Token::Literal(rest) => self.in_literal(byte, rest),
            Token::Number if byte.is_ascii_alphanumeric() || b"+-.".contains(&byte) => Ok(Step::More),
            Token::Number => {
                self.token = Token::None;
                // The byte after a top-level number is looked at again, as the first one of the next value.
                if self.depth == 0 { Ok(Step::Ended) } else { self.structure(byte) }
            }
            Token::None => self.structure(byte),
        }
    }

    fn in_string(&mut self, byte: u8, key: bool, escape: bool, hex: u8) -> Result<Step, String> {
        let (escape, hex) = match byte {
            0..0x20 => return Err("control character in a string".into()),
            _ if hex > 0 && byte.is_ascii_hexdigit() => (false, hex - 1),
            _ if hex > 0 => return Err("expected four hexadecimal digits after \\u".into()),
            b'u' if escape => (false, 4),
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' if escape => (false, 0),
            _ if escape => return Err("unknown escape sequence in a string".into()),
            b'"' => {
                self.token = Token::None;
                if key {
                    self.expect = Expect::Colon;
                    return Ok(Step::More);
                }
                return Ok(self.value_ends());
            }
            b'\\' => (true, 0),
            _ => (false, 0),
        };
        self.token = Token::String { key, escape, hex };
        Ok(Step::More)
    }

    fn in_literal(&mut self, byte: u8, rest: &'static [u8]) -> Result<Step, String> {
        match rest {
            [first, last @ ..] if *first == byte => {
                self.token = if last.is_empty() { Token::None } else { Token::Literal(last) };
                if last.is_empty() { Ok(self.value_ends()) } else { Ok(Step::More) }
            }
            _ => Err("expected true, false or null".into()),
        }
    }

    /// A byte outside every token.
    fn structure(&mut self, byte: u8) -> Result<Step, String> {
        match (byte, self.expect) {
            (b' ' | b'\t' | b'\n' | b'\r', _) => Ok(Step::More),
            (b'/', _) => {
                self.comment = Comment::Slash;
                Ok(Step::More)
            }
            (b']', Expect::ValueOrEnd | Expect::CommaOrEnd) if !self.in_object() => self.close(),
            (b'}', Expect::KeyOrEnd | Expect::CommaOrEnd) if self.in_object() => self.close(),
            (_, Expect::Value | Expect::ValueOrEnd) => self.value_begins(byte),
            (b'"', Expect::Key | Expect::KeyOrEnd) => {
                self.count()?;
                self.token = Token::String { key: true, escape: false, hex: 0 };
                Ok(Step::More)
            }
            (b':', Expect::Colon) => {
                self.expect = Expect::Value;
                Ok(Step::More)
            }
            (b',', Expect::CommaOrEnd) => {
                self.expect = if self.in_object() { Expect::Key } else { Expect::Value };
                Ok(Step::More)
            }
            _ => Err(format!("expected {}, got {}", self.expected(), show(byte))),
        }
    }

    fn value_begins(&mut self, byte: u8) -> Result<Step, String> {
        self.count()?;
        match byte {
            b'{' => self.open(true)?,
            b'[' => self.open(false)?,
            b'"' => self.token = Token::String { key: false, escape: false, hex: 0 },
            b't' => self.token = Token::Literal(b"rue"),
            b'f' => self.token = Token::Literal(b"alse"),
            b'n' => self.token = Token::Literal(b"ull"),
            b'-' | b'0'..=b'9' => self.token = Token::Number,
            _ => return Err(format!("expected {}, got {}", self.expected(), show(byte))),
        }
        // What follows a scalar; `open` has set its own.
        if !matches!(byte, b'{' | b'[') {
            self.expect = if self.depth == 0 { Expect::Value } else { Expect::CommaOrEnd };
        }
        Ok(Step::More)
    }

    fn value_ends(&self) -> Step {
        if self.depth == 0 { Step::Ends } else { Step::More }
    }

    fn open(&mut self, object: bool) -> Result<(), String> {
        if self.depth == self.limits.depth {
            return Err(format!("more than {} nested arrays and objects", self.limits.depth));
        }
        self.depth += 1;
        self.objects = self.objects << 1 | u64::from(object);
        self.expect = if object { Expect::KeyOrEnd } else { Expect::ValueOrEnd };
        Ok(())
    }

    fn close(&mut self) -> Result<Step, String> {
        self.count()?;
        self.depth -= 1;
        self.objects >>= 1;
        self.expect = Expect::CommaOrEnd;
        Ok(self.value_ends())
    }

    fn count(&mut self) -> Result<(), String> {
        if self.values == self.limits.values {
            return Err(format!("more than {} values in one request", self.limits.values));
        }
        self.values += 1;
        Ok(())
    }

    fn in_object(&self) -> bool {
        self.depth > 0 && self.objects & 1 == 1
    }

    fn expected(&self) -> &'static str {
        match self.expect {
            Expect::Value => "a value",
            Expect::ValueOrEnd => "a value or ']'",
            Expect::Key => "a key",
            Expect::KeyOrEnd => "a key or '}'",
            Expect::Colon => "':'",
            Expect::CommaOrEnd if self.in_object() => "',' or '}'",
            Expect::CommaOrEnd => "',' or ']'",
        }
    }
}

fn next_comment(comment: Comment, byte: u8) -> Result<Comment, String> {
    Ok(match (comment, byte) {
        (Comment::Slash, b'/') => Comment::Line,
        (Comment::Slash, b'*') => Comment::Block,
        (Comment::Slash, _) => return Err("expected '//' or '/*' of a comment".into()),
        (Comment::Line, b'\n') => Comment::None,
        (Comment::Block | Comment::BlockStar, b'*') => Comment::BlockStar,
        (Comment::BlockStar, b'/') => Comment::None,
        (Comment::BlockStar, _) => Comment::Block,
        (other, _) => other,
    })
}

fn show(byte: u8) -> String {
    if byte.is_ascii_graphic() { format!("'{}'", char::from(byte)) } else { format!("byte {byte:#04x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { depth: 4, values: 12 };

    fn scan(text: &str) -> Result<Option<usize>, (usize, String)> {
        Scanner::new(LIMITS).scan(&mut text.as_bytes().to_vec())
    }

    #[test]
    fn ends_of_values() {
        for (text, end) in [
            ("{} {}", 2),
            (" [1,2]x", 6),
            (r#"{"a}\"":"]"}[]"#, 12),
            ("12 ", 2),
            ("12[", 2),
            ("true!", 4),
            (r#""a\u00e4"z"#, 9),
            ("/* } */{}", 9),
            ("[1/**/,// ]\n2]", 14),
            ("[[],{},-1.5e+3]", 15),
        ] {
            assert_eq!(scan(text), Ok(Some(end)), "{text}");
        }
    }

    #[test]
    fn unfinished_values_want_more() {
        for text in ["", " ", "{", "[1", "12", "tru", r#"{"a":"}"#, "/", "// {}", r#"["\"]"#] {
            assert_eq!(scan(text), Ok(None), "{text}");
        }
    }

    #[test]
    fn the_first_wrong_byte_is_named() {
        for (text, at) in [
            ("x", 0),
            ("}", 0),
            ("{]", 1),
            ("[}", 1),
            ("[1}", 2),
            ("{1", 1),
            ("{\"a\" 1", 5),
            ("{\"a\":}", 5),
            ("{\"a\":1,}", 7),
            ("[1,]", 3),
            ("[1 2", 3),
            ("nul!", 3),
            ("\"\\x", 2),
            ("\"\\u12g", 5),
            ("\"\n", 1),
            ("/x", 1),
            ("[[[[[", 4),
            ("[1,1,1,1,1,1,1,1,1,1,1,1", 23),
        ] {
            assert_eq!(scan(text).unwrap_err().0, at, "{text}");
        }
    }

    #[test]
    fn comments_become_spaces_but_lines_stay() {
        let mut text = b"[/*\n*/1]// \"".to_vec();
        let mut scanner = Scanner::new(LIMITS);
        assert_eq!(scanner.scan(&mut text), Ok(Some(8)));
        assert_eq!(scanner.scan(&mut text[8..]), Ok(None));
        assert_eq!(text, b"[  \n  1]    ");
        assert!(scanner.between_values());
    }
}
