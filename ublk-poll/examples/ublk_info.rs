//! What the kernel says of a ublk device, asked through the crate libublk: a second opinion on what this crate told it.
//!
//! `ublk_info ID` prints one line of `key=value`; libublk complains on standard error that it has no file about the
//! device.

use libublk::ctrl::UblkCtrl;
use libublk::sys::ublk_params;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let id = std::env::args().nth(1).ok_or("usage: ublk_info ID")?.parse()?;
    let device = UblkCtrl::new_simple(id)?;
    let info = device.dev_info();
    let mut params = ublk_params { len: size_of::<ublk_params>() as u32, ..ublk_params::default() };
    device.get_params(&mut params)?;
    println!(
        "id={} state={} queues={} depth={} max_io={} flags={:#x} pid={} sectors={} block={} attrs={:#x}",
        info.dev_id,
        info.state,
        info.nr_hw_queues,
        info.queue_depth,
        info.max_io_buf_bytes,
        info.flags,
        info.ublksrv_pid,
        params.basic.dev_sectors,
        1_u32 << params.basic.logical_bs_shift,
        params.basic.attrs,
    );
    Ok(())
}
