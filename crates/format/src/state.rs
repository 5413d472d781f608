//! What is needed, beside the adapter, to resume training.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use trainable_tokens_core::OptimizerState;

use crate::error::{Error, Result, one_line};
use crate::file::SafetensorsFile;
use crate::header::{TensorData, write_safetensors};
use crate::table::file_dtype;

const METADATA_KEY: &str = "trainable_tokens.training_state";
const TENSOR_PREFIX: &str = "optimizer.";
const VERSION: u32 = 1;
/// The longest text beside the tensors that is read: as values it takes up to a hundred times the memory.
const MAX_STATE_BYTES: u64 = 1 << 20;

/// The state of a training run: the optimizer's memory, and whatever the trainer adds (seed, position in the
/// data, the optimizer's name). It lies in `training_state.safetensors` beside the adapter; the tensors bear
/// torch's names under `optimizer.`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainingState {
    /// The optimizer's memory.
    pub optimizer: OptimizerState,
    /// The trainer's own values.
    pub extra: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    format_version: u32,
    step: u64,
    #[serde(default)]
    extra: serde_json::Value,
}

impl TrainingState {
    /// The file's name in an adapter directory.
    pub const FILE_NAME: &str = "training_state.safetensors";

    /// Reads the file at `path`.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], those of [`SafetensorsFile::open`] and [`from_file`](Self::from_file).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.exists() {
            let path = path.to_owned();
            let hint = "only a run that saves its state can be resumed";
            return Err(Error::NotFound { path, hint });
        }
        Self::from_file(&SafetensorsFile::open(path)?)
    }

    /// Takes the state out of a file.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the metadata are not a training state, [`Error::TooLarge`] if they are above 1 MiB,
    /// [`Error::Safetensors`] for a tensor that does
    /// not belong, [`Error::TensorShape`] and [`Error::TensorDType`] unless all are two-dimensional floats.
    pub fn from_file(file: &SafetensorsFile) -> Result<Self> {
        let refuse = |reason: String| Error::field(file.path(), METADATA_KEY, reason);
        let text = file.metadata().and_then(|metadata| metadata.get(METADATA_KEY));
        let text = text.ok_or_else(|| refuse("it is missing; this is no training state".to_owned()))?;
        if text.len() as u64 > MAX_STATE_BYTES {
            return Err(Error::TooLarge {
                path: file.path().to_owned(),
                what: "a training state's metadata",
                bytes: text.len() as u64,
                limit: MAX_STATE_BYTES,
            });
        }
        let stored: Stored = serde_json::from_str(text).map_err(|error| refuse(one_line(error)))?;
        if stored.format_version != VERSION {
            let version = stored.format_version;
            return Err(refuse(format!(
                "version {version} is not known, only {VERSION} is"
            )));
        }
        let tensors = file.names().map(|name| {
            let short = name
                .strip_prefix(TENSOR_PREFIX)
                .ok_or_else(|| Error::Safetensors {
                    path: file.path().to_owned(),
                    reason: format!("tensor {name:?} does not belong in a training state"),
                })?;
            Ok((short.to_owned(), file.tensor(name)?.to_rows()?))
        });
        Ok(Self {
            optimizer: OptimizerState {
                step: stored.step,
                tensors: tensors.collect::<Result<_>>()?,
            },
            extra: stored.extra,
        })
    }

    /// The bytes of the file.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if two tensors of the state have the same name.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let path = Path::new(Self::FILE_NAME);
        let stored = Stored {
            format_version: VERSION,
            step: self.optimizer.step,
            extra: self.extra.clone(),
        };
        let text = serde_json::to_string(&stored)
            .map_err(|error| Error::field(path, METADATA_KEY, one_line(error)))?;
        let metadata = BTreeMap::from([
            ("format".to_owned(), "pt".to_owned()),
            (METADATA_KEY.to_owned(), text),
        ]);
        let mut tensors: BTreeMap<&str, TensorData<'_>> = BTreeMap::new();
        for (name, rows) in &self.optimizer.tensors {
            let tensor = TensorData {
                name: tensor_name(name),
                dtype: file_dtype(rows.dtype()),
                shape: rows.shape().to_vec(),
                bytes: Cow::Owned(rows.to_le_bytes()),
            };
            if tensors.insert(name, tensor).is_some() {
                return Err(Error::field(path, tensor_name(name), "the tensor is given twice"));
            }
        }
        let mut out = Vec::new();
        write_safetensors(&mut out, &metadata, tensors.into_values().collect())
            .map_err(Error::io("write", path))?;
        Ok(out)
    }

    /// Writes the file into a directory that exists; for use inside
    /// [`write_dir_atomically`](crate::write_dir_atomically), together with the adapter.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and those of [`to_bytes`](Self::to_bytes).
    pub fn write_into(&self, dir: impl AsRef<Path>) -> Result<()> {
        let path = dir.as_ref().join(Self::FILE_NAME);
        fs::write(&path, self.to_bytes()?).map_err(Error::io("write", &path))
    }
}

fn tensor_name(name: &str) -> String {
    format!("{TENSOR_PREFIX}{name}")
}
