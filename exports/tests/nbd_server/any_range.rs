//! Requests that are not whole blocks.

use super::*;

/// Numbers that look random (`xorshift64`), the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

impl Client {
    /// Writes, zeroes or trims, and waits for the answer.
    fn change(&mut self, command: u16, offset: u64, len: u32) {
        self.request(command, cmd_flag::FUA, 3, offset, len);
        assert_eq!(self.reply(), (3, 0), "{len} bytes at {offset}");
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        self.write(2, offset, data);
        assert_eq!(self.reply(), (2, 0), "{} bytes at {offset}", data.len());
    }
}

#[test]
fn what_was_written_is_read_and_nothing_else_has_changed() {
    let program = Program::start("0x1", 0, json!({}));
    let mut client = program.client();
    let mut model = vec![0_u8; 1 << 20];
    let mut numbers = Numbers(7);
    for round in 1..=400_u64 {
        let most = [8, 700, 40_000, 300_000][numbers.below(4) as usize];
        let len = 1 + numbers.below(most);
        let offset = numbers.below((1 << 20) - len);
        let range = offset as usize..(offset + len) as usize;
        match round % 4 {
            0 => {
                client.change(cmd::WRITE_ZEROES, offset, len as u32);
                model[range].fill(0);
            }
            1 => assert!(client.read_at(offset, len as u32) == model[range], "round {round}"),
            _ => {
                let data: Vec<u8> = (0..len).map(|i| (i + round) as u8).collect();
                client.put(offset, &data);
                model[range].copy_from_slice(&data);
            }
        }
    }
    assert!(client.read_at(0, 1 << 20) == model);
    program.shut_down();
    program.end();
}

#[test]
fn a_trim_leaves_what_is_not_a_whole_block() {
    let program = Program::start("0x1", 0, json!({}));
    let mut client = program.client();
    client.put(0, &[9; 4096]);
    client.change(cmd::TRIM, 1, 510);
    client.change(cmd::TRIM, 511, 2);
    assert_eq!(client.read_at(0, 4096), [9; 4096], "no whole block");
    client.change(cmd::TRIM, 511, 1026);
    assert_eq!(client.read_at(0, 4096), [vec![9; 512], vec![0; 1024], vec![9; 2560]].concat());
    // The edges are not the client's.
    for (offset, len) in [((1 << 20) - 1, 2), (u64::MAX, 1), (5, 0)] {
        client.request(cmd::READ, 0, 4, offset, len);
        assert_eq!(client.reply(), (4, 22), "{len} bytes at {offset}");
    }
    program.shut_down();
    program.end();
}

/// Each client has its own bytes of every block; a block that is written back with somebody's older bytes shows.
#[test]
fn clients_that_share_blocks_lose_nothing() {
    const CLIENTS: usize = 4;
    const DEPTH: u64 = 16;
    for cpumask in ["0x1", "0x3"] {
        let program = Program::start(cpumask, 1, json!({}));
        let write = |client: &mut Client, own: usize| {
            for round in 1..=8_u8 {
                for block in 0..DEPTH {
                    client.write(block, block * 512 + own as u64 * 100, &[round * 16 + own as u8; 100]);
                }
                for _ in 0..DEPTH {
                    assert_eq!(client.reply().1, 0);
                }
            }
        };
        std::thread::scope(|scope| {
            for own in 0..CLIENTS {
                let mut client = program.client();
                scope.spawn(move || write(&mut client, own));
            }
            // And one that changes them whole, before and behind: what is left are its last bytes.
            let mut whole = program.client();
            scope.spawn(move || {
                for round in 1..=20_u8 {
                    whole.write(0, DEPTH * 512, &[round; 512]);
                    whole.write(1, DEPTH * 512 + 100, &[200 + round; 100]);
                    let replies = [whole.reply(), whole.reply()];
                    assert!(replies.contains(&(0, 0)) && replies.contains(&(1, 0)));
                }
            });
        });
        let mut client = program.client();
        for block in 0..DEPTH {
            let bytes = client.read_at(block * 512, 512);
            for own in 0..CLIENTS {
                let right = [8 * 16 + own as u8; 100];
                assert_eq!(bytes[own * 100..][..100], right, "{cpumask}: block {block}, client {own}");
            }
            assert_eq!(bytes[400..], [0; 112]);
        }
        let bytes = client.read_at(DEPTH * 512, 512);
        assert!(bytes[..100] == [20; 100] && bytes[200..] == [20; 312], "{cpumask}: {bytes:?}");
        program.shut_down();
        program.end();
    }
}

/// A whole block that is written beside a change of one of its bytes comes out whole.
#[test]
fn a_whole_write_is_not_undone() {
    for cpumask in ["0x1", "0x3"] {
        let program = Program::start(cpumask, 1, json!({}));
        let (mut bytes, mut blocks) = (program.client(), program.client());
        for round in 1..=60_u64 {
            let fresh = round as u8;
            blocks.write(1, 0, &[fresh; 8192]);
            for block in 0..16 {
                bytes.write(block, block * 512 + 7, &[255]);
            }
            assert_eq!(blocks.reply(), (1, 0));
            (0..16).for_each(|_| assert_eq!(bytes.reply().1, 0));
            let mut now = blocks.read_at(0, 8192);
            for block in now.chunks_mut(512) {
                assert!(block[7] == fresh || block[7] == 255);
                block[7] = fresh;
            }
            assert!(now == [fresh; 8192], "{cpumask}: round {round}");
        }
        program.shut_down();
        program.end();
    }
}

#[test]
fn a_client_that_goes_leaves_no_place_taken() {
    let program = Program::start("0x3", 5, json!({}));
    for _ in 0..4 {
        let (mut goes, mut stays) = (program.client(), program.client());
        (0..8).for_each(|n| goes.write(n, n * 512 + 1, &[1; 512]));
        program.wait_for_writes(8);
        drop(goes);
        stays.put(3, &[5; 4096]);
        assert_eq!(stays.read_at(3, 4096), [5; 4096]);
        drop(stays);
        until("no connection", || program.connections().is_empty());
    }
    program.shut_down();
    program.end();
}

#[test]
fn an_edge_that_cannot_be_read_fails_the_write() {
    let program = Program::start("0x1", 0, json!({}));
    program.spoil();
    let mut client = program.client();
    let inject = json!({"name": "EE_slow", "io_type": "read", "error_type": "failure", "num": 1});
    program.call("bdev_error_inject_error", inject).unwrap();
    client.write(1, 100, &[1; 1000]);
    assert_eq!(client.reply(), (1, EIO));
    client.put(100, &[1; 1000]);
    assert_eq!(client.read_at(99, 1002), [vec![0], vec![1; 1000], vec![0]].concat());
    program.inject("failure");
    client.write(1, 100, &[2; 1000]);
    assert_eq!(client.reply(), (1, EIO));
    assert_eq!(client.read_at(99, 3), [0, 1, 1]);
    program.shut_down();
    program.end();
}
