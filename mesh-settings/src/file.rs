//! A file of settings: a YAML mapping whose keys are the names of the flags.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, de::Visitor};
use serde_saphyr::Spanned;

/// Largest file: some dozens of settings are a few kilobytes.
const MAX_BYTES: u64 = 64 * 1024;
/// From this likeness on (Jaro-Winkler, 1 is equal), a name is taken for a mistyped one.
const ALIKE: f64 = 0.8;

/// One setting of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As it would stand after the flag.
    pub value: String,
    /// From 1.
    pub line: u64,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read the settings in {path}: {error}; correct the path given with --config", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is not what a file of settings is.
    #[error("{path}: {reason}; write one 'name: value' a line, with the names of the flags", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser said, with the line.
        reason: String,
    },
    /// It has a setting that there is not.
    #[error("{path}:{line}: there is no setting '{name}'; {cure}", path = path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// As it stands there.
        name: String,
        /// What to write instead.
        cure: String,
    },
}

/// Reads a file, all of whose settings must be among the `known`.
pub fn read(path: &Path, known: &[&str]) -> Result<BTreeMap<String, Entry>, FileError> {
    let unreadable = |error| FileError::Unreadable { path: path.to_owned(), error };
    let mut text = String::new();
    fs::File::open(path)
        .map_err(unreadable)?
        .take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(unreadable(io::ErrorKind::FileTooLarge.into()));
    }
    let malformed = |error: serde_saphyr::Error| FileError::Malformed {
        path: path.to_owned(),
        reason: error.without_snippet().to_string(),
    };
    let entries: Option<BTreeMap<String, Spanned<Scalar>>> =
        serde_saphyr::from_str(&text).map_err(malformed)?;
    let entry = |(name, found): (String, Spanned<Scalar>)| {
        let line = found.referenced.line();
        if known.contains(&name.as_str()) {
            Ok((name, Entry { value: found.value.0, line }))
        } else {
            let cure = cure(&name, known);
            Err(FileError::Unknown {
                path: path.to_owned(),
                line,
                name: name.chars().take(100).collect(),
                cure,
            })
        }
    };
    entries.unwrap_or_default().into_iter().map(entry).collect()
}

fn cure(wrong: &str, known: &[&str]) -> String {
    let likeness = |name: &&str| strsim::jaro_winkler(&wrong.replace('_', "-"), name);
    let nearest = known.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|name| wrong.len() <= 100 && likeness(name) >= ALIKE) {
        Some(name) => format!("did you mean '{name}'?"),
        None => format!("there are: {}", known.join(", ")),
    }
}

/// A text, a number or a boolean, as a text.
#[derive(Debug)]
struct Scalar(String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScalarVisitor)
    }
}

struct ScalarVisitor;

impl Visitor<'_> for ScalarVisitor {
    type Value = Scalar;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a number, true or false")
    }

    fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
        Ok(Scalar(value.to_owned()))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
        Ok(Scalar(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
        Ok(Scalar(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
        Ok(Scalar(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Scalar, E> {
        Ok(Scalar(value.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<BTreeMap<String, Entry>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        read(file.path(), &["node", "drain-deadline", "run-dir"]).map_err(|error| error.to_string())
    }

    #[test]
    fn settings_are_read_with_their_lines() {
        let entries = read_text("# the node\nnode: 7\ndrain-deadline: 30s\n").unwrap();
        assert_eq!(entries["node"], Entry { value: "7".into(), line: 2 });
        assert_eq!(entries["drain-deadline"], Entry { value: "30s".into(), line: 3 });
        assert_eq!(read_text("# nothing\n").unwrap(), BTreeMap::new());
    }

    #[test]
    fn mistakes_say_where_and_what_to_do() {
        for (text, parts) in [
            (
                "node: a\ndrain_deadline: 3s\n",
                [":2: there is no setting 'drain_deadline'", "mean 'drain-deadline'"],
            ),
            ("zebra: 1\n", [":1: there is no setting 'zebra'", "there are: node, drain-deadline, run-dir"]),
            ("node: a\nnode: b\n", ["node", "one 'name: value' a line"]),
            ("node: [a]\n", ["a text, a number", "one 'name: value' a line"]),
            ("node: {\n", ["line", "one 'name: value' a line"]),
        ] {
            let said = read_text(text).unwrap_err();
            assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} are not in {said}");
        }
        let said = read(Path::new("/nowhere"), &[]).unwrap_err().to_string();
        assert!(said.contains("/nowhere") && said.contains("--config"), "{said}");
    }
}
