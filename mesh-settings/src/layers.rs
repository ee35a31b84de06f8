//! The four places that a setting comes from, and which of them wins: flag, environment, file, default.
//!
//! What the file says is handed to clap as if it had been typed, where neither a flag nor the environment says
//! otherwise: so every value is read by the one parser that its flag has.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt::Write,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgAction, ArgMatches, Command,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};

use crate::file::{self, Entry};

/// The flag that names the file.
const CONFIG: &str = "config";
/// The flag that prints and exits; no setting.
const PRINT: &str = "print-config";

/// What one command can be told, and the names of the variables for it.
#[derive(Debug)]
pub struct Settings {
    command: Command,
    prefix: &'static str,
}

/// One setting, as it is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce {
    /// The flag without its dashes, which is the file's key too.
    pub name: String,
    /// As it was written.
    pub value: String,
    /// Where it was: `flag`, `environment NAME`, `PATH:LINE` or `default`.
    pub source: String,
}

impl Settings {
    /// The settings of a command: each argument with a long flag gets a variable `<prefix><NAME>`, and there are two
    /// more flags, `--config FILE` and `--print-config`.
    pub fn new(command: Command, prefix: &'static str) -> Self {
        let file = Arg::new(CONFIG)
            .long(CONFIG)
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("A YAML file of settings, with the names of these flags. A flag wins over the environment, that over the file");
        let print = Arg::new(PRINT)
            .long(PRINT)
            .action(ArgAction::SetTrue)
            .help("Prints the settings in force, each with where it comes from, as a file that --config takes; and exits");
        let named = |arg: Arg| match arg.get_long().filter(|long| *long != PRINT) {
            None => arg,
            Some(long) => {
                let variable = variable(prefix, long);
                arg.env(variable)
            }
        };
        Self { command: command.arg(file).arg(print).mut_args(named), prefix }
    }

    /// The command, with everything that it can be told.
    pub fn command(&self) -> &Command {
        &self.command
    }

    /// Whether the matches ask for the settings instead of the program.
    pub fn print_only(matches: &ArgMatches) -> bool {
        matches.get_flag(PRINT)
    }

    /// The names of all settings.
    pub fn names(&self) -> Vec<&str> {
        let longs = self.command.get_arguments().filter_map(Arg::get_long);
        longs.filter(|long| ![CONFIG, PRINT, "help", "version"].contains(long)).collect()
    }

    /// Reads the words after the program's name and that of its subcommand, and the file that they or the
    /// environment name.
    pub fn parse(&self, words: &[OsString]) -> Result<(ArgMatches, Vec<InForce>), clap::Error> {
        self.parse_in(words, &|name| std::env::var_os(name))
    }

    /// As [`Settings::parse`], in an environment. The command's own look at the environment is clap's.
    fn parse_in(
        &self,
        words: &[OsString],
        environment: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<(ArgMatches, Vec<InForce>), clap::Error> {
        let path =
            typed(words, CONFIG).or_else(|| environment(&variable(self.prefix, CONFIG))).map(PathBuf::from);
        let known = self.names();
        let entries = match &path {
            None => BTreeMap::new(),
            Some(path) => file::read(path, &known)
                .map_err(|error| clap::Error::raw(ErrorKind::Io, format!("{error}\n")))?,
        };
        let open = |name: &str| !is_typed(words, name) && environment(&variable(self.prefix, name)).is_none();
        let from_file: BTreeMap<String, Entry> = entries.into_iter().filter(|(name, _)| open(name)).collect();
        let mut all = vec![OsString::from(self.command.get_name())];
        // Before what was typed, as after a `--` nothing is a flag.
        all.extend(from_file.iter().filter_map(|(name, entry)| self.as_typed(name, &entry.value)));
        all.extend(words.iter().cloned());
        let matches = self
            .command
            .clone()
            .try_get_matches_from(all)
            .map_err(|error| place(error, path.as_deref(), &from_file))?;
        let in_force = self.in_force(&matches, path.as_deref(), &from_file);
        Ok((matches, in_force))
    }

    /// A file's setting as a word of the command line; nothing for a switch that is off.
    fn as_typed(&self, name: &str, value: &str) -> Option<OsString> {
        let arg = self.command.get_arguments().find(|arg| arg.get_long() == Some(name))?;
        match (arg.get_action(), value) {
            (ArgAction::SetTrue, "false") => None,
            (ArgAction::SetTrue, "true") => Some(format!("--{name}").into()),
            _ => Some(format!("--{name}={value}").into()),
        }
    }

    fn in_force(
        &self,
        matches: &ArgMatches,
        path: Option<&Path>,
        from_file: &BTreeMap<String, Entry>,
    ) -> Vec<InForce> {
        let setting = |arg: &Arg| {
            let name = arg.get_long().filter(|long| self.names().contains(long))?;
            let id = arg.get_id().as_str();
            let values: Vec<String> =
                matches.get_raw(id)?.map(|value| value.to_string_lossy().into_owned()).collect();
            let source = match (from_file.get(name), path, matches.value_source(id)?) {
                (Some(entry), Some(path), _) => format!("{}:{}", path.display(), entry.line),
                (_, _, ValueSource::EnvVariable) => format!("environment {}", variable(self.prefix, name)),
                (_, _, ValueSource::DefaultValue) => "default".to_owned(),
                _ => "flag".to_owned(),
            };
            Some(InForce { name: name.to_owned(), value: values.join(","), source })
        };
        self.command.get_arguments().filter_map(setting).collect()
    }
}

/// The settings in force as a file that `--config` takes, each line with its source.
pub fn print(settings: &[InForce]) -> String {
    let width = settings.iter().map(|it| it.name.len() + it.value.len()).max().unwrap_or(0) + 4;
    let mut text = String::new();
    for InForce { name, value, source } in settings {
        // Quoted as YAML wants it: a JSON string is one.
        let line = format!("{name}: \"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
        writeln!(text, "{line:width$} # {source}").expect("writing to a String never fails");
    }
    text
}

fn variable(prefix: &str, name: &str) -> String {
    format!("{prefix}{}", name.replace('-', "_").to_uppercase())
}

/// The value of a flag among the words.
fn typed(words: &[OsString], name: &str) -> Option<OsString> {
    let (flag, joined) = (format!("--{name}"), format!("--{name}="));
    let mut words = words.iter().take_while(|word| *word != OsStr::new("--"));
    while let Some(word) = words.next() {
        if *word == *flag {
            return words.next().cloned();
        }
        if let Some(value) = word.to_str().and_then(|word| word.strip_prefix(&joined)) {
            return Some(value.into());
        }
    }
    None
}

fn is_typed(words: &[OsString], name: &str) -> bool {
    words.iter().any(|word| *word == *format!("--{name}")) || typed(words, name).is_some()
}

/// Says of a value that the file gave where it stands.
fn place(error: clap::Error, path: Option<&Path>, from_file: &BTreeMap<String, Entry>) -> clap::Error {
    let Some(ContextValue::String(arg)) = error.get(ContextKind::InvalidArg) else { return error };
    let name = arg.trim_start_matches('-').split([' ', '=']).next().unwrap_or_default();
    match (from_file.get(name), path) {
        (Some(entry), Some(path)) => {
            let said = error.render().to_string();
            let first = said.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
            clap::Error::raw(error.kind(), format!("{}:{}: {first}\n", path.display(), entry.line))
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use clap::Args;

    use super::*;

    #[derive(Debug, Args)]
    struct Sample {
        /// The node.
        #[arg(long, value_name = "NAME")]
        node: String,
        /// How many.
        #[arg(long, value_name = "N", default_value_t = 3)]
        count: u16,
        /// A switch.
        #[arg(long)]
        quick: bool,
    }

    fn settings() -> Settings {
        Settings::new(Sample::augment_args(Command::new("sample")), "NODEMESH_SETTINGS_TEST_")
    }

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn in_force(line: &str, environment: &[(&str, &str)]) -> Result<Vec<(String, String, String)>, String> {
        let look =
            |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        let settings = settings();
        let (_, found) = settings.parse_in(&words(line), &look).map_err(|error| error.to_string())?;
        Ok(found.into_iter().map(|it| (it.name, it.value, it.source)).collect())
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = file("node: of-file\ncount: 7\nquick: true\n");
        let path = file.path().display().to_string();
        let found = in_force(&format!("--config {path} --count 9"), &[]).unwrap();
        assert_eq!(found[0], ("node".into(), "of-file".into(), format!("{path}:1")));
        assert_eq!(found[1], ("count".into(), "9".into(), "flag".into()));
        assert_eq!(found[2].1, "true");
        let found = in_force("--node n", &[]).unwrap();
        assert_eq!(found[1], ("count".into(), "3".into(), "default".into()));
    }

    #[test]
    fn the_environment_names_the_file_and_wins_over_it() {
        let file = file("node: of-file\ncount: 7\n");
        let path = file.path().display().to_string();
        let environment =
            [("NODEMESH_SETTINGS_TEST_CONFIG", path.as_str()), ("NODEMESH_SETTINGS_TEST_COUNT", "8")];
        let found = in_force("", &environment).unwrap();
        // The environment's own value is clap's to read, which this one is not set for: what shows is that the
        // file's gave way.
        assert_eq!(found[1], ("count".into(), "3".into(), "default".into()));
        assert_eq!(found[0].1, "of-file");
    }

    #[test]
    fn a_wrong_value_in_the_file_is_named_by_its_line() {
        let file = file("node: n\ncount: many\n");
        let path = file.path().display().to_string();
        let said = in_force(&format!("--config={path}"), &[]).unwrap_err();
        assert!(said.contains(&format!("{path}:2: invalid value 'many'")), "{said}");
        let said = in_force("--count 1", &[]).unwrap_err();
        assert!(said.contains("--node"), "{said}");
    }

    #[test]
    fn what_is_printed_is_a_file_that_means_the_same() {
        let (_, found) = settings().parse_in(&words("--node n1"), &|_| None).unwrap();
        let printed = file(&print(&found));
        let line = format!("--config {}", printed.path().display());
        let (_, again) = settings().parse_in(&words(&line), &|_| None).unwrap();
        let values =
            |all: &[InForce]| all.iter().map(|it| (it.name.clone(), it.value.clone())).collect::<Vec<_>>();
        assert_eq!(values(&found), values(&again));
    }
}
