//! One token (JWT, RFC 7519, signed as of RFC 7515, section 3.1): its parts, its signature, its claims.
//!
//! What it says of itself counts for nothing until a key of its issuer has verified it; which algorithm is used is the key's
//! business and not the token's alone (RFC 8725, sections 2.1 and 3.1).

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::signature::{self, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value};

use super::Claims;
use crate::{
    model::{Algorithm, KeyMaterial, TokenIssuer, VerifyingKey},
    refusal::Reason,
};

/// Longest token, bytes.
pub const MAX_TOKEN: usize = 16 * 1024;
/// How far an issuer's clock and ours may be apart, seconds.
pub const LEEWAY: i64 = 60;
/// Most keys that a signature is tried with, where neither token nor keys say which it is.
const MOST_TRIED: usize = 4;

/// A token of which nothing is verified.
#[derive(Debug)]
pub(super) struct Token<'a> {
    algorithm: Option<Algorithm>,
    key: Option<String>,
    claims: Map<String, Value>,
    /// What is signed.
    signed: &'a str,
    signature: Vec<u8>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<IgnoredAny>,
}

impl<'a> Token<'a> {
    /// Takes it apart.
    pub(super) fn parse(text: &'a str) -> Result<Self, Reason> {
        let malformed = || Reason::TokenMalformed;
        if text.len() > MAX_TOKEN {
            return Err(malformed());
        }
        let (signed, signature) = text.rsplit_once('.').ok_or_else(malformed)?;
        let (header, claims) = signed.split_once('.').ok_or_else(malformed)?;
        let decoded = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| malformed());
        let Header { alg, kid, crit } = serde_json::from_slice(&decoded(header)?).map_err(|_| malformed())?;
        if crit.is_some() {
            // What has to be understood is not (RFC 7515, section 4.1.11).
            return Err(malformed());
        }
        let claims = serde_json::from_slice(&decoded(claims)?).map_err(|_| malformed())?;
        let algorithm = Algorithm::parse(&alg);
        Ok(Self { algorithm, key: kid, claims, signed, signature: decoded(signature)? })
    }

    /// Who it says has issued it.
    pub(super) fn issuer(&self) -> Option<&str> {
        self.claims.get("iss").and_then(Value::as_str)
    }

    /// Whether it is a token of this issuer, for one of its audiences, now.
    pub(super) fn verify(&self, issuer: &TokenIssuer, now: i64) -> Result<Claims, Reason> {
        if self.issuer() != Some(&issuer.issuer) {
            return Err(Reason::TokenIssuer);
        }
        self.is_signed(&issuer.keys)?;
        self.is_of_now(now)?;
        let is_ours = |audience: &Value| {
            audience.as_str().is_some_and(|it| issuer.audiences.iter().any(|own| own == it))
        };
        let for_us = match self.claims.get("aud") {
            Some(Value::Array(all)) => all.iter().any(is_ours),
            Some(one) => is_ours(one),
            None => false,
        };
        if for_us { Ok(Claims::new(self.claims.clone())) } else { Err(Reason::TokenAudience) }
    }

    fn is_signed(&self, keys: &[VerifyingKey]) -> Result<(), Reason> {
        let algorithm = self.algorithm.ok_or(Reason::TokenAlgorithm)?;
        let named = |name: &str| keys.iter().filter(|key| key.id == name).collect::<Vec<_>>();
        let candidates = match &self.key {
            Some(name) if !name.is_empty() => {
                let found = named(name);
                if found.is_empty() { named("") } else { found }
            }
            _ => keys.iter().collect(),
        };
        if candidates.is_empty() {
            return Err(Reason::TokenKeyUnknown);
        }
        let mut fitting = candidates.into_iter().filter(|key| key.fits(algorithm)).peekable();
        if fitting.peek().is_none() {
            return Err(Reason::TokenAlgorithm);
        }
        let verifies =
            |key: &VerifyingKey| verifies(&key.material, algorithm, self.signed.as_bytes(), &self.signature);
        if fitting.take(MOST_TRIED).any(verifies) { Ok(()) } else { Err(Reason::TokenSignature) }
    }

    fn is_of_now(&self, now: i64) -> Result<(), Reason> {
        // Whole seconds, or fractions of them (RFC 7519, section 2).
        let time = |claim| match self.claims.get(claim) {
            None => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or(Reason::TokenMalformed),
        };
        let (from, until) = (time("nbf")?, time("exp")?.ok_or(Reason::TokenMalformed)?);
        // Seconds of today are exact in 53 bits.
        #[allow(clippy::cast_precision_loss)]
        let (earliest, latest) = (now.saturating_sub(LEEWAY) as f64, now.saturating_add(LEEWAY) as f64);
        // Whatever is no number of seconds is no time that is to come.
        if until.partial_cmp(&earliest) != Some(std::cmp::Ordering::Greater) {
            return Err(Reason::TokenExpired);
        }
        if from.is_some_and(|from| from > latest) {
            return Err(Reason::TokenNotYetValid);
        }
        Ok(())
    }
}

fn verifies(key: &KeyMaterial, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
    let by = |how: &'static dyn signature::VerificationAlgorithm, key: &[u8]| {
        UnparsedPublicKey::new(how, key).verify(signed, signature).is_ok()
    };
    match key {
        KeyMaterial::Rsa { n, e } => {
            let how: &RsaParameters = match algorithm {
                Algorithm::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                Algorithm::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
                Algorithm::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                Algorithm::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
                Algorithm::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
                Algorithm::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
                Algorithm::Es256 | Algorithm::Es384 | Algorithm::EdDsa => return false,
            };
            RsaPublicKeyComponents { n, e }.verify(how, signed, signature).is_ok()
        }
        KeyMaterial::P256(point) => {
            algorithm == Algorithm::Es256 && by(&signature::ECDSA_P256_SHA256_FIXED, point)
        }
        KeyMaterial::P384(point) => {
            algorithm == Algorithm::Es384 && by(&signature::ECDSA_P384_SHA384_FIXED, point)
        }
        KeyMaterial::Ed25519(key) => algorithm == Algorithm::EdDsa && by(&signature::ED25519, key),
    }
}
