//! What the compiler does not check: that every file says what it is for, that tables of modules and arrows between
//! crates are true, that no unfinished work hides, that links in documents lead somewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Which crate of the workspace may depend on which (docs/ARCHITECTURE.md).
const ARROWS: [(&str, &[&str]); 7] = [
    ("mesh-core", &[]),
    ("mesh-ebpf", &[]),
    ("mesh-settings", &[]),
    ("mesh-agent", &["mesh-core", "mesh-ebpf", "mesh-settings"]),
    ("mesh-controller", &["mesh-core", "mesh-settings"]),
    ("tests", &["mesh-agent", "mesh-controller", "mesh-core", "mesh-ebpf"]),
    ("xtask", &["mesh-tests"]),
];
/// Crates whose lib.rs has a table of modules.
const WITH_TABLE: [&str; 5] = ["mesh-agent", "mesh-controller", "mesh-core", "mesh-settings", "tests"];
/// The one place that pauses, between two looks at a condition.
const WAITS: &str = "tests/src/wait.rs";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the workspace")
}

/// All files of the repository with this extension, with their path from the root.
fn files(extension: &str) -> Vec<(String, String)> {
    fn walk(directory: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).expect("a directory of the repository") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && name != ".git" {
                walk(&path, extension, found);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    let mut found = vec![];
    walk(root(), extension, &mut found);
    found.sort();
    let relative = |path: &Path| path.strip_prefix(root()).expect("inside").to_string_lossy().into_owned();
    found.iter().map(|path| (relative(path), fs::read_to_string(path).expect("text"))).collect()
}

#[track_caller]
fn assert_none(what: &str, complaints: &[String]) {
    assert!(complaints.is_empty(), "{what}:\n  {}", complaints.join("\n  "));
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent = files("rs").into_iter().filter(|(_, text)| !text.starts_with("//! ")).map(|(path, _)| path);
    assert_none("these files do not open with //!", &silent.collect::<Vec<_>>());
}

/// The modules in a crate's table, each with its row; a table without numbers has one row per module.
fn table(lib: &str) -> BTreeMap<String, usize> {
    let mut rows = BTreeMap::new();
    let lines = lib.lines().filter_map(|line| line.strip_prefix("//! |"));
    for (place, line) in lines.enumerate() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let number = cells[0].parse().ok();
        let modules = if number.is_some() { cells[1] } else { cells[0] };
        for name in modules.split("[`").skip(1).filter_map(|rest| rest.split('`').next()) {
            rows.insert(name.to_owned(), number.unwrap_or(place));
        }
    }
    rows
}

#[test]
fn tables_name_exactly_the_modules_that_exist() {
    let mut complaints = vec![];
    for name in WITH_TABLE {
        let source = root().join(name).join("src");
        let lib = fs::read_to_string(source.join("lib.rs")).expect("a lib.rs");
        let told: BTreeSet<String> = table(&lib).into_keys().collect();
        let declared: BTreeSet<String> = lib
            .lines()
            .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
            .map(str::to_owned)
            .collect();
        let there: BTreeSet<String> = fs::read_dir(&source)
            .expect("src")
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| path.is_file() || path.join("mod.rs").is_file())
            .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
            .filter(|stem| stem != "lib" && stem != "main")
            .collect();
        if told != declared || declared != there {
            complaints.push(format!("{name}: table {told:?}, declared {declared:?}, files {there:?}"));
        }
    }
    assert_none("tables, declarations and files differ", &complaints);
}

/// Modules of the crate that a text uses by `crate::x`, or by `super::x` from a module's top file.
fn uses(text: &str, known: &BTreeMap<String, usize>, top: bool) -> BTreeSet<String> {
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let mut found = BTreeSet::new();
    for prefix in if top { &["crate::", "super::"][..] } else { &["crate::"][..] } {
        for rest in code.split(prefix).skip(1) {
            found.extend(first_segments(rest).into_iter().filter(|name| known.contains_key(name)));
        }
    }
    found
}

/// `a::b` → a; `{a::{b, c}, d}` → a, d.
fn first_segments(path: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let Some(group) = path.strip_prefix('{') else { return vec![word(path)] };
    let (mut depth, mut start, mut found) = (1, 0, vec![]);
    for (place, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 || (depth == 1 && c == ',') {
            found.push(word(&group[start..place]));
            start = place + 1;
        }
        if depth == 0 {
            break;
        }
    }
    found
}

#[test]
fn segments_are_read_from_nested_imports() {
    assert_eq!(first_segments("a::b;"), ["a"]);
    assert_eq!(first_segments("{a::{b, c}, d, e::F}; use crate::g"), ["a", "d", "e"]);
}

#[test]
fn a_module_of_the_agent_uses_only_rows_below_its_own() {
    let lib = fs::read_to_string(root().join("mesh-agent/src/lib.rs")).expect("the agent's lib.rs");
    let rows = table(&lib);
    let mut complaints = vec![];
    for (path, text) in files("rs") {
        let Some(inside) = path.strip_prefix("mesh-agent/src/") else { continue };
        let own = inside.split('/').next().expect("a first part").trim_end_matches(".rs");
        let Some(row) = rows.get(own) else { continue };
        let top = !inside.contains('/') || inside.ends_with("/mod.rs") && inside.matches('/').count() == 1;
        for used in uses(&text, &rows, top) {
            if used != own && rows[&used] <= *row {
                complaints.push(format!("{path} (row {row}) uses {used} (row {})", rows[&used]));
            }
        }
    }
    assert_none("arrows that point up or sideways", &complaints);
}

#[test]
fn crates_depend_only_along_the_arrows() {
    let mut complaints = vec![];
    for (name, allowed) in ARROWS {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("a manifest");
        for line in manifest.lines() {
            let dependency = line.split(['.', ' ', '=']).next().expect("a first part");
            let ours = dependency.starts_with("mesh-") && !allowed.contains(&dependency);
            if ours {
                complaints.push(format!("{name} depends on {dependency}"));
            }
        }
    }
    assert_none("arrows between crates that the architecture does not have", &complaints);
}

#[test]
fn nothing_is_unfinished_skipped_or_slept_through() {
    // In two parts, so that this file does not find itself.
    let never = [concat!("to", "do!("), concat!("unimple", "mented!("), concat!("#[ig", "nore")];
    let sleeps = [concat!("thread::", "sleep"), concat!("time::", "sleep(")];
    let mut complaints = vec![];
    for (path, text) in files("rs") {
        let tests_from = if path.starts_with("tests/") || path.contains("/tests/") {
            0
        } else {
            text.find("#[cfg(test)]").unwrap_or(text.len())
        };
        let in_tests = |place: usize| place >= tests_from && path != WAITS;
        for word in never {
            complaints.extend(text.contains(word).then(|| format!("{path}: {word}")));
        }
        for word in sleeps {
            let slept = text.match_indices(word).any(|(place, _)| in_tests(place));
            complaints.extend(slept.then(|| format!("{path}: {word} in a test; await a condition")));
        }
    }
    assert_none("unfinished or sleeping code", &complaints);
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut complaints = vec![];
    for (path, text) in files("md") {
        let directory = root().join(&path);
        let directory = directory.parent().expect("a document is in a directory");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().expect("a first part");
            let elsewhere = target.is_empty() || target.contains("://") || target.starts_with("mailto:");
            if !elsewhere && !directory.join(target).exists() {
                complaints.push(format!("{path}: {link}"));
            }
        }
    }
    assert_none("links that lead nowhere", &complaints);
}
