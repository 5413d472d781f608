//! `forward`: embeddings and logits of token ids.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Result, bail};
use candle_core::{DType, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;
use trainable_tokens_format::write_file_atomically;
use trainable_tokens_trainer::{Encoder, InputSpec, LanguageModel, Pooling};

use super::check_free;
use crate::args::{Cli, ForwardArgs};
use crate::model::Model;
use crate::output::print;

#[derive(Serialize)]
struct Output<'a> {
    out: &'a Path,
    /// Shapes by the names of the tensors.
    #[serde(flatten)]
    tensors: BTreeMap<&'static str, Vec<usize>>,
}

pub(super) fn run(args: &ForwardArgs, cli: &Cli) -> Result<()> {
    check_free(&args.out, cli.overwrite())?;
    let model = Model::open(&args.model)?;
    let pooling = Pooling::of_model(&args.model)?;
    let loaded = model.load(args.adapter.as_deref(), args.compute)?;
    let (ids, rows, length) = read_ids(&args.input_ids, loaded.input_spec())?;
    let ids = Tensor::from_vec(ids, (rows, length), loaded.device())?;
    let tensors = outputs(&loaded, &ids, pooling)?;
    let bytes = tensors
        .iter()
        .map(|(name, tensor)| Ok((*name, tensor.dims().to_vec(), to_f32_bytes(tensor)?)));
    let bytes = bytes.collect::<Result<Vec<_>>>()?;
    let views = bytes
        .iter()
        .map(|(name, shape, data)| Ok((*name, TensorView::new(Dtype::F32, shape.clone(), data)?)));
    let file = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None)?;
    write_file_atomically(&args.out, cli.overwrite(), |out| -> Result<()> {
        out.write_all(&file)
            .map_err(|error| anyhow::anyhow!("cannot write {}: {error}", args.out.display()))
    })?;
    let output = Output {
        out: &args.out,
        tensors: bytes
            .iter()
            .map(|(name, shape, _)| (*name, shape.clone()))
            .collect(),
    };
    print(cli.json, &output, |o| {
        let tensors = o.tensors.iter().map(|(name, shape)| format!("{name} {shape:?}"));
        let tensors = tensors.collect::<Vec<_>>().join(", ");
        format!("wrote {}: {tensors}", o.out.display())
    })
}

/// What a model makes of tokens `[B, L]`, all of which are seen.
fn outputs(
    model: &LanguageModel,
    ids: &Tensor,
    pooling: Option<Pooling>,
) -> Result<Vec<(&'static str, Tensor)>> {
    let (rows, length) = ids.dims2()?;
    let embeddings = model.embed(ids)?.detach();
    let hidden = model.hidden(&embeddings, ids, None)?;
    let mut tensors = vec![("embeddings", embeddings)];
    if let Some(pooling) = pooling.filter(|_| model.as_encoder().is_some()) {
        let pooled = pooling.pool(&hidden, &vec![length; rows])?;
        tensors.push(("sentence_embeddings", pooled));
    }
    let has_head = model.as_encoder().is_none_or(Encoder::has_head);
    tensors.push(if has_head {
        ("logits", model.logits(&hidden)?)
    } else {
        ("hidden", hidden)
    });
    Ok(tensors)
}

fn to_f32_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

/// Flattened ids, rows, and ids per row.
fn read_ids(path: &Path, model: InputSpec) -> Result<(Vec<u32>, usize, usize)> {
    let vocab_size = model.vocab_size;
    let name = path.display();
    let text = fs::read(path).map_err(|error| anyhow::anyhow!("cannot read {name}: {error}"))?;
    let lists: Vec<Vec<i64>> = serde_json::from_slice(&text)
        .map_err(|error| anyhow::anyhow!("{name} is not a JSON list of lists of token ids: {error}"))?;
    let length = lists.first().map_or(0, Vec::len);
    if length == 0 {
        bail!("{name} holds no token id");
    }
    if length > model.max_length {
        bail!(
            "{name}: a list of {length} ids is longer than the model's {} positions",
            model.max_length
        );
    }
    let mut ids = Vec::with_capacity(lists.len() * length);
    for (row, list) in lists.iter().enumerate() {
        if list.len() != length {
            bail!(
                "{name}: list {row} has {} ids, but list 0 has {length}; all must be equally long",
                list.len()
            );
        }
        for (place, id) in list.iter().enumerate() {
            match u32::try_from(*id) {
                Ok(id) if (id as usize) < vocab_size => ids.push(id),
                _ => bail!(
                    "{name}: id {id} at [{row}][{place}] is outside the model's vocabulary of {vocab_size}"
                ),
            }
        }
    }
    Ok((ids, lists.len(), length))
}
