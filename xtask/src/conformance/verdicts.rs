//! What became of each test, read from what Go's testing says with `-test.v=test2json`: lines of its own begin with a mark;
//! others are of the test that was named last.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

/// The first character of a line that is about tests.
pub(super) const MARK: char = '\u{16}';
/// What all names begin with.
const ALL: &str = "TestConformance/";
/// Entries of a log that are kept for who reads about a failure, and lines of each.
const ENTRIES: usize = 3;
const LINES: usize = 12;
/// An entry of many lines that says what the next one sums up.
const WHOLE_ANSWER: &str = "Got resp ";

/// All tests, by their names.
#[derive(Debug, Default)]
pub(super) struct Verdicts {
    tests: BTreeMap<String, Test>,
    /// Who speaks.
    current: String,
}

/// A test, or a part of one: `MeshBasic`, `MeshBasic/0_request_to_…`.
#[derive(Debug, Default)]
struct Test {
    /// None while it runs.
    verdict: Option<Verdict>,
    /// The last entries of its log.
    said: VecDeque<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
        })
    }
}

impl Verdicts {
    /// Takes a line. Returns what to tell when a whole test has ended that was not skipped.
    pub(super) fn hear(&mut self, line: &str) -> Option<String> {
        let Some(about) = line.strip_prefix(MARK) else {
            self.tests.entry(self.current.clone()).or_default().hear(line);
            return None;
        };
        // `=== RUN   NAME`, `--- PASS: NAME (1.00s)`.
        let mut words = about.split_whitespace();
        let (kind, what, name) = (words.next()?, words.next()?, words.next()?);
        let name = name.strip_prefix(ALL).unwrap_or_default();
        if kind == "===" {
            name.clone_into(&mut self.current);
            return None;
        }
        let verdict = match what {
            "PASS:" => Verdict::Passed,
            "FAIL:" => Verdict::Failed,
            "SKIP:" => Verdict::Skipped,
            _ => return None,
        };
        self.tests.entry(name.to_owned()).or_default().verdict = Some(verdict);
        let tell = is_whole(name) && verdict != Verdict::Skipped;
        tell.then(|| format!("{verdict} {name} {}", words.next().unwrap_or_default()))
    }

    /// `21 passed, 1 failed`.
    pub(super) fn count(&self) -> String {
        let of = |verdict: Option<Verdict>| {
            self.tests.iter().filter(|(name, test)| is_whole(name) && test.verdict == verdict).count()
        };
        let (passed, failed) = (of(Some(Verdict::Passed)), of(Some(Verdict::Failed)));
        let running = of(None);
        let running = if running == 0 { String::new() } else { format!(", {running} did not end") };
        format!("{passed} passed, {failed} failed{running}")
    }

    /// The tests that failed or did not end, each with the last that it said; if there is none, what was said of no test.
    pub(super) fn failures(&self) -> String {
        let mut text = String::new();
        let bad = |test: &Test| matches!(test.verdict, None | Some(Verdict::Failed));
        let some = self.tests.iter().any(|(name, test)| !name.is_empty() && bad(test));
        for (name, test) in &self.tests {
            if !bad(test) || (some && name.is_empty()) {
                continue;
            }
            let what = if test.verdict.is_none() { " did not end" } else { "" };
            let depth = if name.contains('/') { "  " } else { "" };
            let name = if name.is_empty() { "the suite" } else { name };
            text += &format!("{depth}{name}{what}\n");
            for line in test.said.iter().flatten() {
                text += &format!("{depth}    {line}\n");
            }
        }
        text
    }
}

/// A test, not a part of one; what belongs to none has no name.
fn is_whole(name: &str) -> bool {
    !name.is_empty() && !name.contains('/')
}

impl Test {
    fn hear(&mut self, line: &str) {
        let line = line.trim();
        if !begins_entry(line) {
            if let Some(entry) = self.said.back_mut()
                && !line.is_empty()
                && entry.len() < LINES
            {
                entry.push(line.to_owned());
            }
            return;
        }
        self.said.push_back(vec![line.to_owned()]);
        // What came before is whole now.
        if let Some(place) = self.said.len().checked_sub(2)
            && self.said[place][0].contains(WHOLE_ANSWER)
        {
            self.said.remove(place);
        }
        while self.said.len() > ENTRIES {
            self.said.pop_front();
        }
    }
}

/// `pod.go:63: …`
fn begins_entry(line: &str) -> bool {
    let mut parts = line.splitn(3, ':');
    let file = parts.next().is_some_and(|name| name.ends_with(".go") && !name.contains(' '));
    file && parts.next().is_some_and(|number| number.parse::<u32>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
^=== RUN   TestConformance
    suite.go:1: of all
^=== RUN   TestConformance/MeshA
^=== RUN   TestConformance/MeshA/0_request
    pod.go:63: Got resp RawContent: [0 body] Hostname=echo-v2
          Code: 200
    pod.go:65: expected echo-v1, got echo-v2
^=== RUN   TestConformance/MeshA/1_request
    pod.go:63: Got resp RawContent: fine
^=== NAME  TestConformance/MeshA/0_request
    pod.go:63: Got resp RawContent: [0 body] Hostname=echo-v2
    http.go:287: timeout while waiting
          after 17 attempts
^--- PASS: TestConformance/MeshA/1_request (1.00s)
^--- FAIL: TestConformance/MeshA/0_request (30.00s)
^--- FAIL: TestConformance/MeshA (31.00s)
^=== RUN   TestConformance/MeshB
^--- PASS: TestConformance/MeshB (2.50s)
^=== RUN   TestConformance/GatewayC
    conformance.go:1: Skipping
^--- SKIP: TestConformance/GatewayC (0.00s)
^=== RUN   TestConformance/MeshD
    x.go:1: begun
";

    #[test]
    fn what_became_of_each_test_is_told_with_its_own_last_words() {
        let mut verdicts = Verdicts::default();
        let lines = SAID.lines().map(|line| line.replace('^', &MARK.to_string()));
        let told: Vec<String> = lines.filter_map(|line| verdicts.hear(&line)).collect();
        assert_eq!(told, ["FAILED MeshA (31.00s)", "passed MeshB (2.50s)"]);
        assert_eq!(verdicts.count(), "1 passed, 1 failed, 1 did not end");
        let wanted = "\
MeshA
  MeshA/0_request
      pod.go:65: expected echo-v1, got echo-v2
      http.go:287: timeout while waiting
      after 17 attempts
MeshD did not end
    x.go:1: begun
";
        assert_eq!(verdicts.failures(), wanted);
    }
}
