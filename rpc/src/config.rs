//! The configuration file: a list of the calls that the socket takes as well.
//!
//! ```json
//! {"subsystems": [{"subsystem": "bdev", "config": [
//!     {"method": "bdev_malloc_create", "params": {"name": "M0", "block_size": 512, "num_blocks": 2048}},
//!     [{"method": "bdev_null_create", "params": {}}, {"method": "bdev_null_create", "params": {}}]
//! ]}]}
//! ```
//!
//! This is SPDK's format, as `save_config` of SPDK's client writes it. `config` may be `null`, an inner array is a
//! batch, comments (`//`, `/* */`) are allowed. Every other key is refused with its position.

use crate::scan::{Limits, Scanner};
use crate::suggest::similar;
use crate::table::MethodTable;
use crate::wire::parse_strict;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use std::fmt;
use std::path::{Path, PathBuf};

/// A file is not bounded like a request; 64 levels are what the socket takes.
const LIMITS: Limits = Limits { depth: 64, values: u32::MAX };

/// A place in the file, both counted from 1; columns in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Byte in the line.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// One call of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The subsystem it stands under; for messages only.
    pub subsystem: String,
    /// Its position in the subsystem's list, from 1; the calls of a batch have that of the batch.
    pub entry: usize,
    /// The method.
    pub method: String,
    /// An object or array, if there is one.
    pub params: Option<Value>,
    /// Where it begins.
    pub at: Position,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: subsystem '{}', entry {}", self.at, self.subsystem, self.entry)
    }
}

/// Why a file is no configuration. The text says what would be right.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It says something wrong.
    #[error("{}:{at}: {text}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where.
        at: Position,
        /// What, and what would be right.
        text: String,
    },
}

/// The calls of a configuration file in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file, for messages.
    pub path: PathBuf,
    /// What it says.
    pub calls: Vec<Call>,
    /// Keys of the top level that are passed over.
    pub ignored: Vec<String>,
}

impl Config {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// It cannot be read, or [`Config::parse`] refuses it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let bytes =
            std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(bytes, path)
    }

    /// Understands `bytes`, which came from `path`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the place of the first mistake.
    pub fn parse(bytes: impl Into<Vec<u8>>, path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let invalid = |(at, text)| ConfigError::Invalid { path: path.to_owned(), at, text };
        let mut bytes = bytes.into();
        check_syntax(&mut bytes).map_err(|(at, text)| invalid((position(&bytes, at), text)))?;
        let text = std::str::from_utf8(&bytes)
            .map_err(|error| invalid((position(&bytes, error.valid_up_to()), "not UTF-8".to_owned())))?;
        let (calls, ignored) = Reader { text }.file().map_err(invalid)?;
        Ok(Self { path: path.to_owned(), calls, ignored })
    }

    /// Checks that `table` knows every method, so that nothing is executed of a file that cannot be right.
    ///
    /// # Errors
    /// The first call of an unknown method.
    pub fn check<C: 'static>(&self, table: &MethodTable<C>) -> Result<(), ConfigError> {
        let Some(call) = self.calls.iter().find(|call| table.states_of(&call.method).is_none()) else {
            return Ok(());
        };
        let mut text =
            format!("subsystem '{}', entry {}: unknown method '{}'", call.subsystem, call.entry, call.method);
        if let Some(why) = table.why_absent(&call.method) {
            text += &format!("; {why}");
        } else if let Some(similar) = table.similar(&call.method) {
            text += &format!("; did you mean '{similar}'?");
        }
        Err(ConfigError::Invalid { path: self.path.clone(), at: call.at, text })
    }
}

type Mistake = (Position, String);

/// Finds broken JSON, and turns comments into spaces.
fn check_syntax(bytes: &mut [u8]) -> Result<(), (usize, String)> {
    let mut scanner = Scanner::new(LIMITS);
    let Some(end) = scanner.scan(bytes)? else {
        return Err((bytes.len(), "the file ends too early: an array or object is not closed".to_owned()));
    };
    scanner.scan(&mut bytes[end..]).map_err(|(at, text)| (end + at, text))?;
    match bytes[end..].trim_ascii_start().len() {
        0 => Ok(()),
        rest => Err((bytes.len() - rest, "there is more after the end of the configuration".to_owned())),
    }
}

fn position(bytes: &[u8], at: usize) -> Position {
    let before = &bytes[..at.min(bytes.len())];
    let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    Position { line, column: before.len() - line_start + 1 }
}

/// Walks through the file by hand, because `RawValue`s know where they stand.
struct Reader<'a> {
    text: &'a str,
}

impl<'a> Reader<'a> {
    /// The calls, and keys of the top level that mean nothing here.
    fn file(&self) -> Result<(Vec<Call>, Vec<String>), Mistake> {
        let whole: &RawValue =
            serde_json::from_str(self.text).map_err(|error| self.json_mistake(0, &error))?;
        let shape = "a configuration is {\"subsystems\": [{\"subsystem\": …, \"config\": [{\"method\": …, \
                     \"params\": …}]}]}";
        if !whole.get().starts_with('{') {
            return Err((self.at(whole), format!("the top level must be an object; {shape}")));
        }
        // As SPDK, which has files with more than this: what is meant for others is passed over.
        let Members(pairs) = self.parse(whole)?;
        let (lists, others): (Vec<_>, Vec<_>) = pairs.into_iter().partition(|(key, _)| key == "subsystems");
        let mut lists = lists.into_iter();
        let Some((_, subsystems)) = lists.next() else {
            let guess = others.iter().find(|(key, _)| similar(key, ["subsystems"]).is_some());
            let at = guess.map_or(self.at(whole), |(_, value)| self.at(value));
            let guess = guess.map_or_else(String::new, |(key, _)| format!(" (you wrote '{key}')"));
            return Err((at, format!("key 'subsystems' is missing{guess}; {shape}")));
        };
        if let Some((_, again)) = lists.next() {
            return Err((self.at(again), "key 'subsystems' is given twice in the top level".into()));
        }
        let mut calls = Vec::new();
        for subsystem in self.items(subsystems, "'subsystems'")? {
            self.subsystem(subsystem, &mut calls)?;
        }
        Ok((calls, others.into_iter().map(|(key, _)| key).collect()))
    }

    fn subsystem(&self, raw: &'a RawValue, calls: &mut Vec<Call>) -> Result<(), Mistake> {
        let shape = "a subsystem is {\"subsystem\": name, \"config\": [calls]}";
        let [name, config] = self.members(raw, ["subsystem", "config"], "a subsystem", shape)?;
        let Some(name) = name else {
            return Err((self.at(raw), format!("key 'subsystem' is missing; {shape}")));
        };
        let name = self.string(name, "'subsystem'")?;
        let Some(config) = config.filter(|config| config.get() != "null") else { return Ok(()) };
        for (index, entry) in self.items(config, &format!("'config' of '{name}'"))?.into_iter().enumerate() {
            if entry.get().starts_with('[') {
                for call in self.items(entry, "a batch")? {
                    calls.push(self.call(call, &name, index + 1)?);
                }
            } else {
                calls.push(self.call(entry, &name, index + 1)?);
            }
        }
        Ok(())
    }

    fn call(&self, raw: &'a RawValue, subsystem: &str, entry: usize) -> Result<Call, Mistake> {
        let place = format!("subsystem '{subsystem}', entry {entry}");
        let shape = "an entry is {\"method\": name, \"params\": {…}}";
        let [method, params] = self.members(raw, ["method", "params"], &place, shape)?;
        let Some(method) = method else {
            return Err((self.at(raw), format!("{place}: key 'method' is missing; {shape}")));
        };
        let method = self.string(method, &format!("{place}: 'method'"))?;
        let params = match params {
            None => None,
            Some(raw) => match parse_strict(raw.get().as_bytes()) {
                Ok(Value::Null) => None,
                Ok(params @ (Value::Object(_) | Value::Array(_))) => Some(params),
                Ok(_) => return Err((self.at(raw), format!("{place}: 'params' must be an object"))),
                Err(error) => {
                    let (at, text) = self.json_mistake(self.offset(raw), &error);
                    return Err((at, format!("{place}, {method}: {text}")));
                }
            },
        };
        Ok(Call { subsystem: subsystem.to_owned(), entry, method, params, at: self.at(raw) })
    }

    /// The values of `keys` in an object that has no others.
    fn members<const N: usize>(
        &self,
        raw: &'a RawValue,
        keys: [&str; N],
        place: &str,
        shape: &str,
    ) -> Result<[Option<&'a RawValue>; N], Mistake> {
        if !raw.get().starts_with('{') {
            return Err((self.at(raw), format!("{place} must be an object; {shape}")));
        }
        let Members(pairs) = self.parse(raw)?;
        let mut found = [None; N];
        for (key, value) in pairs {
            let Some(index) = keys.iter().position(|accepted| *accepted == key) else {
                let guess = match similar(&key, keys) {
                    Some(similar) => format!(" (did you mean '{similar}'?)"),
                    None => String::new(),
                };
                let accepted = keys.join(", ");
                let text = format!("unknown key '{key}' in {place}{guess}; accepted: {accepted}; {shape}");
                return Err((self.at(value), text));
            };
            if found[index].replace(value).is_some() {
                return Err((self.at(value), format!("key '{key}' is given twice in {place}")));
            }
        }
        Ok(found)
    }

    fn items(&self, raw: &'a RawValue, place: &str) -> Result<Vec<&'a RawValue>, Mistake> {
        if !raw.get().starts_with('[') {
            return Err((self.at(raw), format!("{place} must be an array")));
        }
        self.parse(raw)
    }

    fn string(&self, raw: &'a RawValue, place: &str) -> Result<String, Mistake> {
        if !raw.get().starts_with('"') {
            return Err((self.at(raw), format!("{place} must be a string")));
        }
        self.parse(raw)
    }

    fn parse<T: Deserialize<'a>>(&self, raw: &'a RawValue) -> Result<T, Mistake> {
        serde_json::from_str(raw.get()).map_err(|error| self.json_mistake(self.offset(raw), &error))
    }

    /// Where `raw`, which is a part of `text`, begins in it.
    fn offset(&self, raw: &RawValue) -> usize {
        raw.get().as_ptr().addr().saturating_sub(self.text.as_ptr().addr())
    }

    fn at(&self, raw: &RawValue) -> Position {
        position(self.text.as_bytes(), self.offset(raw))
    }

    /// serde_json counts from the beginning of what it was given, which is `offset`; columns from 0 before the first
    /// byte.
    fn json_mistake(&self, offset: usize, error: &serde_json::Error) -> Mistake {
        let start = position(self.text.as_bytes(), offset);
        let column = error.column().max(1);
        let at = match error.line() {
            0 | 1 => Position { line: start.line, column: start.column + column - 1 },
            line => Position { line: start.line + line - 1, column },
        };
        let text = error.to_string();
        let text = text.rfind(" at line ").map_or(text.as_str(), |end| &text[..end]);
        (at, text.to_owned())
    }
}

/// The members of an object in their order, repeated ones as well.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(de: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Members(pairs))
            }
        }
        de.deserialize_map(Pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::States;
    use proptest::prelude::*;
    use serde_json::json;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, "c.json").map_err(|error| error.to_string())
    }

    #[test]
    fn calls_come_in_order_with_their_places() {
        let text = r#"// written by hand
{"subsystems": [
  {"subsystem": "iobuf", "config": null},
  {"subsystem": "bdev", "config": [
    {"method": "a", "params": {"x": [1, "\u00e4"]}}, /* one */
    [{"method": "b"},
     {"method": "c", "params": null}]
  ]},
  {"subsystem": "rnbd"}
]}
"#;
        let config = parse(text).unwrap();
        let calls: Vec<_> = config
            .calls
            .iter()
            .map(|c| (c.subsystem.as_str(), c.entry, c.method.as_str(), c.params.clone(), c.at.to_string()))
            .collect();
        assert_eq!(
            calls,
            [
                ("bdev", 1, "a", Some(json!({"x": [1, "\u{e4}"]})), "5:5".to_owned()),
                ("bdev", 2, "b", None, "6:6".to_owned()),
                ("bdev", 2, "c", None, "7:6".to_owned()),
            ]
        );
    }

    #[test]
    fn mistakes_are_named_with_place_and_remedy() {
        for (text, place, part) in [
            ("", "1:1", "ends too early"),
            ("{\n \"subsystems\": [", "2:17", "ends too early"),
            ("{\"subsystems\": []} x", "1:20", "expected a value"),
            ("{\"subsystems\": []} []", "1:20", "more after the end"),
            ("{\"subsystems\": [],}", "1:19", "expected a key"),
            ("{\"subsystems\": [01]}", "1:18", "invalid number"),
            ("[]", "1:1", "must be an object"),
            ("{}", "1:1", "'subsystems' is missing"),
            ("{\"subsytems\": []}", "1:15", "key 'subsystems' is missing (you wrote 'subsytems')"),
            ("{\"subsystems\": [], \"subsystems\": []}", "1:34", "given twice"),
            ("{\"subsystems\": {}}", "1:16", "must be an array"),
            ("{\"subsystems\": [{\"config\": []}]}", "1:17", "'subsystem' is missing"),
            ("{\"subsystems\": [{\"subsystem\": 1}]}", "1:31", "must be a string"),
            (
                "{\"subsystems\": [{\"subsystem\": \"b\", \"config\": {}}]}",
                "1:46",
                "'config' of 'b' must be an array",
            ),
            (
                "{\"subsystems\": [{\"subsystem\": \"b\", \"config\": [\n7]}]}",
                "2:1",
                "subsystem 'b', entry 1 must be",
            ),
            (
                "{\"subsystems\": [{\"subsystem\": \"b\", \"config\": [{\"params\": {}}]}]}",
                "1:47",
                "'method' is missing",
            ),
            (
                "{\"subsystems\": [{\"subsystem\": \"b\", \"config\": [{\"method\": \"m\", \"parms\": {}}]}]}",
                "1:72",
                "unknown key 'parms' in subsystem 'b', entry 1 (did you mean 'params'?); accepted: method, params",
            ),
            (
                "{\"subsystems\": [{\"subsystem\": \"b\", \"config\": [{\"method\": \"m\", \"params\": 1}]}]}",
                "1:73",
                "'params' must be an object",
            ),
            (
                "{\"subsystems\": [{\"subsystem\": \"b\", \"config\": [{\"method\": \"m\", \"params\":\n{\"a\":1,\n\"a\":2}}]}]}",
                "3:3",
                "subsystem 'b', entry 1, m: key 'a' is given twice",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(&format!("c.json:{place}: ")), "{text}\n{error}\nshould be at {place}");
            assert!(error.contains(part), "{text}\n{error}\nshould contain {part}");
        }
    }

    #[test]
    fn what_is_meant_for_others_is_passed_over() {
        let config = parse("{\"version\": 1, \"subsystems\": [], \"global\": {}}").unwrap();
        assert_eq!(config.ignored, ["version", "global"]);
    }

    #[test]
    fn unreadable_file_is_named() {
        let error = Config::load("/nonexistent/c.json").unwrap_err().to_string();
        assert!(error.contains("/nonexistent/c.json") && error.contains("No such file"), "{error}");
    }

    #[test]
    fn unknown_methods_are_found_before_anything_runs() {
        let mut table: MethodTable<()> = MethodTable::new();
        table.method_without_params("bdev_examine", States::ANY, |_, r| r.ok(true));
        let config = parse(
            "{\"subsystems\": [{\"subsystem\": \"bdev\", \"config\": [{\"method\": \"bdev_examine\"},\n\
             {\"method\": \"bdev_exmine\"}]}]}",
        )
        .unwrap();
        assert_eq!(
            config.check(&table).unwrap_err().to_string(),
            "c.json:2:1: subsystem 'bdev', entry 2: unknown method 'bdev_exmine'; did you mean 'bdev_examine'?"
        );
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_panic(text in "[{}\\[\\]\",:a1 \n/*\u{e4}]{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn cut_off_files_are_refused(cut in 1usize..80) {
            let text = "{\"subsystems\": [{\"subsystem\": \"b\", \"config\": [{\"method\": \"m\", \"params\": {}}]}]}";
            prop_assert!(parse(&text[..text.len() - cut.min(text.len())]).is_err());
        }
    }
}
