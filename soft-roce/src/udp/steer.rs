//! Which socket of an address a packet goes to.

use std::io;
use std::os::fd::OwnedFd;

use super::sys::set_raw;

/// Queue pair numbers carry their engine's slot in these bits.
pub const SLOT_MASK: u32 = 0x7f;

/// Makes the sockets of `fd`'s SO_REUSEPORT group take packets by destination queue pair: number 1 goes to the socket
/// that was bound first, others to the one with index `QPN & 0x7f`. The program sees the UDP payload, which begins
/// with the BTH; a packet too short for it goes to the first socket, and an index without socket to any (by hash).
/// Needs no privilege. Source: `socket(7)`, SO_ATTACH_REUSEPORT_CBPF.
pub fn steer_by_qpn(fd: &OwnedFd) -> io::Result<()> {
    const LD_WORD_ABS: u16 = 0x20;
    const AND_IMM: u16 = 0x54;
    const JEQ_IMM: u16 = 0x15;
    const RET_IMM: u16 = 0x06;
    const RET_A: u16 = 0x16;
    let op = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    let mut program = [
        op(LD_WORD_ABS, 0, 4),
        op(AND_IMM, 0, 0xff_ffff),
        op(JEQ_IMM, 2, 1),
        op(AND_IMM, 0, SLOT_MASK),
        op(RET_A, 0, 0),
        op(RET_IMM, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // The kernel copies the program during the call.
    set_raw(fd, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF, &filter)
}
