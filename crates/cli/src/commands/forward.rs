//! `forward`: embeddings and logits of token ids.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Result, bail};
use candle_core::{DType, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;
use trainable_tokens_format::write_file_atomically;
use trainable_tokens_trainer::ModelConfig;

use super::check_free;
use crate::args::{Cli, ForwardArgs};
use crate::model::Model;
use crate::output::print;

#[derive(Serialize)]
struct Output<'a> {
    out: &'a Path,
    embeddings: Vec<usize>,
    logits: Vec<usize>,
}

pub(super) fn run(args: &ForwardArgs, cli: &Cli) -> Result<()> {
    check_free(&args.out, cli.overwrite())?;
    let model = Model::open(&args.model)?;
    let decoder = model.load(args.adapter.as_deref(), args.compute)?;
    let (ids, rows, length) = read_ids(&args.input_ids, decoder.config())?;
    let ids = Tensor::from_vec(ids, (rows, length), decoder.device())?;
    let embeddings = decoder.embed(&ids)?.detach();
    let logits = decoder.logits(&decoder.hidden(&embeddings)?)?;
    let tensors = [("embeddings", &embeddings), ("logits", &logits)];
    let bytes = tensors.map(|(name, tensor)| Ok((name, tensor.dims().to_vec(), to_f32_bytes(tensor)?)));
    let bytes = bytes.into_iter().collect::<Result<Vec<_>>>()?;
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
        embeddings: embeddings.dims().to_vec(),
        logits: logits.dims().to_vec(),
    };
    print(cli.json, &output, |o| {
        format!(
            "wrote {}: embeddings {:?}, logits {:?}",
            o.out.display(),
            o.embeddings,
            o.logits
        )
    })
}

fn to_f32_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

/// Flattened ids, rows, and ids per row.
fn read_ids(path: &Path, config: &ModelConfig) -> Result<(Vec<u32>, usize, usize)> {
    let vocab_size = config.vocab_size;
    let name = path.display();
    let text = fs::read(path).map_err(|error| anyhow::anyhow!("cannot read {name}: {error}"))?;
    let lists: Vec<Vec<i64>> = serde_json::from_slice(&text)
        .map_err(|error| anyhow::anyhow!("{name} is not a JSON list of lists of token ids: {error}"))?;
    let length = lists.first().map_or(0, Vec::len);
    if length == 0 {
        bail!("{name} holds no token id");
    }
    if length > config.max_length() {
        bail!(
            "{name}: a list of {length} ids is longer than the model's {} positions",
            config.max_length()
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
