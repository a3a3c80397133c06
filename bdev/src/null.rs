//! Null disk: accepts everything, keeps nothing. Shows the cost of all that is above a device.
//!
//! Reads leave the caller's memory as it is, as SPDK's null bdev does; nothing may be learnt from them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use crate::device::{Bdev, Channel, ChannelError, Info, OpSet};
use crate::io::{Completion, Completions, IoRequest, Op, Rejected, Status};
use crate::manager::{Error, Manager};

/// As `bdev_null_create` takes them.
#[derive(Clone, Debug)]
pub struct Params {
    /// Name; NullN if absent.
    pub name: Option<String>,
    /// Blocks, at least 1.
    pub num_blocks: u64,
    /// Bytes: a power of two, 512..=65536.
    pub block_size: u32,
    /// Bytes; `block_size` if absent.
    pub physical_block_size: Option<u32>,
    /// Random if absent.
    pub uuid: Option<Uuid>,
}

/// The backend.
#[derive(Debug)]
pub struct Null {
    info: Info,
    blocks: AtomicU64,
}

/// Makes and registers one; returns its name.
///
/// # Errors
/// `Invalid`, `Exists`.
pub fn create(manager: &Arc<Manager>, params: Params) -> Result<String, Error> {
    crate::device::check_size(params.num_blocks, params.block_size)?;
    let name = params.name.unwrap_or_else(|| manager.free_name("Null"));
    let info = Info {
        name: name.clone(),
        aliases: Vec::new(),
        product_name: "Null disk",
        uuid: params.uuid.unwrap_or_else(Uuid::new_v4),
        block_size: params.block_size,
        physical_block_size: params.physical_block_size.unwrap_or(params.block_size),
        native: OpSet::of(&[Op::Read, Op::Write, Op::WriteZeroes, Op::Discard]),
        native_fua: true,
        write_cache: false,
        read_only: false,
        volatile: false,
        discard_granularity: params.block_size,
        rotational: false,
        max_unmap_blocks: u64::MAX,
        buffer_align: 1,
    };
    manager.register(Arc::new(Null { info, blocks: AtomicU64::new(params.num_blocks) }))?;
    Ok(name)
}

/// Gives the null bdev `name` a size of `blocks` and tells its users.
///
/// # Errors
/// `NotFound`, `WrongKind`, `Invalid` for a size of 0 or one that does not fit.
pub fn resize(manager: &Arc<Manager>, name: &str, blocks: u64) -> Result<(), Error> {
    let null = manager.get_as::<Null>(name)?;
    crate::device::check_size(blocks, null.info.block_size)?;
    null.blocks.store(blocks, Ordering::Relaxed);
    manager.resized(name)
}

impl Bdev for Null {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        Ok(Box::new(NullChannel { done: Vec::with_capacity(64) }))
    }
}

struct NullChannel {
    done: Completions,
}

impl Channel for NullChannel {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        self.done.push(Completion { cookie: request.cookie, status: Status::Ok });
        Ok(())
    }

    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Completions) -> bool {
        let any = !self.done.is_empty();
        done.append(&mut self.done);
        any
    }

    fn ready(&self) -> bool {
        !self.done.is_empty()
    }
}
