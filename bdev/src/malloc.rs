//! Malloc disk: a block device in memory. Pages exist from their first write on, and discard gives them back.

use std::sync::Arc;

use iobuf::Region;
use uuid::Uuid;

use crate::device::{Bdev, Channel, ChannelError, Info, OpSet};
use crate::io::{Completion, Completions, IoRequest, Op, Rejected, Status};
use crate::manager::{Error, Manager};

/// As `bdev_malloc_create` takes them.
#[derive(Clone, Debug)]
pub struct Params {
    /// Name; MallocN if absent.
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
pub struct Malloc {
    info: Info,
    blocks: u64,
    memory: Arc<Region>,
}

/// Zeroing is work of the submitting core; longer requests come in pieces of this, so that a core stays responsive.
const MAX_UNMAP_BYTES: u64 = 1 << 20;

/// Makes and registers one; returns its name.
///
/// # Errors
/// `Invalid`, `Exists`, `Memory`.
pub fn create(manager: &Arc<Manager>, params: Params) -> Result<String, Error> {
    let bytes = crate::device::check_size(params.num_blocks, params.block_size)?;
    let name = params.name.unwrap_or_else(|| manager.free_name("Malloc"));
    let info = Info {
        name: name.clone(),
        aliases: Vec::new(),
        product_name: "Malloc disk",
        uuid: params.uuid.unwrap_or_else(Uuid::new_v4),
        block_size: params.block_size,
        physical_block_size: params.physical_block_size.unwrap_or(params.block_size),
        native: OpSet::of(&[Op::Read, Op::Write, Op::WriteZeroes, Op::Discard]),
        native_fua: true,
        write_cache: false,
        read_only: false,
        volatile: true,
        discard_granularity: params.block_size.max(iobuf::PAGE_SIZE as u32),
        rotational: false,
        max_unmap_blocks: MAX_UNMAP_BYTES / u64::from(params.block_size),
        buffer_align: 1,
    };
    // Outside the registry: requests bring their own buffers, and registering would pin every page.
    let memory = Region::new(bytes as usize)?;
    manager.register(Arc::new(Malloc { info, blocks: params.num_blocks, memory }))?;
    Ok(name)
}

impl Bdev for Malloc {
    fn info(&self) -> &Info {
        &self.info
    }

    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        let shift = self.info.block_size.trailing_zeros();
        Ok(Box::new(MallocChannel { shift, memory: self.memory.clone(), done: Vec::with_capacity(64) }))
    }
}

struct MallocChannel {
    shift: u32,
    memory: Arc<Region>,
    done: Completions,
}

impl MallocChannel {
    fn copy(&self, r: &IoRequest) -> bool {
        let mut at = (r.lba << self.shift) as usize;
        r.segments.iter().all(|s| {
            let from = at;
            at += s.len as usize;
            // SAFETY: the submitter keeps `len` bytes at the segment's address valid until the completion
            // (`IoRequest::segments`), and they are not in the disk's memory, to which nobody has an address.
            unsafe {
                match r.op {
                    Op::Read => self.memory.read_to(from, s),
                    _ => self.memory.write_from(from, s),
                }
            }
        })
    }

    fn clear(&self, r: &IoRequest, free: bool) -> bool {
        self.memory.zero((r.lba << self.shift) as usize, (r.blocks << self.shift) as usize, free)
    }
}

impl Channel for MallocChannel {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        let inside = match request.op {
            Op::Read | Op::Write => self.copy(&request),
            Op::WriteZeroes => self.clear(&request, !request.flags.has(crate::Flags::NO_UNMAP)),
            Op::Discard => self.clear(&request, true),
            Op::Flush | Op::SecureErase | Op::Reset => {
                return Err(Rejected { request, status: Status::Unsupported });
            }
        };
        let status = if inside { Status::Ok } else { Status::OutOfRange };
        self.done.push(Completion { cookie: request.cookie, status });
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
