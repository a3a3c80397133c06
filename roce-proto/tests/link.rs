//! Two queue pairs through a network that loses, repeats and reorders packets, with programs at both ends that do not
//! always run: whatever is sent arrives once, in order, with the right bytes, in bounded time.

mod sim;

use proptest::prelude::*;
use roce_proto::rc::{Config, Op};
use roce_proto::{Counter, Psn};
use sim::{AREA, BASE, Habits, Message, Network, READ_KEY, WRITE_KEY, World};

const SECOND: u64 = 1_000_000_000;

fn message(mtu: u32) -> impl Strategy<Value = Message> {
    let len = prop_oneof![
        1 => Just(0),
        3 => 1..mtu,
        2 => (1u32..6).prop_map(move |n| n * mtu),
        2 => 1..=20 * mtu.min(2048),
        1 => 1..=40 * mtu.min(1024),
    ];
    (0u8..6, len, any::<bool>(), any::<u32>(), any::<u64>()).prop_map(|(kind, len, signaled, word, place)| {
        let va = BASE + place % (AREA as u64 - u64::from(len) + 1);
        let op = match kind {
            0 => Op::Send,
            1 => Op::SendImm(word),
            2 => Op::SendInvalidate(word),
            3 => Op::Write { va, rkey: if len == 0 { word } else { WRITE_KEY } },
            4 => Op::WriteImm { va, rkey: WRITE_KEY, imm: word },
            _ => Op::Read { va, rkey: READ_KEY },
        };
        Message { op, len, signaled }
    })
}

fn script(mtu: u32, most: usize) -> impl Strategy<Value = Vec<Message>> {
    prop::collection::vec(message(mtu), 0..most).prop_map(|mut script| {
        if let Some(last) = script.last_mut() {
            last.signaled = true;
        }
        script
    })
}

fn psn() -> impl Strategy<Value = Psn> {
    prop_oneof![(0xff_ffc0u32..0x100_0040).prop_map(Psn::new), any::<u32>().prop_map(Psn::new)]
}

fn habits() -> impl Strategy<Value = Habits> {
    let depths = (1u32..40, 1u32..20);
    (0u64..20_000, 0u32..20, 0u64..30_000_000, prop_oneof![Just(1u64), 1u64..3_000_000], 0u32..200, depths)
        .prop_map(|(turn, pauses, pause, repost, busy_socket, (sq_depth, rq_depth))| Habits {
            turn,
            pauses,
            pause,
            repost,
            busy_socket,
            sq_depth,
            rq_depth,
        })
}

fn network() -> impl Strategy<Value = Network> {
    let rate = || prop_oneof![3 => Just(0u32), 2 => 1u32..20, 1 => 20u32..150];
    (rate(), rate(), rate(), 500u64..200_000, 20_000usize..1_000_000).prop_map(
        |(loss, duplication, reordering, delay, buffer)| Network {
            loss,
            duplication,
            reordering,
            delay,
            buffer,
        },
    )
}

fn configs(mtu: u32) -> impl Strategy<Value = [Config; 2]> {
    (psn(), psn(), [1u8..17, 1u8..17], 0u32..300_000, 0u32..100_000, 1u8..14).prop_map(
        move |(a, b, reads, max_inflight, initial_inflight, min_rnr_timer)| {
            let config = |send, recv, (serve, issue)| Config {
                serve_reads: serve,
                issue_reads: issue,
                max_inflight,
                initial_inflight,
                min_rnr_timer,
                ..Config::new(mtu, 7, send, recv)
            };
            [config(a, b, (reads[0], reads[1])), config(b, a, (reads[1], reads[0]))]
        },
    )
}

fn world() -> impl Strategy<Value = (u64, Network, [Vec<Message>; 2], [Config; 2], [Habits; 2])> {
    (8u32..13).prop_flat_map(|shift| {
        let mtu = 1 << shift;
        (any::<u64>(), network(), [script(mtu, 60), script(mtu, 60)], configs(mtu), [habits(), habits()])
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_message_arrives_once_and_in_order((seed, network, scripts, configs, habits) in world()) {
        let mut world = World::new(seed, network, scripts, configs, habits);
        prop_assert!(world.run(600 * SECOND), "not done after {} s", world.now / SECOND);
        world.check();
    }
}

fn clean() -> (Network, Habits, Config) {
    let network = Network { loss: 0, duplication: 0, reordering: 0, delay: 10_000, buffer: usize::MAX };
    let habits =
        Habits { turn: 1_000, pauses: 0, pause: 0, repost: 1, busy_socket: 0, sq_depth: 128, rq_depth: 128 };
    (network, habits, Config::new(4096, 7, Psn::new(5), Psn::new(5)))
}

fn writes(n: u32, len: u32) -> Vec<Message> {
    let op = |i| Op::WriteImm { va: BASE, rkey: WRITE_KEY, imm: i };
    (0..n).map(|i| Message { op: op(i), len, signaled: true }).collect()
}

#[test]
fn a_clean_network_sees_no_repeats_and_few_acknowledgements() {
    let (network, habits, config) = clean();
    let mut world = World::new(1, network, [writes(1000, 100), vec![]], [config; 2], [habits; 2]);
    let acknowledgements = std::rc::Rc::new(std::cell::Cell::new(0));
    let count = acknowledgements.clone();
    world.drop_if = Box::new(move |_, headers| {
        count.set(count.get() + u32::from(headers.opcode == roce_proto::Opcode::Acknowledge));
        false
    });
    assert!(world.run(SECOND));
    world.check();
    assert_eq!(world.count(Counter::Retransmits) + world.count(Counter::Timeouts), 0);
    assert!(acknowledgements.get() <= 1000 / 10, "{} acknowledgements", acknowledgements.get());
}

#[test]
fn a_slow_receiver_with_a_small_buffer_slows_the_sender_down_but_no_more() {
    let (network, habits, config) = clean();
    // As in Linux by default: 208 KiB. The receiver gets to 64 packets per ms; the sender could do far more.
    let network = Network { buffer: 208 << 10, ..network };
    let slow = Habits { turn: 1_000_000, ..habits };
    let mut world = World::new(1, network, [writes(400, 128 << 10), vec![]], [config; 2], [habits, slow]);
    assert!(world.run(10 * SECOND));
    world.check();
    let (packets, repeats) = (400 * 32, world.count(Counter::Retransmits));
    assert!(repeats < packets / 4, "{repeats} repeats of {packets} packets");
    // 32 packets per turn would be the best for a window that must fit into the buffer.
    assert!(world.now < 2 * SECOND, "{} ms", world.now / 1_000_000);
}

#[test]
fn one_per_cent_of_loss_costs_no_timeout_per_loss() {
    let (network, habits, config) = clean();
    let network = Network { loss: 10, ..network };
    let mut world = World::new(3, network, [writes(400, 64 << 10), vec![]], [config; 2], [habits; 2]);
    assert!(world.run(10 * SECOND));
    world.check();
    let (losses, timeouts) = (world.count(Counter::SeqNakReceived), world.count(Counter::Timeouts));
    assert!(losses > 40, "{losses} losses");
    assert!(timeouts < losses / 5, "{timeouts} timeouts for {losses} losses");
}

#[test]
fn a_peer_that_pauses_is_waited_for() {
    let (network, habits, config) = clean();
    let pausing = Habits { pauses: 20, pause: 50_000_000, ..habits };
    let network = Network { buffer: 208 << 10, ..network };
    let mut world = World::new(9, network, [writes(500, 8192), writes(500, 8192)], [config; 2], [pausing; 2]);
    assert!(world.run(30 * SECOND));
    world.check();
}
