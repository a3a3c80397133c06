//! Socket addresses in the kernel's form, as they go into and come out of `msg_name` without conversion.

/// A `sockaddr_in` or `sockaddr_in6` and its length.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address {
    bytes: [u8; Address::CAPACITY],
    /// Bytes used.
    pub len: u32,
}

impl Address {
    /// Bytes of the larger form.
    pub const CAPACITY: usize = size_of::<libc::sockaddr_in6>();

    /// Where the kernel reads or writes the address, [`Address::CAPACITY`] bytes.
    pub fn as_mut_ptr(&mut self) -> *mut libc::c_void {
        self.bytes.as_mut_ptr().cast()
    }
}
