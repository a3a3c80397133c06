//! The target's name space: exports, bdevs with aliases, files below the search path, and clients that ask for anything.
//! A file lies below the search path and is what it says; a bdev that has an export is had by that only, whatever it
//! is called, and one without only where bdevs are offered; the same question has the same answer, also with more slashes.
#![no_main]

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rnbd_proto::open::{SearchPath, device_name};
use rnbd_proto::wire::MsgOpen;
use rnbd_target::rnbd::{Allow, Asking, By, Export, Exports, File, Found};
use rtrs_proto::handshake::parse_info_req;
use zerocopy::FromBytes;

/// Names that mean something, for all parts of the input.
const WORDS: [&str; 24] = [
    "disk",
    "pool",
    "d1",
    "link",
    "out",
    "loop",
    "up",
    "dirlink",
    "alice",
    "bob",
    "own",
    "M0",
    "M1",
    "store/vol",
    "6d3c",
    "..",
    ".",
    "/",
    "secret",
    "in",
    "%SESSNAME%",
    "odd",
    "d\u{fffd}",
    "gone",
];
/// Bdevs: own name, alias.
const BDEVS: [(&str, &str); 3] = [("M0", "store/vol"), ("M1", "6d3c"), ("disk", "own")];

// A folder of this name is made once and stays: it is always the same.
static TREE: LazyLock<PathBuf> = LazyLock::new(|| {
    use std::os::unix::ffi::OsStrExt;
    let dir = std::env::temp_dir().join("rnbd-fuzz-exports");
    let tree = dir.join("in");
    for folder in ["pool", "alice", "bob"] {
        std::fs::create_dir_all(tree.join(folder)).unwrap();
    }
    let odd = Path::new(std::ffi::OsStr::from_bytes(b"d\xff"));
    for file in
        ["disk", "pool/d1", "alice/own", "../secret", "d\u{fffd}"].map(Path::new).into_iter().chain([odd])
    {
        std::fs::write(tree.join(file), b"").unwrap();
    }
    let links = [("disk", "link"), ("../secret", "out"), ("loop", "loop"), ("..", "up"), ("pool", "dirlink")];
    let links = links.map(|(to, name)| (Path::new(to), name)).into_iter().chain([(odd, "odd")]);
    for (to, name) in links.chain([(Path::new("../alice/own"), "pool/own")]) {
        let _ = std::os::unix::fs::symlink(to, tree.join(name));
    }
    tree.canonicalize().unwrap()
});

/// Bytes of the input, zero at its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    /// Some bytes as they are, or words with slashes between.
    fn text(&mut self) -> String {
        let kind = self.byte();
        if kind >= 224 {
            let len = usize::from(self.byte());
            let bytes = self.0.split_off(..len.min(self.0.len())).unwrap_or_default();
            return String::from_utf8_lossy(bytes).into_owned();
        }
        if kind >= 216 {
            // Long ones.
            return WORDS[usize::from(self.byte()) % WORDS.len()].repeat(usize::from(self.byte()) * 8);
        }
        let count = kind % 4;
        let first = WORDS[usize::from(kind / 4) % WORDS.len()].to_owned();
        (0..count).fold(first, |text, _| {
            let byte = self.byte();
            let slash = if byte & 1 == 0 { "/" } else { "" };
            text + slash + WORDS[usize::from(byte >> 1) % WORDS.len()]
        })
    }

    fn addr(&mut self) -> IpAddr {
        match self.byte() {
            b if b < 128 => IpAddr::from([10, 0, 0, b & 3]),
            b if b < 192 => IpAddr::from([0, 0, 0, 0, 0, 0xffff, 0x0a00, u16::from(b & 3)]),
            b => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(b & 3)]),
        }
    }
}

fn own_name(name: &str) -> Option<String> {
    BDEVS.iter().find(|(own, alias)| *own == name || *alias == name).map(|(own, _)| (*own).to_owned())
}

fn allow(input: &mut Input) -> Vec<Allow> {
    (0..input.byte() % 3)
        .map(|_| {
            let bits = input.byte();
            Allow {
                session: (bits & 1 != 0).then(|| WORDS[8 + usize::from(bits >> 1 & 1)].into()),
                addr: (bits & 4 != 0).then(|| {
                    ["10.0.0.1", "10.0.0.0/24", "fd00::/8", "::ffff:10.0.0.2", "10.0.0.0/33", "x"]
                        [usize::from(bits >> 3) % 6]
                        .into()
                }),
            }
        })
        .collect()
}

/// The answer to somebody else's question: may `session` at `peer` have this?
fn is_allowed(export: &Export, session: &str, peer: IpAddr) -> bool {
    let matches = |a: &Allow| {
        let session = a.session.as_ref().is_none_or(|s| s == session);
        let addr = a.addr.as_ref().is_none_or(|a| match (a.as_str(), peer.to_canonical()) {
            ("10.0.0.1", IpAddr::V4(ip)) => ip.octets() == [10, 0, 0, 1],
            ("10.0.0.0/24", IpAddr::V4(ip)) => ip.octets()[..3] == [10, 0, 0],
            ("::ffff:10.0.0.2", IpAddr::V4(ip)) => ip.octets() == [10, 0, 0, 2],
            ("fd00::/8", IpAddr::V6(ip)) => ip.octets()[0] == 0xfd,
            _ => false,
        });
        session && addr
    };
    export.allow.is_empty() || export.allow.iter().any(matches)
}

fn check_bdev(exports: &Exports, name: &str, read_only: bool, by: &By, session: &str, peer: IpAddr) {
    let own = own_name(name).unwrap_or_else(|| name.to_owned());
    let same = |e: &&Export| own_name(&e.bdev_name).as_deref().unwrap_or(&e.bdev_name) == own;
    let mut about = exports.list().iter().filter(same).peekable();
    if about.peek().is_none() {
        assert!(!read_only && own_name(name).is_some(), "neither exported nor there");
        return assert!(*by == By::Name && exports.offers_bdevs(&own_name), "not offered");
    }
    let By::Export { allow, .. } = by else { panic!("past its exports") };
    assert!(about.clone().any(|e| e.allow == **allow));
    assert!(about.any(|e| e.read_only == read_only && is_allowed(e, session, peer)), "past its exports");
}

fn check_file(exports: &Exports, File { path, read_only, .. }: &File, session: &str) {
    assert!(exports.open_files && *read_only == exports.open_files_read_only);
    let base = Path::new(&exports.search_path.prefix(session)).canonicalize().unwrap();
    // The search path itself may be a link, which leads to the folder of the tree at most.
    assert!(
        path.starts_with(&base) && TREE.parent().is_some_and(|all| path.starts_with(all)),
        "leaves the search path"
    );
    assert!(path.canonicalize().unwrap() == *path && path.is_file() && path.to_str().is_some());
}

/// What a session may be called.
fn session_name(text: &str) -> Option<String> {
    let mut message = rtrs_proto::client::info_req("x")?;
    message.pathname.fill(0);
    let len = text.len().min(message.pathname.len());
    message.pathname[..len].copy_from_slice(&text.as_bytes()[..len]);
    parse_info_req(zerocopy::IntoBytes::as_bytes(&message)).ok().map(Into::into)
}

/// A device name goes through the message that brings it, if it fits.
fn on_the_wire(name: &str) -> Option<String> {
    let Some(message) = MsgOpen::request(0, name.as_bytes()) else { return Some(name.into()) };
    let (message, _) = MsgOpen::ref_from_prefix(zerocopy::IntoBytes::as_bytes(&message)).ok()?;
    device_name(message).ok().map(Into::into)
}

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    let bits = input.byte();
    let mut exports = Exports::default();
    exports.open_files = bits & 1 != 0;
    exports.offer_bdevs = (bits & 128 == 0).then_some(true);
    exports.open_files_read_only = bits & 128 == 0;
    // Files are looked for in the tree only.
    let search = match bits >> 1 & 3 {
        _ if exports.open_files => format!("{}/{}", TREE.display(), input.text().replace("..", "")),
        0 => "/".into(),
        _ => input.text(),
    };
    let Ok(search) = SearchPath::new(&search) else { return };
    exports.search_path = search;
    for _ in 0..bits >> 3 & 7 {
        let export = Export {
            device_path: input.text(),
            bdev_name: input.text(),
            read_only: input.byte() & 1 != 0,
            allow: allow(&mut input),
        };
        let before = exports.list().len();
        match exports.add(export) {
            Ok(()) => {
                let path = &exports.list()[before].device_path;
                assert!(
                    !path.is_empty()
                        && !path.starts_with('/')
                        && !path.ends_with('/')
                        && !path.contains("//")
                );
            }
            Err(e) => assert!(!e.to_string().is_empty() && exports.list().len() == before),
        }
    }
    if bits & 64 != 0 {
        let _ = exports.remove(&input.text());
    }
    while !input.0.is_empty() {
        let (Some(session), Some(name)) = (session_name(&input.text()), on_the_wire(&input.text())) else {
            continue;
        };
        let peer = input.addr();
        let asking = Asking { session: &session, peers: &[peer] };
        let ask = |name: &str| exports.resolve(&own_name, asking, name).map_err(|refused| refused.errno);
        let found = ask(&name);
        assert_eq!(ask(&name), found);
        match &found {
            Ok(Found::Bdev { name, read_only, by }) => {
                check_bdev(&exports, name, *read_only, by, &session, peer);
            }
            Ok(Found::File(file)) => check_file(&exports, file, &session),
            Err(errno) => assert!(errno.get() > 0),
        }
        assert!(found.is_err() || !name.contains(".."));
        // As long as it is not too long, more slashes change nothing.
        if exports.search_path.as_str().len() + name.len() < 1000 && !name.is_empty() {
            assert_eq!(ask(&format!("/{}", name.replace('/', "//"))), found, "{name:?}");
        }
    }
});
