//! The options of `train` in a file: `--config`, and what is written beside an adapter.

use std::any::TypeId;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::error::ContextKind;
use clap::{Arg, ArgGroup, ArgMatches, Command, CommandFactory, FromArgMatches};
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Value};

use crate::args::{self, Cli, TrainArgs};
use crate::tokens::{CommaList, TokenLr, escape_commas, split_commas};

/// The command whose options a file may hold.
const COMMAND: &str = "train";
/// Options that say where a run comes from, which is no part of what it is.
const NOT_IN_A_FILE: [&str; 2] = ["config", "resume"];

/// Parses the command line; of `train`, with the options of the file that it names. Ends the program if the usage is wrong.
///
/// # Errors
///
/// A file that cannot be read, with the line and the key at fault.
pub(crate) fn parse(args: Vec<OsString>) -> Result<Cli> {
    // A number below 0 is a value, whether or not it is a good one.
    let number = |arg: Arg| {
        let takes_values = arg.get_action().takes_values();
        arg.allow_negative_numbers(takes_values)
    };
    let mut command = Cli::command().mut_subcommands(|command| command.mut_args(number));
    let file = named_file(&args)
        .map(|path| ConfigFile::read(&path))
        .transpose()?;
    let given = given(&args);
    let added = match &file {
        None => Vec::new(),
        Some(file) => file.arguments(&options(&command), &given)?,
    };
    let matches = match command.try_get_matches_from_mut(args.into_iter().chain(added)) {
        Ok(matches) => matches,
        Err(error) => match file.and_then(|file| file.blame(&error, &given)) {
            Some(blamed) => return Err(blamed),
            None => error.exit(),
        },
    };
    Ok(with_resolved(&matches).unwrap_or_else(|error| error.exit()))
}

/// The options of a run of `train` that another command makes, as if the command line gave them.
pub(crate) fn train_args(args: impl IntoIterator<Item = OsString>) -> Result<Box<TrainArgs>> {
    let start = ["trainable-tokens", COMMAND].map(OsString::from);
    let matches = Cli::command().try_get_matches_from(start.into_iter().chain(args))?;
    match with_resolved(&matches)?.command {
        args::Command::Train(args) => Ok(args),
        _ => bail!("{COMMAND} is not the command"),
    }
}

/// The command line; of `train`, all options as a file has them too.
fn with_resolved(matches: &ArgMatches) -> clap::error::Result<Cli> {
    let mut cli = Cli::from_arg_matches(matches)?;
    if let (args::Command::Train(args), Some(matches)) =
        (&mut cli.command, matches.subcommand_matches(COMMAND))
    {
        args.resolved = resolved(&options(&Cli::command()), matches);
    }
    Ok(cli)
}

/// `train`, whose options these are.
fn options(command: &Command) -> Command {
    command.find_subcommand(COMMAND).cloned().unwrap_or_default()
}

/// The file that the command line names, if the command takes one.
fn named_file(args: &[OsString]) -> Option<PathBuf> {
    let mut rest = args.iter().skip(1);
    // Options before the command are switches, without values.
    let command = rest.find(|arg| !arg.to_string_lossy().starts_with('-'))?;
    if command != COMMAND {
        return None;
    }
    while let Some(arg) = rest.next() {
        if arg == "--config" {
            return rest.next().map(PathBuf::from);
        }
        if let Some(path) = arg.to_string_lossy().strip_prefix("--config=") {
            return Some(PathBuf::from(path));
        }
    }
    None
}

/// The names of the options that the command line gives.
fn given(args: &[OsString]) -> BTreeSet<String> {
    let names = args.iter().filter_map(|arg| {
        let arg = arg.to_string_lossy();
        let name = arg.strip_prefix("--")?;
        Some(name.split('=').next().unwrap_or_default().to_owned())
    });
    names.collect()
}

/// A file of options.
struct ConfigFile {
    path: PathBuf,
    entries: Vec<Entry>,
}

/// One option: its name as on the command line, where it is, and its values as text.
struct Entry {
    name: String,
    line: usize,
    value: Text,
}

enum Text {
    Switch(bool),
    One(String),
    List(Vec<String>),
}

impl ConfigFile {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let line_of = |span: Range<usize>| {
            1 + text
                .bytes()
                .take(span.start)
                .filter(|byte| *byte == b'\n')
                .count()
        };
        let table = DeTable::parse(&text).map_err(|error| {
            let line = line_of(error.span().unwrap_or_default());
            anyhow!("{}, line {line}: {}", path.display(), error.message())
        })?;
        let mut entries: Vec<Entry> = Vec::new();
        for (key, value) in table.into_inner() {
            let (line, key) = (line_of(key.span()), key.into_inner());
            let name = key.replace('_', "-");
            if entries.iter().any(|other| other.name == name) {
                bail!("{}, line {line}: {key} is given twice", path.display());
            }
            let value = Text::of(&value).ok_or_else(|| {
                anyhow!(
                    "{}, line {line}: {key} must be a string, a number, true or false, or a list of these",
                    path.display()
                )
            })?;
            entries.push(Entry { name, line, value });
        }
        entries.sort_by_key(|entry| entry.line);
        let path = path.to_owned();
        Ok(Self { path, entries })
    }

    /// The options as arguments, without those that the command line gives itself and those that say what holds anyway.
    fn arguments(&self, command: &Command, given: &BTreeSet<String>) -> Result<Vec<OsString>> {
        let mut arguments = Vec::new();
        for entry in &self.entries {
            let wrong = |reason: String| anyhow!("{}, line {}: {reason}", self.path.display(), entry.line);
            let arg = entry.option(command).map_err(wrong)?;
            let values = entry.values(arg).map_err(wrong)?;
            if !is_given(arg, command, given) && !is_default(arg, &values) {
                let argument = |value: &String| OsString::from(format!("--{}={value}", entry.name));
                arguments.extend(values.iter().map(argument));
            }
        }
        Ok(arguments)
    }

    /// What the file has to do with wrong usage, if it has.
    fn blame(&self, error: &clap::Error, given: &BTreeSet<String>) -> Option<anyhow::Error> {
        let culprit = error.get(ContextKind::InvalidArg)?.to_string();
        let name = culprit.strip_prefix("--")?;
        let name = name
            .split([' ', '=', '['])
            .next()
            .filter(|name| !given.contains(*name))?;
        let entry = self.entries.iter().find(|entry| entry.name == name)?;
        let message = error.to_string();
        let message = message.lines().next()?.trim_start_matches("error: ").to_owned();
        Some(anyhow!("{}, line {}: {message}", self.path.display(), entry.line))
    }
}

impl Text {
    fn of(value: &Spanned<DeValue<'_>>) -> Option<Self> {
        Some(match value.get_ref() {
            DeValue::Boolean(switch) => Self::Switch(*switch),
            DeValue::Array(items) => {
                let items = items.iter().map(|item| match Self::of(item)? {
                    Self::One(text) => Some(text),
                    Self::Switch(_) | Self::List(_) => None,
                });
                Self::List(items.collect::<Option<_>>()?)
            }
            DeValue::String(text) => Self::One(text.to_string()),
            DeValue::Integer(number) => Self::One(
                i64::from_str_radix(number.as_str(), number.radix())
                    .ok()?
                    .to_string(),
            ),
            DeValue::Float(number) => Self::One(number.as_str().to_owned()),
            DeValue::Datetime(_) | DeValue::Table(_) => return None,
        })
    }
}

impl Entry {
    /// The option of this name.
    fn option<'a>(&self, command: &'a Command) -> Result<&'a Arg, String> {
        let named = command
            .get_arguments()
            .filter_map(|arg| Some((arg.get_long()?, arg)));
        let named = named.filter(|(long, _)| !NOT_IN_A_FILE.contains(long));
        let nearness = |long: &str| strsim::jaro_winkler(long, &self.name);
        let nearest = named.max_by(|(a, _), (b, _)| nearness(a).total_cmp(&nearness(b)));
        match nearest {
            Some((long, arg)) if long == self.name => Ok(arg),
            Some((long, _)) => Err(format!("unknown key '{}'; the nearest is '{long}'", self.name)),
            None => Err(format!("unknown key '{}'", self.name)),
        }
    }

    /// The values, each as text for one occurrence of the option.
    fn values(&self, arg: &Arg) -> Result<Vec<String>, String> {
        let name = &self.name;
        match (&self.value, arg.get_value_delimiter()) {
            (Text::Switch(switch), _) if has_type::<bool>(arg) => Ok(vec![switch.to_string()]),
            (Text::Switch(_), _) => Err(format!("{name} is neither true nor false")),
            (_, _) if has_type::<bool>(arg) => Err(format!("{name} must be true or false")),
            (Text::One(text), _) => Ok(vec![text.clone()]),
            (Text::List(_), _) if !is_list(arg) => Err(format!("{name} takes one value, not a list")),
            (Text::List(items), _) if is_comma_list(arg) => {
                Ok(items.iter().map(|item| escape_commas(item)).collect())
            }
            (Text::List(items), None) => Ok(items.clone()),
            (Text::List(items), Some(delimiter)) => {
                match items.iter().find(|item| item.contains(delimiter)) {
                    None => Ok(vec![items.join(&delimiter.to_string())]),
                    Some(item) => Err(format!("'{item}' holds a '{delimiter}', which separates values")),
                }
            }
        }
    }
}

/// Whether the command line gives an option, or another that takes its place.
fn is_given(arg: &Arg, command: &Command, given: &BTreeSet<String>) -> bool {
    let is_given = |arg: &Arg| arg.get_long().is_some_and(|long| given.contains(long));
    let takes_its_place = |other: &Arg| {
        let mut groups = command.get_groups().cloned();
        groups.any(|mut group| {
            let holds = |arg: &Arg, group: &ArgGroup| group.get_args().any(|id| id == arg.get_id());
            !group.is_multiple() && holds(arg, &group) && holds(other, &group)
        })
    };
    is_given(arg)
        || command
            .get_arguments()
            .any(|other| is_given(other) && takes_its_place(other))
}

/// Whether an option has these values without being given.
fn is_default(arg: &Arg, values: &[String]) -> bool {
    let defaults = arg.get_default_values();
    let same = |(value, default): (&String, &clap::builder::OsStr)| {
        let default = default.to_string_lossy();
        let number = |text: &str| text.parse::<f64>().ok().filter(|_| has_type::<f64>(arg));
        *value == default || number(value).is_some_and(|value| number(&default) == Some(value))
    };
    values.len() == defaults.len() && values.iter().zip(defaults).all(same)
}

fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), clap::ArgAction::Append)
}

/// Whether the values of an option are lists of tokens in its own way.
fn is_comma_list(arg: &Arg) -> bool {
    has_type::<CommaList<String>>(arg) || has_type::<CommaList<TokenLr>>(arg)
}

fn has_type<T: 'static>(arg: &Arg) -> bool {
    arg.get_value_parser().type_id() == TypeId::of::<T>()
}

/// The options of a run, defaults included, as a file that `--config` takes.
fn resolved(command: &Command, matches: &ArgMatches) -> String {
    let mut text =
        "# Options of the run that trained this adapter, for `trainable-tokens train --config`.\n".to_owned();
    for arg in command.get_arguments() {
        let (Some(long), id) = (arg.get_long(), arg.get_id().as_str()) else {
            continue;
        };
        if NOT_IN_A_FILE.contains(&long) {
            continue;
        }
        let values = matches.try_get_raw(id).ok().flatten();
        let values = values.into_iter().flatten();
        let mut values: Vec<Value> = values.flat_map(|raw| typed(arg, raw)).collect();
        let value = match (is_list(arg), values.pop()) {
            (_, None) => continue,
            (false, Some(value)) => value,
            (true, Some(last)) => Value::Array(values.into_iter().chain([last]).collect()),
        };
        text.push_str(&format!("{long} = {value}\n"));
    }
    text
}

/// A value as TOML has it; several of a list of tokens.
fn typed(arg: &Arg, raw: &OsStr) -> Vec<Value> {
    let raw = raw.to_string_lossy();
    if is_comma_list(arg) {
        return split_commas(&raw).into_iter().map(Value::String).collect();
    }
    let number = |text: &str| -> Option<Value> {
        if has_type::<bool>(arg) {
            text.parse().ok().map(Value::Boolean)
        } else if has_type::<f64>(arg) {
            text.parse().ok().map(Value::Float)
        } else if has_type::<u64>(arg) || has_type::<usize>(arg) {
            text.parse().ok().map(Value::Integer)
        } else {
            None
        }
    };
    vec![number(&raw).unwrap_or_else(|| Value::String(raw.into_owned()))]
}
