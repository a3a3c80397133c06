//! What the responder owes as an answer. One packet is nearly always enough: every kind says what has been executed so
//! far.

use super::requester::NEVER;
use crate::Nanos;

/// AETH syndromes (IBTA 9.7.5.1.2, table 44).
pub(super) const ACK: u8 = 0x1f;
pub(super) const RNR_NAK: u8 = 0x20;
pub(super) const NAK_SEQUENCE: u8 = 0x60;
pub(super) const NAK_INVALID_REQUEST: u8 = 0x61;
pub(super) const NAK_REMOTE_ACCESS: u8 = 0x62;
pub(super) const NAK_REMOTE_OPERATION: u8 = 0x63;

/// Complete messages, and packets, after which an acknowledgement waits no longer. Linux rxe stops sending at 128
/// unacknowledged packets.
const MOST_MESSAGES: u32 = 16;
const MOST_PACKETS: u32 = 64;

/// The owed answer, and from when on.
pub(super) struct Owed {
    /// Syndrome and packet of a NAK; else it is an ACK of the newest executed packet.
    nak: Option<(u8, u64)>,
    due: Nanos,
    messages: u32,
    packets: u32,
    delay: Nanos,
}

impl Owed {
    pub(super) fn new(delay: Nanos) -> Self {
        Self { nak: None, due: NEVER, messages: 0, packets: 0, delay }
    }

    /// A packet was executed that asked for nothing; a NAK that was to say "not executed" is obsolete.
    pub(super) fn executed(&mut self) {
        self.nak = None;
        self.packets += 1;
    }

    /// The packet was the last of a message and asked for an acknowledgement.
    pub(super) fn message(&mut self, now: Nanos) {
        self.messages += 1;
        if self.messages >= MOST_MESSAGES || self.packets >= MOST_PACKETS {
            self.due = 0;
        } else {
            self.due = self.due.min(now + self.delay);
        }
    }

    /// An acknowledgement at the end of the batch.
    pub(super) fn now(&mut self) {
        self.due = 0;
    }

    /// A NAK at the end of the batch, in place of any acknowledgement.
    pub(super) fn nak(&mut self, syndrome: u8, seq: u64) {
        self.nak = Some((syndrome, seq));
        self.due = 0;
    }

    /// Anything owed becomes due.
    pub(super) fn hurry(&mut self) {
        if self.due != NEVER {
            self.due = 0;
        }
    }

    pub(super) fn due(&self) -> Nanos {
        self.due
    }

    /// Another packet acknowledges everything that was executed.
    pub(super) fn told(&mut self) {
        (self.messages, self.packets) = (0, 0);
        if self.nak.is_none() {
            self.due = NEVER;
        }
    }

    /// Takes the answer: a NAK's syndrome and packet, or none for an ACK. A sequence NAK that tells of progress comes
    /// after an ACK of it: Linux rxe heeds one sequence NAK only until the next ACK (`started_retry` in rxe_comp.c), and
    /// would wait for its timer at every other gap.
    pub(super) fn take(&mut self) -> Option<(u8, u64)> {
        if self.packets > 0 && matches!(self.nak, Some((NAK_SEQUENCE, _))) {
            self.told();
            return None;
        }
        let nak = self.nak.take();
        self.told();
        nak
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_wait_for_company_but_not_for_long() {
        let mut owed = Owed::new(20);
        assert_eq!(owed.due(), NEVER);
        owed.hurry();
        assert_eq!(owed.due(), NEVER, "nothing is owed");
        for i in 0..15 {
            owed.executed();
            owed.message(100 + i);
            assert_eq!(owed.due(), 120);
        }
        owed.executed();
        owed.message(119);
        assert_eq!(owed.due(), 0, "16 messages");
        assert_eq!(owed.take(), None);
        for _ in 0..64 {
            owed.executed();
        }
        assert_eq!(owed.due(), NEVER, "nobody asked");
        owed.message(0);
        assert_eq!(owed.due(), 0, "64 packets");
        owed.told();
        owed.message(7);
        assert_eq!(owed.due(), 27);
        owed.hurry();
        assert_eq!(owed.due(), 0);
    }

    #[test]
    fn nak_replaces_ack_until_the_packet_is_executed() {
        let mut owed = Owed::new(20);
        owed.now();
        owed.nak(NAK_SEQUENCE, 5);
        assert_eq!(owed.take(), Some((NAK_SEQUENCE, 5)));
        owed.nak(NAK_SEQUENCE, 5);
        owed.executed();
        assert_eq!((owed.due(), owed.take()), (0, None));
    }

    #[test]
    fn sequence_nak_follows_an_ack_of_what_was_executed() {
        let mut owed = Owed::new(20);
        owed.executed();
        owed.nak(NAK_SEQUENCE, 6);
        assert_eq!((owed.due(), owed.take()), (0, None), "the ACK");
        assert_eq!((owed.due(), owed.take()), (0, Some((NAK_SEQUENCE, 6))));
        assert_eq!(owed.due(), NEVER);
        owed.executed();
        owed.nak(RNR_NAK, 7);
        assert_eq!(owed.take(), Some((RNR_NAK, 7)), "others need no ACK");
        owed.executed();
        owed.nak(NAK_SEQUENCE, 8);
        owed.told();
        assert_eq!((owed.due(), owed.take()), (0, Some((NAK_SEQUENCE, 8))), "a READ response said it");
    }
}
