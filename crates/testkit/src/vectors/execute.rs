//! Doing what a case says.

use std::fs;
use std::path::Path;

use trainable_tokens_core::{
    BackendError, EmbeddingSource, LookupPlan, OptimizerHook, Overlap, TokenRows, TokenSet,
};
use trainable_tokens_format::{Adapter, Overwrite, TrainingState, digest};

use super::Tensors;
use super::schema::{AdapterFile, HookSpec, Operation, OptimizerSpec, VectorCase};
use crate::failure::{ensure, same};
use crate::world::{select, whole};
use crate::{Failure, Harness, HeadPass, Layer, Outcome, Pass};

/// Why a case ends without values: an error of a known kind, or another reason.
pub(super) struct Ended {
    pub(super) kind: Option<String>,
    pub(super) reason: String,
}

impl<E: BackendError> From<E> for Ended {
    fn from(error: E) -> Self {
        Self {
            kind: Some(format!("{:?}", error.kind())),
            reason: error.to_string(),
        }
    }
}

impl Ended {
    #[expect(clippy::needless_pass_by_value, reason = "for map_err")]
    fn other(failure: Failure) -> Self {
        Self::without_kind(failure.reason().to_owned())
    }

    fn without_kind(reason: String) -> Self {
        Self { kind: None, reason }
    }
}

type Outputs = Vec<(String, TokenRows)>;

/// Runs a case; returns its outputs by name.
pub(super) fn execute<H: Harness>(
    case: &VectorCase,
    tensors: &Tensors,
    dir: &Path,
) -> Result<Tensors, Ended> {
    let layer = |ids: &[u32]| -> Result<Layer<H>, Ended> {
        let source = H::source(input(tensors, "table")?)?;
        let tokens = TokenSet::new(ids.iter().copied(), source.vocab_size())?;
        Ok(Layer::<H>::with_rows(source, tokens, input(tensors, "rows")?)?)
    };
    let outputs = match &case.operation {
        Operation::TokenSet {
            token_indices,
            vocab_size,
        } => {
            TokenSet::new(token_indices.iter().copied(), *vocab_size)?;
            Vec::new()
        }
        Operation::Lookup {
            token_indices,
            input_ids,
            options,
        } => {
            let layer = layer(token_indices)?.with_options(options.layer_options()?);
            lookup::<H>(&layer, input_ids, tensors.get("upstream"))?
        }
        Operation::Several {
            adapters,
            weights,
            choice,
            input_ids,
            options,
        } => {
            let source = H::source(input(tensors, "table")?)?;
            let mut layer = Layer::<H>::frozen(source)?.with_options(options.layer_options()?);
            let names = add_adapters::<H>(&mut layer, adapters, input(tensors, "rows")?)?;
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let plan = if let Some(choice) = choice {
                let choice: Vec<_> = choice.iter().map(|at| at.map(|at| names[at])).collect();
                layer.plan_mixed(input_ids, &choice)?
            } else {
                let overlap = weights.clone().map_or(Overlap::LastWins, Overlap::WeightedMean);
                layer.activate_overlapping(&names, overlap)?;
                layer.plan(input_ids)?
            };
            several::<H>(&layer, plan, input(tensors, "upstream")?)?
        }
        Operation::Head { token_indices } => head::<H>(
            &layer(token_indices)?,
            input(tensors, "hidden")?,
            input(tensors, "upstream")?,
        )?,
        Operation::Merge { token_indices } => merge::<H>(layer(token_indices)?, input(tensors, "table")?)?,
        Operation::Optimizer {
            optimizer,
            hooks,
            steps,
        } => {
            let inputs = Steps {
                rows: input(tensors, "rows")?,
                gradients: input(tensors, "gradients")?,
                original: tensors.get("original"),
                count: *steps,
            };
            optimize::<H>(*optimizer, hooks, &inputs)?
        }
        Operation::Adapter(file) => {
            let layer = layer(&file.token_indices)?;
            adapter::<H>(file, &layer, dir).map_err(Ended::other)?;
            let read = Adapter::read(dir.join(&file.directory))?;
            let missing = || Ended::without_kind(format!("the file has no rows of {}", file.module));
            vec![(
                "rows".to_owned(),
                read.rows(&file.module).ok_or_else(missing)?.clone(),
            )]
        }
        Operation::TrainingState {
            directory,
            step,
            extra,
        } => {
            let path = dir.join(directory).join(TrainingState::FILE_NAME);
            let state = TrainingState::read(&path)?;
            let (bytes, again) = (fs::read(&path), state.to_bytes()?);
            let fits = bytes.is_ok_and(|bytes| bytes == again);
            let known = state.optimizer.step == *step && state.extra == *extra;
            training_state_is(fits, known).map_err(Ended::other)?;
            state.optimizer.tensors
        }
    };
    Ok(outputs.into_iter().collect())
}

fn input<'a>(tensors: &'a Tensors, name: &str) -> Result<&'a TokenRows, Ended> {
    let missing = || Ended::without_kind(format!("there is no tensor {name}"));
    tensors.get(name).ok_or_else(missing)
}

fn lookup<H: Harness>(layer: &Layer<H>, ids: &[u32], upstream: Option<&TokenRows>) -> Result<Outputs, Ended> {
    let plan = layer.plan(ids)?;
    let mut outputs = vec![("output".to_owned(), H::read(&layer.lookup_planned(&plan)?)?)];
    if let Some(upstream) = upstream {
        let pass = Pass {
            lookups: vec![(plan, upstream.clone())],
            ..Pass::default()
        };
        let gradient = layer.gradient(&H::backward(layer, &pass)?.gradients)?;
        outputs.push(("gradient".to_owned(), gradient));
    }
    Ok(outputs)
}

/// Adds adapters of these tokens with their parts of the stacked rows; returns their names.
fn add_adapters<H: Harness>(
    layer: &mut Layer<H>,
    adapters: &[Vec<u32>],
    rows: &TokenRows,
) -> Result<Vec<String>, Ended> {
    let (mut names, mut start) = (Vec::new(), 0);
    for (tokens, at) in adapters.iter().zip(0..) {
        let slots: Vec<u32> = (0u32..).skip(start).take(tokens.len()).collect();
        start += tokens.len();
        let rows = select(rows, &slots).map_err(Ended::other)?;
        let name = format!("adapter {at}");
        let tokens = TokenSet::new(tokens.iter().copied(), layer.source().vocab_size())?;
        layer.add_adapter_with_rows(&name, tokens, &rows)?;
        names.push(name);
    }
    Ok(names)
}

fn several<H: Harness>(layer: &Layer<H>, plan: LookupPlan, upstream: &TokenRows) -> Result<Outputs, Ended> {
    let output = H::read(&layer.lookup_planned(&plan)?)?;
    let pass = Pass {
        lookups: vec![(plan, upstream.clone())],
        ..Pass::default()
    };
    let gradients = H::backward(layer, &pass)?.gradients;
    let parts = layer.adapters().map(|adapter| adapter.gradient(&gradients));
    let parts: Vec<TokenRows> = parts.collect::<Result<_, _>>()?;
    let bytes: Vec<u8> = parts.iter().flat_map(TokenRows::to_le_bytes).collect();
    let rows = parts.iter().map(TokenRows::num_rows).sum();
    let dtype = parts.first().map_or(H::DTYPE, TokenRows::dtype);
    let gradient = TokenRows::from_le_bytes(dtype, rows, upstream.embedding_dim(), &bytes)?;
    Ok(vec![
        ("output".to_owned(), output),
        ("gradient".to_owned(), gradient),
    ])
}

fn head<H: Harness>(layer: &Layer<H>, hidden: &TokenRows, upstream: &TokenRows) -> Result<Outputs, Ended> {
    let logits = H::read(&layer.logits(H::hidden(layer, hidden)?)?)?;
    let pass = Pass {
        heads: vec![HeadPass::new(hidden.clone(), upstream.clone())],
        ..Pass::default()
    };
    let mut result = H::backward(layer, &pass)?;
    let gradient = layer.gradient(&result.gradients)?;
    let missing = || Ended::without_kind("the harness returned no gradient of the hidden states".to_owned());
    let hidden_gradient = result.hidden.pop().ok_or_else(missing)?;
    let outputs = [
        ("logits", logits),
        ("gradient", gradient),
        ("hidden_gradient", hidden_gradient),
    ];
    Ok(outputs.map(|(name, rows)| (name.to_owned(), rows)).into())
}

fn merge<H: Harness>(mut layer: Layer<H>, table: &TokenRows) -> Result<Outputs, Ended> {
    let all: Vec<u32> = (0u32..).take(layer.source().vocab_size()).collect();
    let unmerged = H::read(&layer.lookup(&all)?)?;
    layer.merge()?;
    let merged = whole::<H>(&layer).map_err(Ended::other)?;
    same("the lookup before merging", &unmerged, &merged).map_err(Ended::other)?;
    layer.unmerge()?;
    let restored = whole::<H>(&layer).map_err(Ended::other)?;
    same("the table after unmerging", &restored, table).map_err(Ended::other)?;
    Ok(vec![("merged".to_owned(), merged)])
}

fn training_state_is(fits: bool, known: bool) -> Outcome {
    ensure!(fits, "writing the training state again gives other bytes");
    ensure!(known, "step or extra differ from the case's");
    Ok(())
}

struct Steps<'a> {
    rows: &'a TokenRows,
    gradients: &'a TokenRows,
    original: Option<&'a TokenRows>,
    count: usize,
}

/// The steps on the harness's own store: a table of zeros under the rows.
fn optimize<H: Harness>(
    spec: OptimizerSpec,
    hooks: &[HookSpec],
    steps: &Steps<'_>,
) -> Result<Outputs, Ended> {
    let [k, dim] = steps.rows.shape();
    let source = H::source(&TokenRows::zeros(H::DTYPE, k, dim))?;
    let tokens = TokenSet::new((0u32..).take(k), k)?;
    let mut layer = Layer::<H>::with_rows(source, tokens, steps.rows)?;
    let mut optimizer = spec.build()?;
    let mut hooks = hooks
        .iter()
        .map(|hook| hook.build(steps.original))
        .collect::<Result<Vec<_>, _>>()?;
    let mut after = Vec::new();
    for step in 0..steps.count {
        let slots: Vec<u32> = (0u32..).skip(step * k).take(k).collect();
        let gradient = select(steps.gradients, &slots).map_err(Ended::other)?;
        let mut hooks: Vec<&mut dyn OptimizerHook> = hooks.iter_mut().map(|hook| &mut **hook as _).collect();
        layer.step_with(gradient, &mut *optimizer, &mut hooks)?;
        after.extend(layer.rows()?.to_le_bytes());
    }
    let after = TokenRows::from_le_bytes(steps.rows.dtype(), steps.count * k, dim, &after)?;
    let mut outputs = optimizer.state().tensors;
    outputs.push(("rows_after".to_owned(), after));
    Ok(outputs)
}

/// Writes the adapter anew and compares both files with the directory's.
fn adapter<H: Harness>(file: &AdapterFile, layer: &Layer<H>, dir: &Path) -> Outcome {
    let table = digest(layer.source())?;
    ensure!(
        table.to_string() == file.base_digest,
        "the digest of the table is {table}"
    );
    let mut builder = Adapter::builder(&file.module, layer.tokens(), layer.rows()?)
        .base(table, layer.source().dtype())
        .tokens(file.tokens.clone())
        .init(&file.init);
    for path in &file.tied {
        builder = builder.tied(path);
    }
    let adapter = builder.build()?;
    let mut metadata = adapter.metadata().clone();
    metadata.library_version = Some(file.library_version.clone());
    let home = tempfile::tempdir()?;
    let written = home.path().join("adapter");
    adapter
        .with_metadata(metadata)?
        .write(&written, Overwrite::Refuse)?;
    let have = dir.join(&file.directory);
    if std::env::var_os(super::BLESS).is_some() {
        fs::create_dir_all(&have)?;
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(written.join(name), have.join(name))?;
        }
    }
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        ensure!(
            fs::read(written.join(name))? == fs::read(have.join(name))?,
            "{name} is written with other bytes"
        );
    }
    Ok(())
}
