//! Adapters, training states and checkpoints in files.

mod adapter;
mod checkpoint;
mod config;
mod directory;
mod lora;
mod low_rank;
mod merged;
mod metadata;
mod model;
mod naming;
mod rows;
mod state;
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;
use trainable_tokens_core::{DType, EmbeddingSource, TokenRows, TokenSet};
use trainable_tokens_format::{Adapter, digest};

use crate::{Failure, Harness, Layer};

pub use adapter::{
    an_adapter_gives_the_rows_back, an_adapter_knows_its_table, copies_of_tied_rows_must_agree,
    odd_values_survive, the_digest_is_that_of_the_bytes, the_file_keeps_the_order_of_slots,
};
pub use checkpoint::{
    a_checkpoint_is_one_file_or_an_index_of_shards, a_module_without_a_table_must_be_tied_to_one,
    an_adapter_fits_tables_of_its_sizes_in_any_type, the_same_table_is_told_from_another,
};
pub use config::{
    a_config_is_strict_json, a_new_config_is_spelled_as_peft_does, fields_have_their_types,
    other_fields_are_kept_and_spelled_as_python_does, other_kinds_of_adapters_are_told_apart,
    token_indices_are_distinct_integers,
};
pub use directory::{
    a_directory_appears_whole_or_not_at_all, an_adapter_is_two_files, peft_files_stay_the_same,
};
pub use lora::{
    a_lora_config_is_that_of_peft, ids_by_module_and_rows_must_fit, lora_keeps_the_rows_beside_its_weights,
    lora_tells_the_tokens_of_each_module,
};
pub use low_rank::{
    a_checked_merge_names_what_is_not_finite, a_merge_grows_the_vocabulary, a_stored_base_weight_counts,
    adapters_with_common_tokens_merge_as_asked, lora_adds_its_scaled_product, lora_of_other_kinds_is_refused,
    lora_sums_are_rounded_one_by_one, rows_win_over_lora,
};
pub use merged::{
    a_merged_checkpoint_differs_in_the_rows_alone, files_without_rows_are_kept,
    merges_that_would_harm_are_refused,
};
pub use metadata::{metadata_are_written_as_specified, metadata_must_agree, metadata_must_parse};
pub use model::{
    a_directory_holds_several_adapters, a_models_tables_are_known_by_name, a_stored_table_is_the_table,
    missing_rows_are_named, rows_extend_a_smaller_base, targets_are_tables_of_the_model,
};
pub use naming::{
    adapters_name_modules_with_the_prefix_or_without, modules_are_named_as_transformers_names_them,
};
pub use rows::{
    broken_frames_are_refused, names_that_are_almost_rows_are_refused, other_tensors_are_kept_in_order,
    the_rows_file_has_these_bytes,
};
pub use state::{
    a_saved_run_goes_on_with_the_same_bits, a_state_is_checked_by_the_optimizer,
    a_state_is_written_as_specified, what_is_no_state_is_refused,
};
pub use targets::{a_module_is_targeted_as_the_config_says, what_would_be_read_otherwise_is_not_written};

const MODULE: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";
const CONFIG_FILE: &str = "adapter_config.json";
const ROWS_FILE: &str = "adapter_model.safetensors";
/// What the name of a module's rows has around its path.
const KEY: (&str, &str) = ("base_model.model.", ".trainable_tokens_delta");

fn key(path: &str) -> String {
    format!("{}{path}{}", KEY.0, KEY.1)
}

/// The layer's rows as an adapter, with all that is known about the table.
fn adapter_of<H: Harness>(layer: &Layer<H>) -> Result<Adapter, Failure> {
    let adapter = Adapter::builder(MODULE, layer.tokens(), layer.rows()?)
        .tied(HEAD)
        .base(digest(layer.source())?, layer.source().dtype())
        .build()?;
    Ok(adapter)
}

/// Writes the layer's rows as an adapter and reads it back.
fn round_trip<H: Harness>(layer: &Layer<H>) -> Result<Adapter, Failure> {
    let dir = tempfile::tempdir()?;
    adapter_of::<H>(layer)?.write_into(dir.path())?;
    Ok(Adapter::read(dir.path())?)
}

/// An adapter without metadata for the module `emb`.
fn plain_adapter(tokens: &[u32], rows: TokenRows) -> Result<Adapter, Failure> {
    let set = TokenSet::new(tokens.iter().copied(), 100)?;
    Ok(Adapter::builder("emb", &set, rows).without_metadata().build()?)
}

/// The two files of an adapter, to be damaged.
#[derive(Clone)]
struct Files {
    config: String,
    rows: Vec<u8>,
}

impl Files {
    fn of(adapter: &Adapter) -> Result<Self, Failure> {
        Ok(Self {
            config: adapter.config().to_json(),
            rows: adapter.to_safetensors()?,
        })
    }

    fn with_config(&self, config: impl Into<String>) -> Self {
        let config = config.into();
        Self {
            config,
            ..self.clone()
        }
    }

    fn with_rows(&self, rows: Vec<u8>) -> Self {
        Self { rows, ..self.clone() }
    }

    /// Puts both into a directory of its own and reads it.
    fn read(&self) -> Result<trainable_tokens_format::Result<Adapter>, Failure> {
        let dir = tempfile::tempdir()?;
        fs::write(dir.path().join(CONFIG_FILE), &self.config)?;
        fs::write(dir.path().join(ROWS_FILE), &self.rows)?;
        Ok(Adapter::read(dir.path()))
    }
}

/// A safetensors file of this header, as it is, and these data.
fn framed(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// The header of a safetensors file and its data.
fn unframed(file: &[u8]) -> Result<(&str, &[u8]), Failure> {
    let (length, rest) = file.split_first_chunk().ok_or("the file has no header")?;
    let length = usize::try_from(u64::from_le_bytes(*length))?;
    let (header, data) = rest.split_at_checked(length).ok_or("the header is cut off")?;
    Ok((std::str::from_utf8(header)?, data))
}

/// Splits off the spaces that a header ends with.
fn unpadded(header: &str) -> (&str, usize) {
    let text = header.trim_end_matches(' ');
    (text, header.len() - text.len())
}

/// The file's name of an element type.
fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

/// A safetensors file of these matrices, by the safetensors library.
fn safetensors_of(tensors: &[(&str, &TokenRows)]) -> Result<Vec<u8>, Failure> {
    let bytes: Vec<_> = tensors.iter().map(|(_, rows)| rows.to_le_bytes()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, rows), bytes)| {
        let view = TensorView::new(file_dtype(rows.dtype()), rows.shape().to_vec(), bytes)?;
        Ok((*name, view))
    });
    let views = views.collect::<Result<Vec<_>, Failure>>()?;
    Ok(safetensors::serialize(views, None)?)
}

/// A checkpoint directory with one file of these matrices.
fn checkpoint_of(tensors: &[(&str, &TokenRows)]) -> Result<(TempDir, PathBuf), Failure> {
    let home = tempfile::tempdir()?;
    let dir = home.path().join("base");
    fs::create_dir(&dir)?;
    fs::write(dir.join("model.safetensors"), safetensors_of(tensors)?)?;
    Ok((home, dir))
}

/// Every file below a directory, by its path in it, and its content.
fn tree(dir: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, Failure> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(at)? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                found.push((path.strip_prefix(dir)?.to_owned(), fs::read(&path)?));
            }
        }
    }
    found.sort();
    Ok(found)
}
