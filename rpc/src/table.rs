//! What may be called, when, and with which parameters.

use crate::error::RpcError;
use crate::params::decode;
use crate::responder::Responder;
use crate::schema::{Param, params_of};
use crate::suggest::similar;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::ops::BitOr;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// What the application is doing. It goes from `Startup` to `Runtime` once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Before `framework_start_init` has finished.
    Startup,
    /// Afterwards.
    Runtime,
}

impl State {
    /// `"startup"` or `"runtime"`.
    pub fn name(self) -> &'static str {
        match self {
            State::Startup => "startup",
            State::Runtime => "runtime",
        }
    }
}

/// The states in which a method may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(u8);

impl States {
    /// Only before the framework is initialised.
    pub const STARTUP: States = States(1);
    /// Only afterwards.
    pub const RUNTIME: States = States(2);
    /// Always.
    pub const ANY: States = States(3);

    /// Whether `state` is among them.
    pub fn contains(self, state: State) -> bool {
        let bit = match state {
            State::Startup => States::STARTUP.0,
            State::Runtime => States::RUNTIME.0,
        };
        self.0 & bit != 0
    }
}

impl BitOr for States {
    type Output = States;

    fn bitor(self, other: States) -> States {
        States(self.0 | other.0)
    }
}

/// The parameter type of methods without any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoParams {}

type Handler<C> = Box<dyn Fn(&MethodTable<C>, &mut C, Option<&Value>, Responder) + Send + Sync>;

struct Method<C> {
    states: States,
    params: Vec<Param>,
    foreign: bool,
    handler: Handler<C>,
}

struct Alias {
    of: String,
    /// Whether its use has been logged.
    warned: AtomicBool,
}

/// One method, for documents and tests.
#[derive(Clone, Debug)]
pub struct MethodInfo<'a> {
    /// The name.
    pub name: &'a str,
    /// When it may be called.
    pub states: States,
    /// Its parameters in the order of the struct's fields.
    pub params: &'a [Param],
    /// Deprecated names of it.
    pub aliases: Vec<&'a str>,
    /// Somebody else's, with parameters that are not known here ([`MethodTable::foreign`]).
    pub foreign: bool,
}

/// The methods of an application whose handlers work on a `C`.
///
/// Register everything at start-up, then share the table (`Arc`) between the [`Server`](crate::Server), the
/// configuration and `C` itself; calling needs no `&mut`. `rpc_get_methods` is always there.
pub struct MethodTable<C> {
    methods: BTreeMap<String, Method<C>>,
    aliases: BTreeMap<String, Alias>,
    /// What the socket may call; `None` is everything.
    allowed: Option<HashSet<String>>,
    /// See [`MethodTable::explain_absent`].
    absent: Vec<(&'static str, &'static str)>,
    state: AtomicU8,
}

impl<C: 'static> Default for MethodTable<C> {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetMethods {
    #[serde(default)]
    current: bool,
    #[serde(default)]
    include_aliases: bool,
}

impl<C: 'static> MethodTable<C> {
    /// A table in state `Startup` that knows `rpc_get_methods` only.
    pub fn new() -> Self {
        let mut table = Self {
            methods: BTreeMap::new(),
            aliases: BTreeMap::new(),
            allowed: None,
            absent: Vec::new(),
            state: AtomicU8::new(States::STARTUP.0),
        };
        table.insert::<GetMethods>("rpc_get_methods", States::ANY, |table, _, p, r| {
            r.ok(table.names(p.current, p.include_aliases));
        });
        table
    }

    /// Adds a method. `P` is a struct with one field per parameter; keys that it does not have are refused. The
    /// handler keeps the responder as long as it likes.
    ///
    /// # Panics
    /// If the name is taken: a mistake in the program, found by its first start.
    pub fn method<P: DeserializeOwned + 'static>(
        &mut self,
        name: &str,
        states: States,
        handler: impl Fn(&mut C, P, Responder) + Send + Sync + 'static,
    ) {
        self.insert(name, states, move |_, cx, params, responder| handler(cx, params, responder));
    }

    /// Adds a method that answers at once.
    ///
    /// # Panics
    /// See [`MethodTable::method`].
    pub fn method_sync<P: DeserializeOwned + 'static, R: Serialize>(
        &mut self,
        name: &str,
        states: States,
        handler: impl Fn(&mut C, P) -> Result<R, RpcError> + Send + Sync + 'static,
    ) {
        self.insert(name, states, move |_, cx, params, responder| responder.reply(handler(cx, params)));
    }

    /// Adds a method that takes no parameters: `{}` and `[]` are let pass, anything else is refused in SPDK's words.
    ///
    /// # Panics
    /// See [`MethodTable::method`].
    pub fn method_without_params(
        &mut self,
        name: &str,
        states: States,
        handler: impl Fn(&mut C, Responder) + Send + Sync + 'static,
    ) {
        self.insert::<NoParams>(name, states, move |_, cx, _, responder| handler(cx, responder));
    }

    /// Adds a method of another program, or of a library with a JSON-RPC of its own: parameters are handed over as they are,
    /// for it to check.
    ///
    /// # Panics
    /// See [`MethodTable::method`].
    pub fn foreign(
        &mut self,
        name: &str,
        states: States,
        handler: impl Fn(&mut C, Option<&Value>, Responder) + Send + Sync + 'static,
    ) {
        self.assert_free(name);
        let handler: Handler<C> = Box::new(move |_, cx, params, responder| handler(cx, params, responder));
        self.methods.insert(name.to_owned(), Method { states, params: Vec::new(), foreign: true, handler });
    }

    /// Adds a deprecated name for `of`, whose first use is logged.
    ///
    /// # Panics
    /// If `of` is not registered or `name` is.
    pub fn alias(&mut self, name: &str, of: &str) {
        assert!(self.methods.contains_key(of), "alias '{name}' of unknown method '{of}'");
        self.assert_free(name);
        self.aliases.insert(name.to_owned(), Alias { of: of.to_owned(), warned: AtomicBool::new(false) });
    }

    fn insert<P: DeserializeOwned + 'static>(
        &mut self,
        name: &str,
        states: States,
        handler: impl Fn(&MethodTable<C>, &mut C, P, Responder) + Send + Sync + 'static,
    ) {
        self.assert_free(name);
        let params = params_of::<P>();
        let accepted: Vec<&'static str> = params.iter().map(|param| param.name).collect();
        let takes_none = std::any::TypeId::of::<P>() == std::any::TypeId::of::<NoParams>();
        let canonical = name.to_owned();
        let handler: Handler<C> = Box::new(move |table, cx, params, responder| {
            if takes_none && params.is_some_and(|params| !is_empty(params)) {
                return responder.err(no_params(&canonical));
            }
            match decode::<P>(responder.method(), params, &accepted) {
                Ok(params) => handler(table, cx, params, responder),
                Err(error) => responder.err(error),
            }
        });
        self.methods.insert(name.to_owned(), Method { states, params, foreign: false, handler });
    }

    fn assert_free(&self, name: &str) {
        let taken = self.methods.contains_key(name) || self.aliases.contains_key(name);
        assert!(!taken, "method '{name}' is registered twice");
    }

    /// Restricts what [`MethodTable::call_remote`] may call (`--rpcs-allowed`). Calls of the program itself, such as
    /// those of its configuration file, are not restricted.
    ///
    /// # Errors
    /// The names that no method has; nothing has changed then.
    pub fn set_allowed<S: AsRef<str>>(&mut self, names: &[S]) -> Result<(), Vec<String>> {
        let unknown: Vec<String> = names
            .iter()
            .map(AsRef::as_ref)
            .filter(|name| self.find(name).is_none())
            .map(str::to_owned)
            .collect();
        if !unknown.is_empty() {
            return Err(unknown);
        }
        self.allowed = Some(names.iter().map(|name| name.as_ref().to_owned()).collect());
        Ok(())
    }

    /// The present state.
    pub fn state(&self) -> State {
        if self.state.load(Ordering::Acquire) == States::STARTUP.0 { State::Startup } else { State::Runtime }
    }

    /// Sets the state; the application does so when initialisation is complete.
    pub fn set_state(&self, state: State) {
        let value = match state {
            State::Startup => States::STARTUP.0,
            State::Runtime => States::RUNTIME.0,
        };
        self.state.store(value, Ordering::Release);
    }

    /// The states in which `name` (or what it is an alias of) may be called.
    pub fn states_of(&self, name: &str) -> Option<States> {
        self.find(name).map(|(_, method)| method.states)
    }

    /// The method whose name is most similar to `name`, if it looks like a slip of the pen.
    pub fn similar(&self, name: &str) -> Option<&str> {
        similar(name, self.methods.keys().map(String::as_str))
    }

    /// Says of methods that begin with `prefix` and are not there why they are not.
    pub fn explain_absent(&mut self, prefix: &'static str, why: &'static str) {
        self.absent.push((prefix, why));
    }

    /// What [`MethodTable::explain_absent`] said of such a method.
    pub fn why_absent(&self, name: &str) -> Option<&'static str> {
        self.absent.iter().find(|(prefix, _)| name.starts_with(prefix)).map(|(_, why)| *why)
    }

    /// All methods in alphabetical order.
    pub fn methods(&self) -> impl Iterator<Item = MethodInfo<'_>> {
        self.methods.iter().map(|(name, method)| MethodInfo {
            name,
            states: method.states,
            params: &method.params,
            foreign: method.foreign,
            aliases: self.aliases.iter().filter(|(_, a)| a.of == *name).map(|(n, _)| n.as_str()).collect(),
        })
    }

    /// Calls `method` and answers through `responder`, with an error if it is unknown, not for the present state or
    /// called with wrong parameters.
    pub fn call(&self, cx: &mut C, method: &str, params: Option<&Value>, responder: Responder) {
        let Some((name, found)) = self.find(method) else {
            let error = RpcError::method_not_found(method, self.similar(method));
            return responder.err(match self.why_absent(method) {
                Some(why) => {
                    RpcError { message: format!("Method not found: '{method}'; {why}"), ..error }.hint(why)
                }
                None => error,
            });
        };
        if name != method {
            self.warn_deprecated(method, name);
        }
        let state = self.state();
        if !found.states.contains(state) {
            return responder.err(RpcError::wrong_state(method, state));
        }
        (found.handler)(self, cx, params, responder);
    }

    /// Like [`MethodTable::call`], for callers to whom the allow-list applies.
    pub fn call_remote(&self, cx: &mut C, method: &str, params: Option<&Value>, responder: Responder) {
        if self.is_allowed(method) {
            self.call(cx, method, params, responder);
        } else {
            let error = RpcError::method_not_found(method, None);
            responder.err(match self.find(method) {
                Some(_) => error.hint("not among the methods of --rpcs-allowed"),
                None => error,
            });
        }
    }

    fn is_allowed(&self, name: &str) -> bool {
        match &self.allowed {
            None => true,
            Some(names) => {
                names.contains(name) || self.aliases.get(name).is_some_and(|alias| names.contains(&alias.of))
            }
        }
    }

    fn find(&self, name: &str) -> Option<(&str, &Method<C>)> {
        let name = self.aliases.get(name).map_or(name, |alias| &alias.of);
        self.methods.get_key_value(name).map(|(name, method)| (name.as_str(), method))
    }

    fn warn_deprecated(&self, alias: &str, of: &str) {
        if self.aliases.get(alias).is_some_and(|alias| !alias.warned.swap(true, Ordering::Relaxed)) {
            tracing::warn!(method = alias, "RPC {alias} is deprecated, use {of} instead");
        }
    }

    /// `rpc_get_methods`: what may be called through the socket.
    fn names(&self, current: bool, include_aliases: bool) -> Vec<&str> {
        let state = self.state();
        let aliases =
            self.aliases.iter().filter(|_| include_aliases).map(|(name, a)| (name, &self.methods[&a.of]));
        self.methods
            .iter()
            .chain(aliases)
            .filter(|(name, method)| self.is_allowed(name) && (!current || method.states.contains(state)))
            .map(|(name, _)| name.as_str())
            .collect()
    }
}

fn is_empty(params: &Value) -> bool {
    match params {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

fn no_params(method: &str) -> RpcError {
    RpcError::invalid_params(format!("{method} requires no parameters"))
        .hint("leave out params; accepted parameters: none")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::responder::Outcome;
    use serde_json::json;
    use std::sync::mpsc;

    #[derive(Deserialize)]
    struct Add {
        a: u32,
        #[serde(default)]
        b: u32,
    }

    fn table() -> MethodTable<u32> {
        let mut table = MethodTable::new();
        table.method::<Add>("add", States::RUNTIME, |total, p, r| {
            *total += p.a + p.b;
            r.ok(*total);
        });
        table.method_sync::<NoParams, _>("options", States::STARTUP, |_, _| Ok(true));
        table.method_without_params("version", States::STARTUP | States::RUNTIME, |_, r| r.ok("1"));
        table.alias("plus", "add");
        table
    }

    #[test]
    fn foreign_methods_get_their_parameters_as_they_are() {
        let mut table = table();
        table.foreign("elsewhere", States::RUNTIME, |_, p, r| r.ok(p));
        assert_eq!(call(&table, "elsewhere", json!({})).unwrap_err().code, crate::code::INVALID_STATE);
        table.set_state(State::Runtime);
        for params in [json!({"any": [1, {"thing": null}]}), json!([1]), Value::Null] {
            assert_eq!(call(&table, "elsewhere", params.clone()).unwrap(), params);
        }
        assert!(table.methods().any(|m| m.foreign && m.name == "elsewhere"));
    }

    fn call(table: &MethodTable<u32>, method: &str, params: Value) -> Result<Value, RpcError> {
        let (tx, rx) = mpsc::channel::<Outcome>();
        let params = Some(&params).filter(|params| !params.is_null());
        table.call_remote(&mut 1, method, params, Responder::new(method, move |o| tx.send(o).unwrap()));
        rx.recv().unwrap().map(|reply| reply.to_value())
    }

    #[test]
    fn typed_call() {
        let table = table();
        table.set_state(State::Runtime);
        assert_eq!(call(&table, "add", json!({"a": 2, "b": 3})), Ok(json!(6)));
        assert_eq!(call(&table, "plus", json!({"a": 2})), Ok(json!(3)));
        let error = call(&table, "plus", json!({"c": 2})).unwrap_err();
        assert_eq!(error.message, "plus: unknown parameter 'c'; accepted: a, b");
    }

    #[test]
    fn states_are_enforced_with_the_texts_of_spdk() {
        let table = table();
        let error = call(&table, "add", json!({"a": 2})).unwrap_err();
        assert_eq!(
            (error.code, error.message.as_str()),
            (-1, "Method may only be called after framework is initialized using framework_start_init RPC.")
        );
        assert_eq!(error.data.unwrap()["state"], "startup");
        assert_eq!(call(&table, "options", Value::Null), Ok(json!(true)));
        table.set_state(State::Runtime);
        let error = call(&table, "options", Value::Null).unwrap_err();
        assert_eq!(
            (error.code, error.message.as_str()),
            (
                -1,
                "Method may only be called before framework is initialized. Use --wait-for-rpc command line \
                 parameter and then issue this RPC before the framework_start_init RPC."
            )
        );
    }

    #[test]
    fn methods_without_parameters_refuse_any() {
        let table = table();
        for params in [Value::Null, json!({}), json!([])] {
            assert_eq!(call(&table, "version", params), Ok(json!("1")));
        }
        for method in ["version", "options"] {
            let error = call(&table, method, json!({"x": 1})).unwrap_err();
            assert_eq!(error.code, -32602);
            assert_eq!(error.message, format!("{method} requires no parameters"));
        }
    }

    #[test]
    fn unknown_method_gets_a_suggestion() {
        let error = call(&table(), "versoin", Value::Null).unwrap_err();
        assert_eq!(error.code, -32601);
        assert_eq!(error.message, "Method not found: 'versoin'; did you mean 'version'?");
    }

    #[test]
    fn absent_methods_are_explained() {
        let mut table = table();
        table.explain_absent("vers_", "built without");
        let error = call(&table, "vers_ion", Value::Null).unwrap_err();
        assert_eq!(
            (error.code, error.message.as_str()),
            (-32601, "Method not found: 'vers_ion'; built without")
        );
    }

    #[test]
    fn get_methods_follows_state_aliases_and_allow_list() {
        let mut table = table();
        let names = |table: &_, params| call(table, "rpc_get_methods", params).unwrap();
        assert_eq!(names(&table, Value::Null), json!(["add", "options", "rpc_get_methods", "version"]));
        assert_eq!(
            names(&table, json!({"current": true, "include_aliases": true})),
            json!(["options", "rpc_get_methods", "version"])
        );
        assert_eq!(
            names(&table, json!({"current": false, "include_aliases": true})),
            json!(["add", "options", "rpc_get_methods", "version", "plus"])
        );
        assert_eq!(table.set_allowed(&["add", "ad"]), Err(vec!["ad".to_owned()]));
        table.set_allowed(&["add", "rpc_get_methods"]).unwrap();
        assert_eq!(names(&table, Value::Null), json!(["add", "rpc_get_methods"]));
        assert_eq!(call(&table, "version", Value::Null).unwrap_err().code, -32601);
        table.set_state(State::Runtime);
        assert_eq!(call(&table, "plus", json!({"a": 1})), Ok(json!(2)));
    }

    #[test]
    fn methods_lists_parameters() {
        let table = table();
        let add = table.methods().find(|m| m.name == "add").unwrap();
        assert_eq!(add.aliases, ["plus"]);
        let params: Vec<_> = add.params.iter().map(|p| (p.name, p.required)).collect();
        assert_eq!(params, [("a", true), ("b", false)]);
    }

    #[test]
    #[should_panic(expected = "registered twice")]
    fn names_are_unique() {
        table().alias("version", "add");
    }
}
