//! `diff`: two adapters token by token, or two models row by row.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;
use trainable_tokens_core::TokenId;
use trainable_tokens_format::{
    Adapter, AdapterDiff, AdapterModule, Checkpoint, CheckpointDiff, RowDiff, TensorDiff, TensorDifference,
};
use trainable_tokens_trainer::Vocabulary;

use crate::args::{Cli, DiffArgs};
use crate::output::print;
use crate::rows::text_table;

#[derive(Serialize)]
struct Output {
    kind: &'static str,
    /// Whether nothing differs, bit for bit.
    equal: bool,
    /// Of adapters: their modules. Of models: the tables of token vectors with rows that differ.
    tables: Vec<TableOutput>,
    /// Other tensors that differ.
    tensors: Vec<TensorOutput>,
}

#[derive(Serialize)]
struct TableOutput {
    /// A module of adapters, or a tensor of models.
    name: String,
    /// Rows whose bits differ.
    changed: usize,
    only_in_a: usize,
    only_in_b: usize,
    /// Of adapters all tokens, of models the rows that differ; as many as asked for.
    rows: Vec<RowOutput>,
}

#[derive(Serialize)]
struct RowOutput {
    token_id: u32,
    token: Option<String>,
    #[serde(flatten)]
    row: Row,
}

#[derive(Serialize)]
#[serde(tag = "in", rename_all = "snake_case")]
enum Row {
    /// Numbers that are not finite, and the cosine with a row of zeros, are null.
    Both {
        norm_a: f64,
        norm_b: f64,
        cosine: f64,
        distance: f64,
    },
    #[serde(rename = "a")]
    OnlyA,
    #[serde(rename = "b")]
    OnlyB,
}

#[derive(Serialize)]
struct TensorOutput {
    name: String,
    difference: &'static str,
    /// Element types or shapes of both, where they differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    a: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b: Option<serde_json::Value>,
}

pub(super) fn run(args: &DiffArgs, cli: &Cli) -> Result<()> {
    let [a, b] = [args.a.as_path(), args.b.as_path()];
    let output = match [is_adapter(a)?, is_adapter(b)?] {
        [true, true] => adapters(a, b, args.limit)?,
        [false, false] => models(a, b, args.limit)?,
        [is_adapter, _] => {
            let (adapter, model) = if is_adapter { (a, b) } else { (b, a) };
            bail!(
                "{} is an adapter and {} is none; compare two of a kind, or see `inspect ADAPTER --model MODEL`",
                adapter.display(),
                model.display()
            )
        }
    };
    print(cli.json, &output, to_text)
}

fn is_adapter(dir: &Path) -> Result<bool> {
    if fs::metadata(dir).is_err() {
        bail!("{} does not exist", dir.display());
    }
    Ok(dir.join("adapter_config.json").is_file())
}

fn adapters(a: &Path, b: &Path, limit: usize) -> Result<Output> {
    let (a, b) = (Adapter::read(a)?, Adapter::read(b)?);
    let diff = AdapterDiff::between(&a, &b)?;
    let tables = diff.modules.iter().map(|module| {
        let tokens = recorded_tokens(&[&a, &b], &module.path);
        TableOutput::new(
            &module.path,
            module.changed(),
            [&module.only_in_first, &module.only_in_second],
            module.rows.iter().copied(),
            limit,
            |id| Ok(tokens.get(&id).cloned()),
        )
    });
    Ok(Output {
        kind: "adapters",
        equal: diff.is_empty(),
        tables: tables.collect::<Result<_>>()?,
        tensors: diff.tensors.iter().map(TensorOutput::of).collect(),
    })
}

/// The strings of tokens by their ids, as far as adapters record them.
fn recorded_tokens(adapters: &[&Adapter], path: &str) -> BTreeMap<TokenId, String> {
    let mut known = BTreeMap::new();
    for adapter in adapters {
        let module = adapter.module(path);
        let tokens = module.and_then(|module| adapter.module_metadata(module.path()).tokens);
        let ids = module.map(AdapterModule::token_ids).unwrap_or_default();
        known.extend(ids.into_iter().zip(tokens.unwrap_or_default()));
    }
    known
}

fn models(a: &Path, b: &Path, limit: usize) -> Result<Output> {
    let vocabulary = [b, a]
        .map(Vocabulary::of_model)
        .into_iter()
        .find(Vocabulary::exists);
    let (a, b) = (Checkpoint::open(a)?, Checkpoint::open(b)?);
    let diff = CheckpointDiff::between(&a, &b)?;
    let token = |id: TokenId| match &vocabulary {
        Some(vocabulary) => Ok(vocabulary.token(id.0)?),
        None => Ok(None),
    };
    let tables = diff.tables.iter().map(|table| {
        let only: [Vec<_>; 2] = [table.removed().collect(), table.added().collect()];
        let (name, changed) = (&table.tensor, table.changed.len());
        TableOutput::new(
            name,
            changed,
            [&only[0], &only[1]],
            table.rows(&a, &b)?,
            limit,
            token,
        )
    });
    Ok(Output {
        kind: "models",
        equal: diff.is_empty(),
        tables: tables.collect::<Result<_>>()?,
        tensors: diff.tensors.iter().map(TensorOutput::of).collect(),
    })
}

impl TableOutput {
    fn new(
        name: &str,
        changed: usize,
        [only_a, only_b]: [&[TokenId]; 2],
        rows: impl Iterator<Item = RowDiff>,
        limit: usize,
        token: impl Fn(TokenId) -> Result<Option<String>>,
    ) -> Result<Self> {
        let both = rows.map(|row| (row.id, Row::of(&row)));
        let of_a = only_a.iter().map(|id| (*id, Row::OnlyA));
        let of_b = only_b.iter().map(|id| (*id, Row::OnlyB));
        let rows = both.chain(of_a).chain(of_b).take(limit);
        let rows = rows.map(|(id, row)| {
            Ok(RowOutput {
                token_id: id.0,
                token: token(id)?,
                row,
            })
        });
        Ok(Self {
            name: name.to_owned(),
            changed,
            only_in_a: only_a.len(),
            only_in_b: only_b.len(),
            rows: rows.collect::<Result<_>>()?,
        })
    }
}

impl Row {
    fn of(row: &RowDiff) -> Self {
        Self::Both {
            norm_a: row.norms[0],
            norm_b: row.norms[1],
            cosine: row.cosine,
            distance: row.distance,
        }
    }
}

impl TensorOutput {
    fn of(diff: &TensorDiff) -> Self {
        let (difference, a, b) = match &diff.difference {
            TensorDifference::OnlyInFirst => ("only_in_a", None, None),
            TensorDifference::OnlyInSecond => ("only_in_b", None, None),
            TensorDifference::DType([a, b]) => (
                "dtype",
                Some(format!("{a:?}").into()),
                Some(format!("{b:?}").into()),
            ),
            TensorDifference::Shape([a, b]) => ("shape", Some(a.clone().into()), Some(b.clone().into())),
            TensorDifference::Values => ("values", None, None),
        };
        Self {
            name: diff.tensor.clone(),
            difference,
            a,
            b,
        }
    }
}

fn to_text(output: &Output) -> String {
    if output.equal {
        let kind = output.kind;
        return format!("the {kind} are equal, bit for bit\n");
    }
    let tables = output.tables.iter().map(TableOutput::to_text);
    let tensors = output.tensors.iter().map(TensorOutput::to_text);
    tables.chain(tensors).collect()
}

impl TableOutput {
    fn to_text(&self) -> String {
        let mut text = format!(
            "{}: {} rows differ, {} only in A, {} only in B\n",
            self.name, self.changed, self.only_in_a, self.only_in_b
        );
        if self.rows.is_empty() {
            return text;
        }
        let rows = self.rows.iter().map(|row| {
            let token = row.token.as_deref();
            let mut cells = vec![
                row.token_id.to_string(),
                token.map_or_else(String::new, |token| format!("{token:?}")),
            ];
            cells.extend(match row.row {
                Row::Both {
                    norm_a,
                    norm_b,
                    cosine,
                    distance,
                } => [norm_a, norm_b, cosine, distance].map(|number| format!("{number:.4}")),
                Row::OnlyA => ["only in A", "", "", ""].map(str::to_owned),
                Row::OnlyB => ["", "only in B", "", ""].map(str::to_owned),
            });
            cells
        });
        text += &text_table(
            &["#id", "token", "#norm in A", "#norm in B", "#cosine", "#distance"],
            rows,
        );
        text
    }
}

impl TensorOutput {
    fn to_text(&self) -> String {
        let sides = match (&self.a, &self.b) {
            (Some(a), Some(b)) => format!(" {a} and {b}"),
            _ => String::new(),
        };
        format!("{}: {}{sides}\n", self.name, self.difference.replace('_', " "))
    }
}
