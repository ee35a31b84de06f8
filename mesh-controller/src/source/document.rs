//! YAML text into documents, and documents into values whose lines are known.
//!
//! A file is cut at its document markers before any of it is parsed, so that a syntax error stays within its own
//! document. A marker is `---` or `...` at the start of a line: YAML forbids both inside of any scalar (YAML 1.2.2
//! §9.1.2), so cutting needs no parser.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{Error, MessageFormatter, Options, Spanned, UserMessageFormatter};

use super::Problem;

/// One document of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document<'a> {
    /// Lines of the file before its text.
    offset: usize,
    /// Its text, with the marker that starts it.
    text: &'a str,
}

/// Cuts a file's text into its documents; those with nothing but comments are left out.
pub fn split(text: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let (mut start, mut offset) = (0, 0);
    let mut at = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if is_marker(line, "---") {
            documents.push(Document { offset, text: &text[start..at] });
            (start, offset) = (at, number);
        } else if is_marker(line, "...") {
            documents.push(Document { offset, text: &text[start..at] });
            (start, offset) = (at + line.len(), number + 1);
        }
        at += line.len();
    }
    documents.push(Document { offset, text: &text[start..] });
    documents.retain(|document| document.first_line().is_some());
    documents
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
}

impl<'a> Document<'a> {
    /// The line of the file at which its content starts, from 1.
    pub fn line(&self) -> usize {
        self.offset + 1 + self.first_line().unwrap_or(0)
    }

    /// Its text, with the marker that starts it.
    pub fn text(&self) -> &'a str {
        self.text
    }

    fn first_line(&self) -> Option<usize> {
        self.text.lines().position(|line| {
            let content = line.strip_prefix("---").unwrap_or(line).trim_start_matches('\u{feff}').trim();
            !content.is_empty() && !content.starts_with('#') && !content.starts_with('%')
        })
    }

    /// The document as values with their lines; what fails here is not YAML.
    pub fn tree(&self) -> Result<Node, Problem> {
        let options = options(serde_saphyr::Options::default());
        let tree: Result<Node, Error> = serde_saphyr::from_str_with_options(self.text, options);
        let mut tree = tree.map_err(|error| Problem {
            line: self.line_of(&error).unwrap_or_else(|| self.line()),
            field: String::new(),
            reason: format!("this is not valid YAML: {}", message(&error)),
            cure: "correct the syntax at this line; indentation and quotes are the usual suspects".into(),
        })?;
        tree.shift(self.offset);
        Ok(tree)
    }

    /// The document as a type whose fields are all known.
    pub fn typed<T: DeserializeOwned>(&self, tree: &Node) -> Result<T, Problem> {
        let mut options = options(serde_saphyr::Options::default());
        // As Kubernetes has it: a label that reads `true` without quotes is not a string.
        options.no_schema = true;
        let mut track = serde_path_to_error::Track::new();
        let result =
            serde_saphyr::with_deserializer_from_str_with_options(self.text, options, |deserializer| {
                T::deserialize(serde_path_to_error::Deserializer::new(deserializer, &mut track))
            });
        result.map_err(|error| self.type_problem(&error, track.path().to_string(), tree))
    }

    fn type_problem(&self, error: &Error, path: String, tree: &Node) -> Problem {
        let path = if path == "." { String::new() } else { path };
        let line = match error.without_snippet() {
            // The library points to the end of the mapping, where it noticed.
            Error::SerdeMissingField { .. } => tree.line_of(&path),
            _ => self.line_of(error).unwrap_or_else(|| tree.line_of(&path)),
        };
        let (field, reason, cure) = match error.without_snippet() {
            Error::SerdeUnknownField { field, expected, .. } => {
                (path, format!("there is no field '{field}' here"), one_of(field, expected))
            }
            Error::SerdeMissingField { field, .. } => {
                let path = if path.is_empty() { (*field).to_owned() } else { format!("{path}.{field}") };
                (path, "this field is missing".to_owned(), format!("write '{field}:' with its value"))
            }
            Error::SerdeInvalidType { unexpected, expected, .. }
            | Error::SerdeInvalidValue { unexpected, expected, .. } => {
                (path, format!("{unexpected} does not belong here"), format!("write {expected}"))
            }
            other => (path, message(other), "write a value of the field's type".to_owned()),
        };
        Problem { line, field, reason, cure }
    }

    fn line_of(&self, error: &Error) -> Option<usize> {
        let line = usize::try_from(error.location()?.line()).ok()?;
        // Line 0 is the library's "unknown".
        (line > 0).then_some(self.offset + line)
    }
}

fn options(mut options: Options) -> Options {
    options.with_snippet = false;
    options.strict_booleans = true;
    options
}

/// The library's words without its own line numbers, which count from the document's start.
fn message(error: &Error) -> String {
    UserMessageFormatter.format_message(error.without_snippet()).into_owned()
}

/// "did you mean" where a known name is near, else all of them.
pub fn one_of(wrong: &str, names: &[&str]) -> String {
    match nearest(wrong, names) {
        Some(name) => format!("did you mean '{name}'?"),
        None if names.is_empty() => "remove it".to_owned(),
        None => format!("use one of: {}", names.join(", ")),
    }
}

/// The name that a mistyped one most likely stands for.
fn nearest<'a>(wrong: &str, names: &[&'a str]) -> Option<&'a str> {
    /// Longer names are not compared: the cost grows with the square, and nobody mistypes that much.
    const LONGEST: usize = 64;
    if wrong.len() > LONGEST {
        return None;
    }
    let wrong = wrong.to_lowercase();
    let near = |name: &&str| {
        let distance = distance(&wrong, &name.to_lowercase());
        (distance * 3 <= name.len().max(3)).then_some(distance)
    };
    names.iter().filter_map(|name| Some((near(name)?, *name))).min().map(|(_, name)| name)
}

/// Edits between two texts (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A value and the line of the file it stands on, from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    line: usize,
    value: Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Map(Vec<(String, Node)>),
    List(Vec<Node>),
    Scalar(String),
    Null,
}

impl Node {
    /// Whether the document says nothing.
    pub fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    /// The text of a scalar under these map keys.
    pub fn text(&self, path: &[&str]) -> Option<&str> {
        match (path.split_first(), &self.value) {
            (None, Value::Scalar(text)) => Some(text),
            (Some((key, rest)), Value::Map(entries)) => {
                entries.iter().find(|(name, _)| name == key)?.1.text(rest)
            }
            _ => None,
        }
    }

    /// What a map has under a key; nothing if this is no map.
    pub fn field(&self, key: &str) -> Option<&Self> {
        let Value::Map(entries) = &self.value else { return None };
        entries.iter().find(|(name, _)| name == key).map(|(_, child)| child)
    }

    /// The entries of a list; nothing if this is none.
    pub fn items(&self) -> Option<&[Self]> {
        match &self.value {
            Value::List(items) => Some(items),
            Value::Map(_) | Value::Scalar(_) | Value::Null => None,
        }
    }

    /// Whether it is a map.
    pub fn is_map(&self) -> bool {
        matches!(self.value, Value::Map(_))
    }

    /// The line of a field, or of the nearest thing around it that is there.
    pub fn line_of(&self, path: &str) -> usize {
        let (child, rest) = match (&self.value, path.strip_prefix('[')) {
            (Value::List(items), Some(path)) => {
                let (index, rest) = path.split_once(']').unwrap_or((path, ""));
                (index.parse().ok().and_then(|index: usize| items.get(index)), rest)
            }
            // Keys may have dots of their own (labels), so the keys that are there say where one ends.
            (Value::Map(entries), None) => entries
                .iter()
                .filter_map(|(key, child)| Some((key, child, path.strip_prefix(key.as_str())?)))
                .filter(|(_, _, rest)| rest.is_empty() || rest.starts_with(['.', '[']))
                .max_by_key(|(key, _, _)| key.len())
                .map_or((None, ""), |(_, child, rest)| (Some(child), rest)),
            _ => (None, ""),
        };
        child.map_or(self.line, |child| child.line_of(rest.strip_prefix('.').unwrap_or(rest)))
    }

    fn shift(&mut self, lines: usize) {
        self.line += lines;
        match &mut self.value {
            Value::Map(entries) => entries.iter_mut().for_each(|(_, child)| child.shift(lines)),
            Value::List(items) => items.iter_mut().for_each(|child| child.shift(lines)),
            Value::Scalar(_) | Value::Null => {}
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        let line = usize::try_from(spanned.referenced.line()).map_err(D::Error::custom)?;
        Ok(Self { line, value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping, a list or a scalar")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            entries.push((key, map.next_value()?));
        }
        Ok(Value::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Scalar(text.to_owned()))
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Scalar(value.to_string()))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Scalar(value.to_string()))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Scalar(value.to_string()))
    }

    fn visit_i128<E: serde::de::Error>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Scalar(value.to_string()))
    }

    fn visit_u128<E: serde::de::Error>(self, value: u128) -> Result<Value, E> {
        Ok(Value::Scalar(value.to_string()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Scalar(value.to_string()))
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check_split(text: &str, expected: &[usize]) {
        let lines: Vec<usize> = split(text).iter().map(Document::line).collect();
        assert_eq!(lines, expected, "{text:?}");
    }

    #[test]
    fn files_are_cut_at_markers_and_empty_documents_are_left_out() {
        check_split("", &[]);
        check_split("# only a comment\n---\n", &[]);
        check_split("a: 1\n", &[1]);
        check_split("---\na: 1\n---\n# c\n\nb: 2\n...\n---\nc: 3", &[2, 6, 9]);
        check_split("--- {a: 1}\n---- not: a marker\n", &[1]);
        check_split("a: |\n  ---\n  text\n", &[1]);
        check_split("%YAML 1.2\n---\na: 1\r\n---\r\nb: 1\r\n", &[3, 5]);
    }

    #[test]
    fn fields_are_found_by_path_or_by_what_is_around_them() {
        let text =
            "---\na: 1\n---\nmetadata:\n  labels:\n    a.b/c: x\nspec:\n  list:\n  - one\n  - two: 2\n";
        let tree = split(text)[1].tree().unwrap();
        for (path, line) in [
            ("metadata.labels.a.b/c", 6),
            ("spec.list[0]", 9),
            ("spec.list[1].two", 10),
            ("spec.list[1].three", 10),
            ("nothing.of.this", 4),
        ] {
            assert_eq!(tree.line_of(path), line, "{path}");
        }
    }

    #[test]
    fn a_syntax_error_names_its_line_in_the_file() {
        let problem = split("a: 1\n---\nb: 2\nc: [1, 2\nd: }\n")[1].tree().unwrap_err();
        assert!((4..=6).contains(&problem.line), "{problem:?}");
        let twice = split("a: 1\n---\nb: 2\nb: 3\n")[1].tree().unwrap_err();
        assert_eq!(twice.line, 4, "{twice:?}");
    }

    #[test]
    fn mistyped_names_find_the_one_that_was_meant() {
        let names = ["addresses", "node", "ready"];
        assert_eq!(one_of("adress", &names), "did you mean 'addresses'?");
        assert_eq!(one_of("Node", &names), "did you mean 'node'?");
        assert_eq!(one_of("zebra", &names), "use one of: addresses, node, ready");
    }

    #[test]
    fn a_text_that_unfolds_into_billions_is_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let aliases = vec![format!("*a{}", level - 1); 9].join(", ");
            text += &format!("a{level}: &a{level} [{aliases}]\n");
        }
        assert!(split(&text)[0].tree().is_err());
        let deep = "[".repeat(100_000);
        assert!(split(&deep)[0].tree().is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[ -~\n\t:{}\\[\\]&*!|>'\"#%-]{0,200}") {
            for document in split(&text) {
                if let Ok(tree) = document.tree() {
                    tree.line_of("a.b[0].c");
                }
            }
        }
    }
}
