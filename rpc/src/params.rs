//! Strict decoding of parameters into a `Deserialize` struct, with errors that a person can act on.
//!
//! This is a `serde::Deserializer` over `&Value` in place of serde_json's own, because its errors are data: which
//! parameter, what is wrong, and which keys would be right. It refuses unknown keys of structs by itself, whether or
//! not the struct says `deny_unknown_fields`.

use crate::error::RpcError;
use crate::suggest::similar;
use serde::de::value::BorrowedStrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, EnumAccess, Expected, MapAccess, SeqAccess, Unexpected,
    VariantAccess, Visitor,
};
use serde_json::{Map, Value};
use std::fmt;

/// Decodes `params` (absent: an empty object) for `method`; `accepted` are its keys, for the error text.
pub(crate) fn decode<P: DeserializeOwned>(
    method: &str,
    params: Option<&Value>,
    accepted: &[&str],
) -> Result<P, RpcError> {
    let empty = Value::Object(Map::new());
    let params = match params {
        None => &empty,
        Some(Value::Array(items)) if items.is_empty() => &empty,
        Some(Value::Array(_)) => {
            let names = accepted.join(", ");
            return Err(RpcError::invalid_params(format!(
                "{method}: parameters are given by name, in an object; accepted: {names}"
            ))
            .method(method)
            .hint(format!("accepted: {names}")));
        }
        Some(params) => params,
    };
    P::deserialize(ValueDe(params)).map_err(|error| error.report(method, accepted))
}

/// Why parameters could not be decoded.
#[derive(Debug)]
pub(crate) struct ParamError {
    /// The way to the value, outermost first: keys as they are, positions as `[i]`.
    pub(crate) path: Vec<String>,
    pub(crate) problem: Problem,
}

#[derive(Debug)]
pub(crate) enum Problem {
    /// The object at the path has a key that is not among those accepted there.
    Unknown { key: String, accepted: &'static [&'static str] },
    /// The object at the path lacks this key.
    Missing(&'static str),
    /// The value at the path is wrong.
    Wrong(String),
}

impl ParamError {
    fn wrong(text: impl fmt::Display) -> Self {
        Self { path: Vec::new(), problem: Problem::Wrong(text.to_string()) }
    }

    fn under(mut self, key: impl Into<String>) -> Self {
        self.path.insert(0, key.into());
        self
    }

    /// The path with `last` appended, such as `paths[1].dst`.
    fn place(&self, last: Option<&str>) -> String {
        let mut place = String::new();
        for part in self.path.iter().map(String::as_str).chain(last) {
            if !place.is_empty() && !part.starts_with('[') {
                place.push('.');
            }
            place.push_str(part);
        }
        place
    }

    fn report(self, method: &str, accepted: &[&str]) -> RpcError {
        // Inside a nested object, its keys are the ones to name.
        let (place, what, accepted) = match &self.problem {
            Problem::Unknown { key, accepted } => {
                let place = self.place(Some(key));
                let mut text = format!("unknown parameter '{place}'");
                if let Some(similar) = similar(key, accepted.iter().copied()) {
                    text += &format!(" (did you mean '{similar}'?)");
                }
                (place, text, *accepted)
            }
            Problem::Missing(key) => {
                let place = self.place(Some(key));
                let text = format!("missing parameter '{place}'");
                (place, text, accepted)
            }
            Problem::Wrong(text) => {
                let place = self.place(None);
                let text =
                    if place.is_empty() { text.clone() } else { format!("parameter '{place}': {text}") };
                (place, text, accepted)
            }
        };
        let names = if accepted.is_empty() { "none".to_owned() } else { accepted.join(", ") };
        let error = RpcError::invalid_params(format!("{method}: {what}; accepted: {names}"))
            .method(method)
            .hint(format!("accepted: {names}"));
        if place.is_empty() { error } else { error.param(&place) }
    }
}

impl fmt::Display for ParamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}", self.place(None), self.problem)
    }
}

impl std::error::Error for ParamError {}

impl de::Error for ParamError {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::wrong(text)
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::wrong(format_args!("expected {}, got {}", Wanted(expected), Got(unexpected)))
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::wrong(format_args!("expected {}, got {}", Wanted(expected), Got(unexpected)))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::wrong(format_args!("expected one of {}, got \"{variant}\"", expected.join(", ")))
    }

    fn unknown_field(field: &str, accepted: &'static [&'static str]) -> Self {
        Self { path: Vec::new(), problem: Problem::Unknown { key: field.to_owned(), accepted } }
    }

    fn missing_field(field: &'static str) -> Self {
        Self { path: Vec::new(), problem: Problem::Missing(field) }
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self {
            path: vec![field.to_owned()],
            problem: Problem::Wrong("given twice (under another name?)".into()),
        }
    }
}

/// What was expected, with the range of a number in place of the name of its type.
struct Wanted<'a>(&'a dyn Expected);

impl fmt::Display for Wanted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.to_string();
        let range = match name.as_str() {
            "u8" => (0, i64::from(u8::MAX)),
            "u16" => (0, i64::from(u16::MAX)),
            "u32" => (0, i64::from(u32::MAX)),
            "i32" => (i64::from(i32::MIN), i64::from(i32::MAX)),
            "u64" | "usize" => return f.write_str("a whole number from 0 on"),
            "i64" => return f.write_str("a whole number"),
            "f32" | "f64" => return f.write_str("a number"),
            _ => return f.write_str(&name),
        };
        write!(f, "a whole number from {} to {}", range.0, range.1)
    }
}

/// `Unexpected` in JSON's words.
struct Got<'a>(Unexpected<'a>);

impl fmt::Display for Got<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Unexpected::Bool(v) => write!(f, "{v}"),
            Unexpected::Unsigned(v) => write!(f, "{v}"),
            Unexpected::Signed(v) => write!(f, "{v}"),
            Unexpected::Float(v) => write!(f, "{v}"),
            Unexpected::Str(v) => write!(f, "\"{}\"", v.escape_debug()),
            Unexpected::Unit => f.write_str("null"),
            Unexpected::Seq => f.write_str("an array"),
            Unexpected::Map => f.write_str("an object"),
            other => other.fmt(f),
        }
    }
}

/// The deserializer: a borrowed JSON value.
#[derive(Clone, Copy)]
pub(crate) struct ValueDe<'a>(pub(crate) &'a Value);

impl<'a> ValueDe<'a> {
    fn unexpected(self) -> Unexpected<'a> {
        match self.0 {
            Value::Null => Unexpected::Unit,
            Value::Bool(v) => Unexpected::Bool(*v),
            Value::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
                (Some(v), ..) => Unexpected::Unsigned(v),
                (_, Some(v), _) => Unexpected::Signed(v),
                (.., v) => Unexpected::Float(v.unwrap_or(f64::NAN)),
            },
            Value::String(v) => Unexpected::Str(v),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        }
    }
}

impl<'de> de::Deserializer<'de> for ValueDe<'de> {
    type Error = ParamError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(v) => visitor.visit_bool(*v),
            Value::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
                (Some(v), ..) => visitor.visit_u64(v),
                (_, Some(v), _) => visitor.visit_i64(v),
                (.., Some(v)) => visitor.visit_f64(v),
                _ => Err(ParamError::wrong("a number out of range")),
            },
            Value::String(v) => visitor.visit_borrowed_str(v),
            Value::Array(items) => {
                let mut rest = Items(items.iter().enumerate());
                let value = visitor.visit_seq(&mut rest)?;
                match rest.0.len() {
                    0 => Ok(value),
                    more => Err(ParamError::wrong(format_args!("{more} items too many in the array"))),
                }
            }
            Value::Object(map) => visitor.visit_map(Fields::new(map)),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        let Value::Object(map) = self.0 else {
            return Err(ParamError::wrong(format_args!(
                "expected an object, got {}",
                Got(self.unexpected())
            )));
        };
        match map.keys().find(|key| !fields.contains(&key.as_str())) {
            Some(key) => Err(de::Error::unknown_field(key, fields)),
            None => visitor.visit_map(Fields::new(map)),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        match self.0 {
            Value::String(name) => visitor.visit_enum(Variant { name, value: None }),
            Value::Object(map) if map.len() == 1 => match map.iter().next() {
                Some((name, value)) => visitor.visit_enum(Variant { name, value: Some(value) }),
                None => Err(ParamError::wrong("expected a string")),
            },
            _ => Err(ParamError::wrong(format_args!("expected a string, got {}", Got(self.unexpected())))),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq
        tuple tuple_struct map identifier
    }
}

/// The items of an array.
struct Items<'a>(std::iter::Enumerate<std::slice::Iter<'a, Value>>);

impl<'a> SeqAccess<'a> for Items<'a> {
    type Error = ParamError;

    fn next_element_seed<T: DeserializeSeed<'a>>(&mut self, seed: T) -> Result<Option<T::Value>, ParamError> {
        match self.0.next() {
            None => Ok(None),
            Some((index, item)) => {
                seed.deserialize(ValueDe(item)).map(Some).map_err(|error| error.under(format!("[{index}]")))
            }
        }
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.0.len())
    }
}

/// The members of an object.
struct Fields<'a> {
    rest: serde_json::map::Iter<'a>,
    current: Option<(&'a str, &'a Value)>,
}

impl<'a> Fields<'a> {
    fn new(map: &'a Map<String, Value>) -> Self {
        Self { rest: map.iter(), current: None }
    }
}

impl<'a> MapAccess<'a> for Fields<'a> {
    type Error = ParamError;

    fn next_key_seed<K: DeserializeSeed<'a>>(&mut self, seed: K) -> Result<Option<K::Value>, ParamError> {
        self.current = self.rest.next().map(|(key, value)| (key.as_str(), value));
        match self.current {
            None => Ok(None),
            Some((key, _)) => seed
                .deserialize(BorrowedStrDeserializer::new(key))
                .map(Some)
                .map_err(|error: ParamError| error.under(key)),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'a>>(&mut self, seed: V) -> Result<V::Value, ParamError> {
        let Some((key, value)) = self.current.take() else {
            return Err(ParamError::wrong("value asked for before its key"));
        };
        seed.deserialize(ValueDe(value)).map_err(|error| error.under(key))
    }
}

/// An enum: `"name"` or `{"name": value}`.
struct Variant<'a> {
    name: &'a str,
    value: Option<&'a Value>,
}

impl<'a> EnumAccess<'a> for Variant<'a> {
    type Error = ParamError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'a>>(self, seed: V) -> Result<(V::Value, Self), ParamError> {
        let variant = seed.deserialize(BorrowedStrDeserializer::new(self.name))?;
        Ok((variant, self))
    }
}

impl<'a> Variant<'a> {
    fn value(&self) -> Result<ValueDe<'a>, ParamError> {
        match self.value {
            Some(value) => Ok(ValueDe(value)),
            None => Err(ParamError::wrong(format_args!("expected {{\"{}\": …}}", self.name))),
        }
    }
}

impl<'a> VariantAccess<'a> for Variant<'a> {
    type Error = ParamError;

    fn unit_variant(self) -> Result<(), ParamError> {
        match self.value {
            None => Ok(()),
            Some(_) => Err(ParamError::wrong(format_args!("expected the string \"{}\"", self.name))),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'a>>(self, seed: T) -> Result<T::Value, ParamError> {
        let value = self.value()?;
        seed.deserialize(value).map_err(|error| error.under(self.name))
    }

    fn tuple_variant<V: Visitor<'a>>(self, _len: usize, visitor: V) -> Result<V::Value, ParamError> {
        de::Deserializer::deserialize_seq(self.value()?, visitor).map_err(|error| error.under(self.name))
    }

    fn struct_variant<V: Visitor<'a>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        de::Deserializer::deserialize_struct(self.value()?, "", fields, visitor)
            .map_err(|error| error.under(self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Path {
        #[serde(default)]
        src: Option<String>,
        dst: String,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "snake_case")]
    enum Mode {
        Ro,
        Rw,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    struct Params {
        name: String,
        num_blocks: u64,
        #[serde(default)]
        numa_id: Option<i32>,
        #[serde(default)]
        paths: Vec<Path>,
        #[serde(default)]
        mode: Option<Mode>,
        #[serde(default)]
        read_only: bool,
    }

    const KEYS: [&str; 6] = ["name", "num_blocks", "numa_id", "paths", "mode", "read_only"];

    fn error(params: Value) -> RpcError {
        let error = decode::<Params>("m_create", Some(&params), &KEYS).unwrap_err();
        assert_eq!(error.code, -32602);
        assert_eq!(error.data.as_ref().unwrap()["method"], "m_create");
        error
    }

    #[test]
    fn everything_decodes() {
        let params = json!({"name": "a", "num_blocks": 8, "numa_id": -1, "mode": "rw", "read_only": true,
            "paths": [{"dst": "d"}, {"src": "s", "dst": "e"}]});
        assert_eq!(
            decode::<Params>("m", Some(&params), &KEYS).unwrap(),
            Params {
                name: "a".into(),
                num_blocks: 8,
                numa_id: Some(-1),
                paths: vec![
                    Path { src: None, dst: "d".into() },
                    Path { src: Some("s".into()), dst: "e".into() }
                ],
                mode: Some(Mode::Rw),
                read_only: true,
            }
        );
    }

    #[test]
    fn unknown_key_is_refused_with_the_accepted_ones() {
        let error = error(json!({"name": "a", "num_block": 8}));
        assert_eq!(
            error.message,
            "m_create: unknown parameter 'num_block' (did you mean 'num_blocks'?); accepted: name, num_blocks, \
             numa_id, paths, mode, read_only"
        );
        assert_eq!(error.data.unwrap()["param"], "num_block");
    }

    #[test]
    fn nested_unknown_key_names_its_own_struct() {
        let error = error(json!({"name": "a", "num_blocks": 8, "paths": [{"dst": "d"}, {"port": 1}]}));
        assert_eq!(error.message, "m_create: unknown parameter 'paths[1].port'; accepted: src, dst");
    }

    #[test]
    fn missing_key_is_named() {
        let error_top = error(json!({"name": "a"}));
        assert!(error_top.message.starts_with("m_create: missing parameter 'num_blocks'; accepted: name"));
        let error = error(json!({"name": "a", "num_blocks": 1, "paths": [{}]}));
        assert!(error.message.contains("missing parameter 'paths[0].dst'"), "{}", error.message);
    }

    #[test]
    fn wrong_values_are_named_with_what_was_expected() {
        for (key, value, text) in [
            (
                "num_blocks",
                json!("8"),
                "parameter 'num_blocks': expected a whole number from 0 on, got \"8\"",
            ),
            ("num_blocks", json!(-1), "parameter 'num_blocks': expected a whole number from 0 on, got -1"),
            ("num_blocks", json!(1.5), "parameter 'num_blocks': expected a whole number from 0 on, got 1.5"),
            (
                "numa_id",
                json!(1u64 << 40),
                "parameter 'numa_id': expected a whole number from -2147483648 to 2147483647, got 1099511627776",
            ),
            ("name", json!(null), "parameter 'name': expected a string, got null"),
            ("mode", json!("x"), "parameter 'mode': expected one of ro, rw, got \"x\""),
            ("mode", json!(1), "parameter 'mode': expected a string, got 1"),
            ("mode", json!({"ro": 1}), "parameter 'mode': expected the string \"ro\""),
            ("paths", json!({}), "parameter 'paths': expected a sequence, got an object"),
            ("paths", json!(["d"]), "parameter 'paths[0]': expected an object, got \"d\""),
            ("read_only", json!(0), "parameter 'read_only': expected a boolean, got 0"),
        ] {
            let mut params = json!({"name": "a", "num_blocks": 8});
            params[key] = value;
            let error = error(params);
            assert!(error.message.contains(text), "{} should contain {text}", error.message);
        }
    }

    #[test]
    fn positional_parameters_are_refused_unless_empty() {
        assert!(error(json!(["a", 8])).message.contains("by name"));
        assert!(error(json!([])).message.contains("missing parameter 'name'"));
    }

    #[test]
    fn data_carrying_enums_decode() {
        #[derive(Debug, Deserialize, PartialEq)]
        enum Shape {
            Circle { radius: u32 },
            Pair(u8, u8),
            Side(u32),
        }
        let shape = |value: Value| Shape::deserialize(ValueDe(&value));
        assert_eq!(shape(json!({"Circle": {"radius": 2}})).unwrap(), Shape::Circle { radius: 2 });
        assert_eq!(shape(json!({"Pair": [1, 2]})).unwrap(), Shape::Pair(1, 2));
        assert_eq!(shape(json!({"Side": 3})).unwrap(), Shape::Side(3));
        assert!(shape(json!({"Pair": [1, 2, 3]})).is_err());
        assert_eq!(shape(json!({"Circle": {"radius": "x"}})).unwrap_err().path, ["Circle", "radius"]);
    }
}
