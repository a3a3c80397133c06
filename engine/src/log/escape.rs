//! What others chose, such as names, made fit for a line of a log or a terminal.

use std::borrow::Cow;
use std::fmt::{self, Write};

/// Whether `c` shows as itself and nothing more. Not so: control characters, which end a line or steer a terminal; what changes
/// the direction or the look of the text around it; what cannot be seen.
fn is_plain(c: char) -> bool {
    match c {
        ' '..='~' => true,
        _ if c.is_ascii() => false,
        _ => c.escape_debug().len() == 1,
    }
}

/// Passes text on with everything escaped, as Rust does (`\n`, `\u{202e}`), that does not show as itself.
pub struct Escaping<W>(pub W);

impl<W: Write> Write for Escaping<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| !is_plain(*c)) {
            self.0.write_str(&rest[..at])?;
            write!(self.0, "{}", c.escape_debug())?;
            rest = &rest[at + c.len_utf8()..];
        }
        self.0.write_str(rest)
    }
}

/// `text` as [`Escaping`] passes it on: one line, without surprises.
pub fn escaped(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    // A `String` takes everything.
    let _ = Escaping(&mut out).write_str(text);
    Cow::Owned(out)
}

/// `json`, the text of one JSON value, with such characters as JSON's own escapes. They can only be within its strings.
pub(super) fn escaped_json(json: &str) -> Cow<'_, str> {
    if json.chars().all(is_plain) {
        return Cow::Borrowed(json);
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if is_plain(c) {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_show_as_itself_is_escaped() {
        let text = "a\nb\r\t\u{1b}[31m\0\u{7f}\u{85}\u{9b}\u{202e}\u{2066}\u{2028}\u{200b}\u{feff}\u{e0001}z";
        let right =
            r"a\nb\r\t\u{1b}[31m\0\u{7f}\u{85}\u{9b}\u{202e}\u{2066}\u{2028}\u{200b}\u{feff}\u{e0001}z";
        assert_eq!(escaped(text), right);
    }

    #[test]
    fn what_people_write_stays() {
        for text in ["", r#"plain "quoted" \ 'x'"#, "Gerät für Zürich", "磁盘", "диск", "🖴 disk"]
        {
            assert!(matches!(escaped(text), Cow::Borrowed(same) if same == text), "{text}");
        }
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({"peer": "a\n\u{1b}\u{7f}\u{202e}\u{e0001}ü"});
        let text = serde_json::to_string(&value).unwrap();
        let safe = escaped_json(&text);
        assert!(safe.chars().all(is_plain) && safe.contains("ü"), "{safe}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
    }
}
