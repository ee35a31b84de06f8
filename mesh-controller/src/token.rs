//! Join tokens: what a machine shows once to become a node.
//!
//! Only the secret's hash is stored, as the name of a file that the one successful use removes: of two joins at once,
//! one finds it. Text: `nm1.<node>.<secret>.<sha256 of the root certificate>`, both in hex, so that the agent can tell
//! the right controller before it trusts anything.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mesh_core::identity::{IdentityError, SpiffeId, TrustDomain};
use serde::{Deserialize, Serialize};

use crate::{
    digest::{digest, hex, unhex},
    store::{self, StoreError},
};

const PREFIX: &str = "nm1";
/// Bytes of a secret: not to be guessed, so joins need no other limit.
const SECRET_LEN: usize = 32;
/// How long an expired token is remembered, so that whoever uses it is told that it expired.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// Longest token text that is looked at.
const MAX_LEN: usize = 512;

/// Why a token does not admit a node.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Not of the form of a token.
    #[error("this is not a join token; make one with: mesh-controller token --node NAME")]
    Malformed,
    /// It was made for another node.
    #[error(
        "the token is for node '{0}', not for this one; make one with: mesh-controller token --node NAME"
    )]
    OtherNode(String),
    /// Never made, or used before.
    #[error(
        "the token is not known, or was used before; make a new one with: mesh-controller token --node NAME"
    )]
    Unknown,
    /// Too old.
    #[error("the token has expired; make a new one with: mesh-controller token --node NAME")]
    Expired,
    /// The node's name cannot be part of an identity.
    #[error("'{node}' cannot be a node's name: {error}")]
    NodeName {
        /// The name.
        node: String,
        /// Why.
        error: IdentityError,
    },
    /// The state cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A token's file is damaged.
    #[error("{path} is damaged: {reason}; remove it and make a new token")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The tokens that may still be used.
#[derive(Debug, Clone)]
pub struct Tokens {
    dir: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    node: String,
    expires_unix: u64,
}

impl Tokens {
    /// The tokens below a state directory.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let dir = state_dir.join("tokens");
        store::private_dir(&dir)?;
        Ok(Self { dir })
    }

    /// Makes a token for one node, good until `expires`, that pins the root with this hash.
    pub fn create(&self, node: &str, expires: SystemTime, root: &[u8; 32]) -> Result<String, TokenError> {
        let any_domain = TrustDomain::parse("any").expect("'any' is a trust domain's name");
        SpiffeId::node(&any_domain, node)
            .map_err(|error| TokenError::NodeName { node: node.to_owned(), error })?;
        let secret: [u8; SECRET_LEN] = rand::random();
        let stored = Stored { node: node.to_owned(), expires_unix: unix(expires) };
        let bytes = serde_json::to_vec(&stored).expect("a name and a number are always JSON");
        store::replace(&self.path(&secret), &bytes)?;
        Ok(format!("{PREFIX}.{node}.{}.{}", hex(&secret), hex(root)))
    }

    /// Uses a token up for this node. Exactly one call succeeds for a token, however many come at once; one for the
    /// wrong node leaves it to the right one.
    pub fn redeem(&self, text: &str, node: &str, now: SystemTime) -> Result<(), TokenError> {
        let (token_node, secret) = parse(text).ok_or(TokenError::Malformed)?;
        if token_node != node {
            return Err(TokenError::OtherNode(token_node.to_owned()));
        }
        let path = self.path(&secret);
        let stored = self.stored(&path)?.ok_or(TokenError::Unknown)?;
        if stored.node != node {
            return Err(TokenError::OtherNode(stored.node));
        }
        if !store::take(&path)? {
            return Err(TokenError::Unknown);
        }
        if stored.expires_unix <= unix(now) {
            return Err(TokenError::Expired);
        }
        Ok(())
    }

    /// Removes all of them: those of a restored state may have been used since.
    pub fn revoke_all(&self) -> Result<usize, TokenError> {
        let mut revoked = 0;
        let Ok(entries) = fs::read_dir(&self.dir) else { return Ok(0) };
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            revoked += usize::from(store::take(&path)?);
        }
        Ok(revoked)
    }

    /// Removes what expired a day ago or more.
    pub fn sweep(&self, now: SystemTime) -> Result<(), TokenError> {
        let before = unix(now - REMEMBERED);
        let Ok(entries) = fs::read_dir(&self.dir) else { return Ok(()) };
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if !hidden && self.stored(&path)?.is_some_and(|stored| stored.expires_unix <= before) {
                store::take(&path)?;
            }
        }
        Ok(())
    }

    fn stored(&self, path: &Path) -> Result<Option<Stored>, TokenError> {
        let Some(bytes) = store::read(path)? else { return Ok(None) };
        let damaged = |error: serde_json::Error| TokenError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    fn path(&self, secret: &[u8]) -> PathBuf {
        self.dir.join(hex(&digest(secret)))
    }
}

/// The node and the secret of a token. The node's name may have dots, so it is what the other parts leave over.
fn parse(text: &str) -> Option<(&str, [u8; SECRET_LEN])> {
    let text = text.trim();
    if text.len() > MAX_LEN {
        return None;
    }
    let rest = text.strip_prefix(PREFIX)?.strip_prefix('.')?;
    let (rest, root) = rest.rsplit_once('.')?;
    let (node, secret) = rest.rsplit_once('.')?;
    unhex(root)?;
    Some((node, unhex(secret)?))
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn tokens() -> (tempfile::TempDir, Tokens, SystemTime) {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        (dir, tokens, UNIX_EPOCH + HOUR * 1000)
    }

    #[test]
    fn a_token_admits_its_node_once() {
        let (_dir, tokens, now) = tokens();
        let token = tokens.create("node.a-1", now + HOUR, &[7; 32]).unwrap();
        assert!(token.ends_with(&"07".repeat(32)), "{token}");
        assert!(matches!(tokens.redeem(&token, "node-b", now), Err(TokenError::OtherNode(_))));
        tokens.redeem(&token, "node.a-1", now).unwrap();
        assert!(matches!(tokens.redeem(&token, "node.a-1", now), Err(TokenError::Unknown)));
    }

    #[test]
    fn renaming_the_node_within_a_token_does_not_help() {
        let (_dir, tokens, now) = tokens();
        let token = tokens.create("a", now + HOUR, &[7; 32]).unwrap().replace("nm1.a.", "nm1.b.");
        assert!(matches!(tokens.redeem(&token, "b", now), Err(TokenError::OtherNode(_))));
    }

    #[test]
    fn an_expired_token_admits_nobody_and_is_swept() {
        let (dir, tokens, now) = tokens();
        let token = tokens.create("a", now, &[7; 32]).unwrap();
        assert!(matches!(tokens.redeem(&token, "a", now), Err(TokenError::Expired)));
        tokens.create("a", now, &[7; 32]).unwrap();
        tokens.create("b", now + HOUR, &[7; 32]).unwrap();
        let left = || fs::read_dir(dir.path().join("tokens")).unwrap().count();
        tokens.sweep(now).unwrap();
        assert_eq!(left(), 2, "whoever comes with it is told that it expired");
        tokens.sweep(now + REMEMBERED).unwrap();
        assert_eq!(left(), 1);
    }

    #[test]
    fn revoked_tokens_admit_nobody() {
        let (_dir, tokens, now) = tokens();
        let token = tokens.create("a", now + HOUR, &[7; 32]).unwrap();
        assert_eq!(tokens.revoke_all().unwrap(), 1);
        assert!(matches!(tokens.redeem(&token, "a", now), Err(TokenError::Unknown)));
        assert_eq!(tokens.revoke_all().unwrap(), 0);
    }

    #[test]
    fn of_many_at_once_one_gets_in() {
        let (_dir, tokens, now) = tokens();
        let token = tokens.create("a", now + HOUR, &[7; 32]).unwrap();
        let admitted = std::thread::scope(|scope| {
            let joins: Vec<_> =
                (0..8).map(|_| scope.spawn(|| tokens.redeem(&token, "a", now).is_ok())).collect();
            joins.into_iter().map(|join| join.join().unwrap()).filter(|admitted| *admitted).count()
        });
        assert_eq!(admitted, 1);
    }

    #[test]
    fn the_secret_is_stored_nowhere() {
        let (dir, tokens, now) = tokens();
        let token = tokens.create("a", now + HOUR, &[7; 32]).unwrap();
        let secret = token.split('.').nth(2).unwrap();
        for entry in fs::read_dir(dir.path().join("tokens")).unwrap() {
            let path = entry.unwrap().path();
            assert!(!path.to_string_lossy().contains(secret));
            assert!(!fs::read_to_string(path).unwrap().contains(secret));
        }
    }

    #[test]
    fn other_texts_are_not_tokens() {
        let (_dir, tokens, now) = tokens();
        for text in ["", "nm1", "nm1.a.b.c", "nm2.a.00.00", &"x".repeat(1000), "nm1.ä.ä.ä"] {
            assert!(matches!(tokens.redeem(text, "a", now), Err(TokenError::Malformed)), "{text}");
        }
        assert!(matches!(tokens.create("a/b", now, &[0; 32]), Err(TokenError::NodeName { .. })));
    }
}
