//! SHA-256 and its text, the one way in which certificates, secrets and files are compared by what they hold.

use sha2::{Digest, Sha256};

/// The SHA-256 of some bytes.
pub fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String never fails");
        text
    })
}

/// 32 bytes from hex.
pub fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
        let nibble = |digit: u8| char::from(digit).to_digit(16);
        *byte = u8::try_from(nibble(pair[0])? * 16 + nibble(pair[1])?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_reads_back_and_nothing_else_does() {
        let bytes = digest(b"abc");
        assert!(hex(&bytes).starts_with("ba7816bf"));
        assert_eq!(unhex(&hex(&bytes)), Some(bytes));
        for text in ["", "ba", &"g".repeat(64), &"ä".repeat(32)] {
            assert_eq!(unhex(text), None);
        }
    }
}
