//! A set of public keys, as issuers publish it (JWK Set, RFC 7517).
//!
//! A set may have keys for other purposes, and of kinds that are not known here: those are passed over. A key that others
//! must not have is refused, as is a set without any key that a signature could be verified with.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::{Algorithm, KeyMaterial, VerifyingKey};

/// Longest set, bytes: large issuers' have about ten thousand.
pub const MAX_SET: usize = 64 * 1024;
/// Most keys of a set that are kept.
pub const MAX_KEYS: usize = 32;
/// Longest name of a key.
const MAX_ID: usize = 512;
/// Shortest and longest modulus of RSA, bytes: what signatures are verified with at all.
const RSA_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// Why a text is no set of keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwksError {
    /// Too long.
    #[error("{0} bytes are too many, at most {MAX_SET} are read")]
    TooLong(usize),
    /// It is no JSON with `keys`.
    #[error("it is no JSON object with a list 'keys'")]
    NotASet,
    /// Too many keys.
    #[error("{0} keys are too many, at most {MAX_KEYS} are taken")]
    TooMany(usize),
    /// It has what only the issuer may have.
    #[error("key {0} has a private part")]
    Private(usize),
    /// A key of a known kind, for signatures, is not well made.
    #[error("key {0} is not well made: {1}")]
    Malformed(usize, &'static str),
    /// None is of use.
    #[error("none of its keys can verify a signature (RSA of 2048 bits or more, P-256, P-384, Ed25519)")]
    NoKey,
}

/// What signatures can be verified with, of a set.
pub fn parse(text: &[u8]) -> Result<Vec<VerifyingKey>, JwksError> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Map<String, Value>>,
    }
    if text.len() > MAX_SET {
        return Err(JwksError::TooLong(text.len()));
    }
    let Set { keys } = serde_json::from_slice(text).map_err(|_| JwksError::NotASet)?;
    if keys.len() > MAX_KEYS {
        return Err(JwksError::TooMany(keys.len()));
    }
    let mut taken = vec![];
    for (place, key) in keys.iter().enumerate() {
        taken.extend(self::key(place, key)?);
    }
    if taken.is_empty() { Err(JwksError::NoKey) } else { Ok(taken) }
}

fn key(place: usize, key: &Map<String, Value>) -> Result<Option<VerifyingKey>, JwksError> {
    let text = |field: &str| key.get(field).and_then(Value::as_str);
    if key.contains_key("d") || key.contains_key("k") {
        return Err(JwksError::Private(place));
    }
    let for_more = key.get("key_ops").and_then(Value::as_array);
    let verifies = text("use").is_none_or(|it| it == "sig")
        && for_more.is_none_or(|it| it.iter().any(|operation| operation == "verify"));
    let algorithm = text("alg").map(Algorithm::parse);
    if !verifies || algorithm == Some(None) {
        return Ok(None);
    }
    let malformed = |what| JwksError::Malformed(place, what);
    let bytes = |field: &'static str| {
        let text = text(field).ok_or_else(|| malformed(field))?;
        BASE64_URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|_| malformed(field))
    };
    let coordinate = |field, length: usize| {
        bytes(field).and_then(|it| if it.len() == length { Ok(it) } else { Err(malformed(field)) })
    };
    let point = |length| Ok([vec![4], coordinate("x", length)?, coordinate("y", length)?].concat());
    let material = match (text("kty"), text("crv")) {
        (Some("RSA"), _) => {
            let plain = |field| {
                bytes(field).map(|it| it.iter().copied().skip_while(|byte| *byte == 0).collect::<Vec<u8>>())
            };
            let (n, e) = (plain("n")?, plain("e")?);
            if !RSA_BYTES.contains(&n.len()) {
                return Ok(None);
            }
            if e.is_empty() || e.len() > 8 {
                return Err(malformed("e"));
            }
            KeyMaterial::Rsa { n, e }
        }
        (Some("EC"), Some("P-256")) => KeyMaterial::P256(point(32)?),
        (Some("EC"), Some("P-384")) => KeyMaterial::P384(point(48)?),
        (Some("OKP"), Some("Ed25519")) => KeyMaterial::Ed25519(coordinate("x", 32)?),
        _ => return Ok(None),
    };
    let id = text("kid").unwrap_or_default().to_owned();
    if id.len() > MAX_ID {
        return Err(malformed("kid"));
    }
    let key = VerifyingKey { id, algorithm: algorithm.flatten(), material };
    // One that its own algorithm does not fit verifies nothing.
    Ok(Algorithm::ALL.iter().any(|it| key.fits(*it)).then_some(key))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn b64(bytes: &[u8]) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(bytes)
    }

    fn parsed(keys: &Value) -> Result<Vec<VerifyingKey>, JwksError> {
        parse(json!({ "keys": keys }).to_string().as_bytes())
    }

    #[test]
    fn what_can_verify_is_kept_and_the_rest_is_passed_over() {
        let (x, n) = (b64(&[1; 32]), b64(&[&[0][..], &[200; 256]].concat()));
        let rsa = json!({"kty": "RSA", "kid": "r", "alg": "PS256", "use": "sig", "n": n, "e": "AQAB", "x5c": ["-"]});
        let p256 = json!({"kty": "EC", "crv": "P-256", "x": x, "y": x, "key_ops": ["verify"]});
        let ed = json!({"kty": "OKP", "crv": "Ed25519", "x": x});
        let others = [
            json!({"kty": "EC", "crv": "secp256k1", "x": x, "y": x}),
            json!({"kty": "RSA", "use": "enc", "n": n, "e": "AQAB"}),
            json!({"kty": "RSA", "alg": "RSA-OAEP", "n": n, "e": "AQAB"}),
            json!({"kty": "RSA", "n": b64(&[200; 128]), "e": "AQAB"}),
            json!({"kty": "EC", "crv": "P-256", "alg": "RS256", "x": x, "y": x}),
            json!({"kty": "new"}),
        ];
        let mut all = vec![rsa, p256, ed];
        all.extend(others.iter().cloned());
        let keys = parsed(&all.into()).unwrap();
        assert_eq!(keys.iter().map(|key| key.id.as_str()).collect::<Vec<_>>(), ["r", "", ""]);
        let KeyMaterial::Rsa { n, e } = &keys[0].material else { panic!() };
        assert_eq!((n.len(), e.as_slice()), (256, &[1, 0, 1][..]));
        assert!(keys[0].fits(Algorithm::Ps256) && !keys[0].fits(Algorithm::Rs256));
        assert!(keys[1].fits(Algorithm::Es256) && !keys[1].fits(Algorithm::Rs256));
        assert_eq!(parsed(&others.to_vec().into()), Err(JwksError::NoKey));
    }

    #[test]
    fn what_is_no_set_of_public_keys_is_refused() {
        let x = b64(&[1; 32]);
        for (keys, expected) in [
            (json!([{"kty": "OKP", "crv": "Ed25519", "x": x, "d": x}]), JwksError::Private(0)),
            (json!([{"kty": "oct", "k": x}]), JwksError::Private(0)),
            (json!([{"kty": "EC", "crv": "P-256", "x": x, "y": "AA"}]), JwksError::Malformed(0, "y")),
            (json!([{"kty": "EC", "crv": "P-256", "x": "?", "y": x}]), JwksError::Malformed(0, "x")),
            (json!([{"kty": "RSA", "n": x}]), JwksError::Malformed(0, "e")),
            (json!(vec![json!({}); MAX_KEYS + 1]), JwksError::TooMany(MAX_KEYS + 1)),
            (json!([]), JwksError::NoKey),
            (json!({}), JwksError::NotASet),
            (json!([1]), JwksError::NotASet),
        ] {
            assert_eq!(parsed(&keys), Err(expected), "{keys}");
        }
        assert_eq!(parse(&[b' '; MAX_SET + 1]), Err(JwksError::TooLong(MAX_SET + 1)));
        assert_eq!(parse(b"<html>"), Err(JwksError::NotASet));
    }
}
