//! Which parameters a `Deserialize` struct takes, asked from the struct itself.
//!
//! serde's derived code tells a deserializer the names of the fields and, for each, what type it would like to read.
//! A deserializer that answers every such wish with an error which names the type learns them all. So documents and
//! tests list parameters from the same source that decodes them.

use crate::params::{Problem, ValueDe};
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};
use std::fmt;

/// One parameter of a method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// The key.
    pub name: &'static str,
    /// The type of the value.
    pub kind: Kind,
    /// Whether the method refuses to be called without it. `false` also if a type with rules of its own (a nested
    /// struct, a string of some special form) hides the answer.
    pub required: bool,
}

/// The type of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// An integer, by Rust's name of its range.
    Int(&'static str),
    /// Any number.
    Float,
    /// A string.
    String,
    /// One of these strings.
    Enum(&'static [&'static str]),
    /// An array of one type.
    Array(Box<Kind>),
    /// An object with these keys.
    Object(&'static [&'static str]),
    /// An object with any keys.
    Map,
    /// Anything.
    Any,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Bool => f.write_str("bool"),
            Kind::Int(name) => f.write_str(name),
            Kind::Float => f.write_str("number"),
            Kind::String => f.write_str("string"),
            Kind::Enum(variants) => write!(f, "enum({})", variants.join("|")),
            Kind::Array(inner) => write!(f, "[{inner}]"),
            Kind::Object(fields) => write!(f, "{{{}}}", fields.join(",")),
            Kind::Map => f.write_str("object"),
            Kind::Any => f.write_str("any"),
        }
    }
}

/// The parameters of `P` in the order of its fields; empty if `P` is no plain struct (`flatten`, a map).
pub(crate) fn params_of<P: DeserializeOwned>() -> Vec<Param> {
    let names = match P::deserialize(Probe) {
        Err(Found(Kind::Object(names))) => names,
        _ => return Vec::new(),
    };
    let mut params: Vec<Param> = names
        .iter()
        .map(|&name| {
            let kind = match P::deserialize(FieldProbe(name)) {
                Err(Found(kind)) => kind,
                Ok(_) => Kind::Any,
            };
            Param { name, kind, required: false }
        })
        .collect();
    mark_required::<P>(&mut params);
    params
}

/// Gives `P` more and more of the keys that it misses, until it misses none.
fn mark_required<P: DeserializeOwned>(params: &mut [Param]) {
    let mut given = Map::new();
    // Every turn adds a key, so there are at most as many turns as keys.
    for _ in 0..params.len() {
        let value = Value::Object(given.clone());
        let Err(error) = P::deserialize(ValueDe(&value)) else { return };
        let Problem::Missing(key) = error.problem else { return };
        let Some(param) = params.iter_mut().find(|param| param.name == key && error.path.is_empty()) else {
            return;
        };
        param.required = true;
        given.insert(key.to_owned(), example(&param.kind));
    }
}

/// A value that most types of this kind accept.
fn example(kind: &Kind) -> Value {
    match kind {
        Kind::Bool => json!(false),
        Kind::Int(_) | Kind::Float => json!(1),
        // Also a UUID, which is the most usual string with rules.
        Kind::String => json!("00000000-0000-0000-0000-000000000000"),
        Kind::Enum(variants) => json!(variants.first().unwrap_or(&"")),
        Kind::Array(_) => json!([]),
        Kind::Object(_) | Kind::Map => json!({}),
        Kind::Any => json!(null),
    }
}

/// The "error" with which a probe reports what it was asked for.
#[derive(Debug)]
struct Found(Kind);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Found {}

impl de::Error for Found {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Found(Kind::Any)
    }
}

/// Answers every wish with the name of the type.
struct Probe;

macro_rules! found {
    ($($method:ident => $kind:expr;)*) => {
        $(fn $method<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Found> {
            Err(Found($kind))
        })*
    };
}

impl<'de> Deserializer<'de> for Probe {
    type Error = Found;

    found! {
        deserialize_any => Kind::Any;
        deserialize_bool => Kind::Bool;
        deserialize_i8 => Kind::Int("i8");
        deserialize_i16 => Kind::Int("i16");
        deserialize_i32 => Kind::Int("i32");
        deserialize_i64 => Kind::Int("i64");
        deserialize_i128 => Kind::Int("i128");
        deserialize_u8 => Kind::Int("u8");
        deserialize_u16 => Kind::Int("u16");
        deserialize_u32 => Kind::Int("u32");
        deserialize_u64 => Kind::Int("u64");
        deserialize_u128 => Kind::Int("u128");
        deserialize_f32 => Kind::Float;
        deserialize_f64 => Kind::Float;
        deserialize_char => Kind::String;
        deserialize_str => Kind::String;
        deserialize_string => Kind::String;
        deserialize_bytes => Kind::Array(Box::new(Kind::Int("u8")));
        deserialize_byte_buf => Kind::Array(Box::new(Kind::Int("u8")));
        deserialize_unit => Kind::Any;
        deserialize_map => Kind::Map;
        deserialize_identifier => Kind::String;
        deserialize_ignored_any => Kind::Any;
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Found> {
        visitor.visit_some(Probe)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Found> {
        visitor.visit_newtype_struct(Probe)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, _: V) -> Result<V::Value, Found> {
        Err(Found(Kind::Any))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Found> {
        visitor.visit_seq(ItemProbe)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Found> {
        visitor.visit_seq(ItemProbe)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Found> {
        visitor.visit_seq(ItemProbe)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Found> {
        Err(Found(Kind::Object(fields)))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Found> {
        Err(Found(Kind::Enum(variants)))
    }
}

/// An array whose first item is a probe.
struct ItemProbe;

impl<'de> SeqAccess<'de> for ItemProbe {
    type Error = Found;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Found> {
        seed.deserialize(Probe).map(Some).map_err(|found| Found(Kind::Array(Box::new(found.0))))
    }
}

/// A struct with one member, whose value is a probe.
struct FieldProbe(&'static str);

impl<'de> Deserializer<'de> for FieldProbe {
    type Error = Found;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Found> {
        visitor.visit_map(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for FieldProbe {
    type Error = Found;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Found> {
        seed.deserialize(de::value::BorrowedStrDeserializer::new(self.0)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Found> {
        seed.deserialize(Probe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Mode {
        Ro,
        Rw,
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its shape is looked at")]
    struct Inner {
        dst: String,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only its shape is looked at")]
    struct Params {
        name: String,
        #[serde(default)]
        read_only: bool,
        num_blocks: u64,
        mode: Mode,
        uuid: Option<String>,
        paths: Vec<Inner>,
        #[serde(default)]
        load: Option<f64>,
        tags: BTreeMap<String, u8>,
        free: Value,
    }

    #[test]
    fn names_types_and_requirement_come_from_the_struct() {
        let found: Vec<String> = params_of::<Params>()
            .iter()
            .map(|p| format!("{}{}:{}", p.name, if p.required { "*" } else { "" }, p.kind))
            .collect();
        assert_eq!(
            found,
            [
                "name*:string",
                "read_only:bool",
                "num_blocks*:u64",
                "mode*:enum(ro|rw)",
                "uuid:string",
                "paths*:[{dst}]",
                "load:number",
                "tags*:object",
                "free*:any"
            ]
        );
    }

    #[test]
    fn what_is_no_plain_struct_has_no_list() {
        assert_eq!(params_of::<BTreeMap<String, u8>>(), []);
        assert_eq!(params_of::<Value>(), []);
    }
}
