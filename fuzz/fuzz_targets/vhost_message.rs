//! vhost-user messages: any header, payload and number of descriptors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_poll::wire::{HEADER_LEN, Header, MAX_PAYLOAD, Message, parse};

fuzz_target!(|input: &[u8]| {
    let Some((head, rest)) = input.split_first_chunk::<HEADER_LEN>() else { return };
    let Some((fds, payload)) = rest.split_first() else { return };
    let Ok(header) = Header::parse(*head) else { return };
    let payload = &payload[..payload.len().min(MAX_PAYLOAD)];
    match parse(&header, payload, usize::from(*fds)) {
        Ok(Message::SetMemTable(list)) => assert_eq!(list.len(), usize::from(*fds)),
        Ok(Message::SetVringFd { index, has_fd, .. }) => {
            assert!(index < 256 && usize::from(has_fd) == usize::from(*fds));
        }
        Ok(Message::GetConfig { offset, size, .. }) => assert!(offset + size <= 4096),
        Ok(Message::SetConfig { offset, data }) => assert!(offset as usize + data.len() <= 4096),
        Ok(Message::SetVringAddr { desc, avail, used, .. }) => {
            assert!(desc % 16 == 0 && avail % 2 == 0 && used % 4 == 0);
        }
        Ok(_) | Err(_) => {}
    }
});
