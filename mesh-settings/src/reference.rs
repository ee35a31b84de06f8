//! Markdown of what a program can be told, from the same definitions that read it; so it cannot differ.

use std::{fmt::Write, fs, path::Path};

use clap::{Arg, Command, builder::StyledStr};

/// Set to write the reference instead of comparing it: what `cargo xtask generate` does.
pub const WRITE: &str = "NODEMESH_WRITE_REFERENCE";

/// A page about a program and its subcommands.
pub fn page(command: &Command, introduction: &str) -> String {
    let mut command = command.clone();
    command.build();
    let mut text = format!("# {}\n\n", command.get_name());
    text += "Generated from the program by `cargo xtask generate`.\n\n";
    text += introduction.trim();
    text += "\n";
    section(&mut text, &command, command.get_name());
    text
}

fn section(text: &mut String, command: &Command, path: &str) {
    let about = command.get_long_about().or_else(|| command.get_about());
    put(text, format_args!("\n## `{path}`\n\n{}\n", about.map(plain).unwrap_or_default()));
    let shown = |arg: &&Arg| !arg.is_hide_set() && !["help", "version"].contains(&arg.get_id().as_str());
    let args: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    if !args.is_empty() {
        *text += "\n| name | variable | default | what |\n|---|---|---|---|\n";
        for arg in args {
            row(text, arg);
        }
    }
    for inner in command.get_subcommands().filter(|it| it.get_name() != "help" && !it.is_hide_set()) {
        section(text, inner, &format!("{path} {}", inner.get_name()));
    }
}

fn row(text: &mut String, arg: &Arg) {
    let values: Vec<String> =
        arg.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect();
    let takes = arg.get_action().takes_values() && !values.is_empty();
    let name = match (arg.get_long(), takes) {
        (Some(long), true) => format!("`--{long} {}`", values.join(" ")),
        (Some(long), false) => format!("`--{long}`"),
        (None, _) => format!("`{}`", values.join(" ")),
    };
    let variable = arg.get_env().map(|it| format!("`{}`", it.to_string_lossy())).unwrap_or_default();
    let defaults: Vec<String> =
        arg.get_default_values().iter().map(|it| format!("`{}`", it.to_string_lossy())).collect();
    let default = match defaults.join(" ") {
        text if !text.is_empty() && takes => text,
        _ if arg.is_required_set() => "required".to_owned(),
        _ => String::new(),
    };
    let help = arg.get_long_help().or_else(|| arg.get_help()).map(plain).unwrap_or_default();
    let mut choices: Vec<String> = vec![];
    if takes {
        let possible = arg.get_possible_values();
        choices.extend(possible.iter().map(|value| {
            let help = value.get_help().map(|help| format!(" ({})", plain(help))).unwrap_or_default();
            format!("`{}`{help}", value.get_name())
        }));
    }
    let choices =
        if choices.is_empty() { String::new() } else { format!(" One of: {}.", choices.join("; ")) };
    let cell = |text: String| text.replace('|', "\\|").replace('\n', " ");
    let cells = [name, variable, default, format!("{help}{choices}")].map(cell);
    put(text, format_args!("| {} |\n", cells.join(" | ")));
}

/// A page about metrics, from the text in which a program that has counted all of them once prints them.
pub fn metrics(title: &str, text: &str) -> String {
    let mut page = format!("# {title}\n\nGenerated from the program by `cargo xtask generate`.\n\n");
    page += "| name | type | labels | what |\n|---|---|---|---|\n";
    let (mut help, mut kind) = ("", "");
    let mut last = "";
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').map_or("", |(_, help)| help.trim_end_matches('.'));
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            kind = rest.split_once(' ').map_or("", |(_, kind)| kind);
        } else if !line.starts_with('#') {
            let (name, labels) = line.split_once(['{', ' ']).unwrap_or((line, ""));
            if name != last {
                let labels = if line.contains('{') { label_names(labels) } else { vec![] };
                put(&mut page, format_args!("| `{name}` | {kind} | {} | {help} |\n", labels.join(", ")));
            }
            last = name;
        }
    }
    page
}

/// `a="x",b="y"} 1` → `a`, `b`
fn label_names(text: &str) -> Vec<String> {
    let inside = text.rsplit_once('}').map_or("", |(inside, _)| inside);
    inside
        .split("\",")
        .filter_map(|pair| pair.split_once("=\""))
        .map(|(name, _)| format!("`{name}`"))
        .collect()
}

fn plain(text: &StyledStr) -> String {
    text.to_string().trim().to_owned()
}

fn put(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a String never fails");
}

/// Compares a generated page with the one in the repository, or writes it when [`WRITE`] is set.
pub fn check(path: &Path, generated: &str) -> Result<(), String> {
    if std::env::var_os(WRITE).is_some() {
        return fs::write(path, generated).map_err(|error| format!("{}: {error}", path.display()));
    }
    match fs::read_to_string(path) {
        Ok(found) if found == generated => Ok(()),
        Ok(_) => Err(format!("{} is stale: cargo xtask generate", path.display())),
        Err(error) => Err(format!("{}: {error}: cargo xtask generate", path.display())),
    }
}
