//! SPDK's own JSON-RPC methods, through a socket pair of this process: it has no other interface to them.

use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use spdk_sys as sys;

use super::ffi;

/// When SPDK lets a method be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States {
    /// Before its subsystems are initialised.
    pub startup: bool,
    /// Afterwards.
    pub runtime: bool,
}

/// Of the method `name`; `None`: no linked module has it. Needs no running SPDK.
pub fn states_of(name: &str) -> Option<States> {
    let mut mask = 0;
    // SAFETY: a C string and a place for the answer. The list is complete before main, and does not change.
    let rc = unsafe { sys::spdk_rpc_get_method_state_mask(ffi::c_string(name).as_ptr(), &mut mask) };
    let has = |bit: u32| mask & bit != 0;
    (rc == 0).then(|| States { startup: has(sys::SPDK_RPC_STARTUP), runtime: has(sys::SPDK_RPC_RUNTIME) })
}

/// The largest request that SPDK takes. With more it closes the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes: more do not fit into its buffer (`SPDK_JSONRPC_RECV_BUF_SIZE`).
    pub bytes: usize,
    /// Numbers, texts, names, and both ends of lists (`SPDK_JSONRPC_MAX_VALUES`).
    pub values: usize,
}

/// Of the SPDK that is linked. Source: its `lib/jsonrpc/jsonrpc_internal.h`, which is not installed; v26.05 raised them.
pub fn limits() -> Limits {
    match (sys::SPDK_VERSION_MAJOR, sys::SPDK_VERSION_MINOR) >= (26, 5) {
        true => Limits { bytes: (256 << 10) - 1, values: 8192 },
        false => Limits { bytes: (32 << 10) - 1, values: 1024 },
    }
}

/// A JSON-RPC server of SPDK with one client, this program. What is called here runs on the calling thread, so all but
/// `rpc_get_methods` and `spdk_get_version` need the thread of the [`Runtime`](super::Runtime).
pub struct Port {
    server: *mut sys::spdk_rpc_server,
    stream: UnixStream,
    unsent: Vec<u8>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Port({} bytes unsent)", self.unsent.len())
    }
}

impl Port {
    /// # Errors
    /// The system's, about a socket in the folder for temporary files. Nobody else can reach it: its folder is private,
    /// and gone when this returns.
    pub fn open() -> std::io::Result<Self> {
        let folder = private_folder()?;
        let path = folder.join("rpc");
        let name = ffi::c_string(&path.to_string_lossy());
        // SAFETY: a C string; the server lives until `drop` closes it.
        let server = unsafe { sys::spdk_rpc_server_listen(name.as_ptr()) };
        let connected = if server.is_null() {
            Err(std::io::Error::other(format!(
                "SPDK cannot listen on {}: {}",
                path.display(),
                super::log::recent_errors()
            )))
        } else {
            UnixStream::connect(&path)
        };
        let stream = connected.and_then(|s| s.set_nonblocking(true).map(|()| s)).inspect_err(|_| {
            if !server.is_null() {
                // SAFETY: just made, and not used again.
                unsafe { sys::spdk_rpc_server_close(server) };
            }
        });
        if stream.is_ok() {
            // SAFETY: as above. The first poll accepts the connection, so that the names can go.
            unsafe { sys::spdk_rpc_server_accept(server) };
        }
        let _ = std::fs::remove_dir_all(&folder);
        Ok(Self { server, stream: stream?, unsent: Vec::new() })
    }

    /// Sends a request, whole or in the next turns. One that SPDK does not take ([`limits`]) costs the
    /// connection, and with it the answers to all others.
    pub fn send(&mut self, request: &[u8]) {
        self.unsent.extend_from_slice(request);
    }

    /// Moves requests and answers along; appends answers to `answers`, where they may end in the middle of one. Never
    /// blocks, except in methods of SPDK that do.
    ///
    /// # Errors
    /// SPDK closed the connection, as it does for what is no JSON, or too much of it. Nothing more will come; requests without
    /// an answer may have been carried out. Drop this, and open another one.
    pub fn turn(&mut self, answers: &mut Vec<u8>) -> std::io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        // SAFETY: open until `drop`.
        unsafe { sys::spdk_rpc_server_accept(self.server) };
        let mut piece = [0; 16 << 10];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(std::io::Error::other("SPDK closed its JSON-RPC connection")),
                Ok(n) => answers.extend_from_slice(&piece[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // SAFETY: from `spdk_rpc_server_listen`, closed once.
        unsafe { sys::spdk_rpc_server_close(self.server) };
    }
}

/// A new folder that only this user can enter.
fn private_folder() -> std::io::Result<PathBuf> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut builder = std::fs::DirBuilder::new();
    builder.mode(0o700);
    for _ in 0..100 {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("rnbd-spdk-{}-{n}", std::process::id()));
        match builder.create(&path) {
            Ok(()) => return Ok(path),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(std::io::Error::from(std::io::ErrorKind::AlreadyExists))
}
