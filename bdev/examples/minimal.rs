//! A backend to copy from: a disk whose every byte is its own block number. Read-only.
//!
//! `cargo run -p bdev --example minimal`

use std::sync::Arc;

use bdev::{
    Bdev, Channel, ChannelError, Completion, Completions, Flags, Info, IoRequest, Manager, Mode, Op, OpSet,
    Rejected, Segments, Status,
};
use iobuf::{Region, Registry};

/// Control path, shared by all threads.
struct Numbers(Info);

impl Bdev for Numbers {
    fn info(&self) -> &Info {
        &self.0
    }

    fn blocks(&self) -> u64 {
        256
    }

    fn channel(self: Arc<Self>) -> Result<Box<dyn Channel>, ChannelError> {
        Ok(Box::new(NumbersChannel { done: Completions::new() }))
    }
}

/// Data path of one core. What arrives here has been checked.
struct NumbersChannel {
    done: Completions,
}

impl Channel for NumbersChannel {
    fn submit(&mut self, request: IoRequest) -> Result<(), Rejected> {
        let mut at = request.lba * 512;
        for segment in &request.segments {
            for i in 0..segment.len as usize {
                // SAFETY: inside the segment, which its submitter keeps valid until the completion.
                unsafe { segment.as_ptr().add(i).write((at / 512) as u8) };
                at += 1;
            }
        }
        // Never from within `submit`: completions come out of `poll`.
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let manager = Manager::new(Registry::new());
    manager.register(Arc::new(Numbers(Info {
        name: "numbers".into(),
        aliases: Vec::new(),
        product_name: "Numbers disk",
        uuid: uuid::Uuid::new_v4(),
        block_size: 512,
        physical_block_size: 512,
        native: OpSet::of(&[Op::Read]),
        native_fua: false,
        write_cache: false,
        read_only: true,
        volatile: false,
        discard_granularity: 0,
        rotational: false,
        max_unmap_blocks: u64::MAX,
        buffer_align: 1,
    })))?;
    let mut channel = manager.open("numbers", Mode::ReadOnly, Box::new(|_| ()))?.channel()?;
    let memory = Region::new(1024)?;
    // SAFETY: `memory` lives until the read below has completed.
    let segments = Segments::from_iter(unsafe { memory.segment(0, 1024) });
    let read = IoRequest { op: Op::Read, flags: Flags::NONE, lba: 41, blocks: 2, segments, cookie: 1 };
    channel.submit(read).map_err(|r| format!("{:?}", r.status))?;
    channel.kick();
    let mut done = Completions::new();
    while !channel.poll(&mut done) {}
    let mut bytes = [0; 2];
    assert!(memory.copy_out(511, &mut bytes));
    println!("{:?}: the blocks 41 and 42 meet as {bytes:?}", done[0].status);
    Ok(())
}
