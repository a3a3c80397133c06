//! The common name of a certificate, as access lists name clients.
//!
//! A certificate is a tree of tag, length, value (DER, X.690). Of it this reads the way to the subject and no more
//! (RFC 5280, section 4.1):
//!
//! ```text
//!   Certificate: SEQUENCE ─▶ TBSCertificate: SEQUENCE ─▶ [0] version?, serial, signature, issuer, validity, subject
//!   subject: SEQUENCE of SET of SEQUENCE { OID 2.5.4.3, string }
//! ```

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
const OID: u8 = 0x06;
/// UTF8String, PrintableString, IA5String: ASCII or more of it as UTF-8.
const STRINGS: [u8; 3] = [0x0c, 0x13, 0x16];
/// `id-at-commonName`, 2.5.4.3.
const COMMON_NAME: [u8; 3] = [0x55, 0x04, 0x03];

/// The common name of the subject of a certificate; `None` if it has none, or more than one, or cannot be read.
pub fn common_name(certificate: &[u8]) -> Option<&str> {
    let (certificate, _) = element(certificate, SEQUENCE)?;
    let (mut fields, _) = element(certificate, SEQUENCE)?;
    if fields.first() == Some(&VERSION) {
        fields = any(fields)?.2;
    }
    // Serial number, signature algorithm, issuer, validity.
    for _ in 0..4 {
        fields = any(fields)?.2;
    }
    let (mut subject, _) = element(fields, SEQUENCE)?;
    let mut found = None;
    while !subject.is_empty() {
        let (mut set, rest) = element(subject, SET)?;
        subject = rest;
        while !set.is_empty() {
            let (attribute, rest) = element(set, SEQUENCE)?;
            set = rest;
            let (oid, value) = element(attribute, OID)?;
            if *oid == COMMON_NAME {
                let (tag, text, _) = any(value)?;
                let text = STRINGS.contains(&tag).then(|| std::str::from_utf8(text).ok())??;
                // Two names are one too many to be known by.
                if found.replace(text).is_some() {
                    return None;
                }
            }
        }
    }
    found
}

/// The contents of the first element, which must have this tag, and what follows it.
fn element(data: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, contents, rest) = any(data)?;
    (found == tag).then_some((contents, rest))
}

/// Tag and contents of the first element, and what follows it. Lengths have up to four bytes, tags one.
fn any(data: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = data.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (len, rest) = match *first {
        short @ 0..=0x7f => (usize::from(short), rest),
        long @ 0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(long & 0x7f))?;
            (bytes.iter().fold(0usize, |n, b| n << 8 | usize::from(*b)), rest)
        }
        _ => return None,
    };
    let (contents, rest) = rest.split_at_checked(len)?;
    Some((*tag, contents, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let contents = parts.concat();
        let mut out = vec![tag];
        match contents.len() {
            n @ 0..=0x7f => out.push(n as u8),
            n => out.extend_from_slice(&[0x82, (n >> 8) as u8, n as u8]),
        }
        out.extend(contents);
        out
    }

    fn name(attributes: &[(&[u8], u8, &[u8])]) -> Vec<u8> {
        let sets: Vec<Vec<u8>> = attributes
            .iter()
            .map(|(oid, tag, text)| der(SET, &[&der(SEQUENCE, &[&der(OID, &[oid]), &der(*tag, &[text])])]))
            .collect();
        der(SEQUENCE, &sets.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    fn certificate(version: bool, subject: &[u8]) -> Vec<u8> {
        let version = if version { der(VERSION, &[&[2, 1, 2]]) } else { vec![] };
        let issuer = name(&[(&COMMON_NAME, 0x0c, b"the authority")]);
        let serial = der(2, &[&[1; 16]]);
        let padding = der(SEQUENCE, &[&[0x05, 0]]);
        let tbs = der(SEQUENCE, &[&version, &serial, &padding, &issuer, &padding, subject, &[0xff; 200]]);
        der(SEQUENCE, &[&tbs, &padding, &[3, 1, 0]])
    }

    #[test]
    fn the_subject_has_one_name() {
        let organisation: (&[u8], u8, &[u8]) = (&[0x55, 0x04, 0x0a], 0x0c, b"somebody");
        let cn = |tag, text| -> (&[u8], u8, &[u8]) { (&COMMON_NAME, tag, text) };
        for version in [false, true] {
            let one = certificate(version, &name(&[organisation, cn(0x13, b"client1")]));
            assert_eq!(common_name(&one), Some("client1"));
        }
        let utf8 = certificate(true, &name(&[cn(0x0c, "Gerät".as_bytes())]));
        assert_eq!(common_name(&utf8), Some("Gerät"));
        for none in [
            name(&[]),
            name(&[organisation]),
            name(&[cn(0x0c, b"one"), cn(0x0c, b"two")]),
            name(&[cn(0x1e, b"\0w\0i\0d\0e")]),
            name(&[cn(0x0c, b"\xff")]),
        ] {
            assert_eq!(common_name(&certificate(true, &none)), None);
        }
    }

    #[test]
    fn broken_bytes_have_no_name() {
        let whole = certificate(true, &name(&[(&COMMON_NAME, 0x0c, b"client1")]));
        for len in 0..whole.len() {
            assert_eq!(common_name(&whole[..len]), None, "{len}");
        }
        for i in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[i] ^= 0xff;
            // Whatever it says, it says it without a panic.
            let _ = common_name(&flipped);
        }
        assert_eq!(common_name(&[SEQUENCE, 0x84, 0xff, 0xff, 0xff, 0xff, 0]), None);
        assert_eq!(common_name(&[SEQUENCE, 0x80, 0, 0]), None, "no length is BER");
    }
}
