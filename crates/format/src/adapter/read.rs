//! Reading an adapter directory.

use std::path::Path;

use trainable_tokens_core::TokenRows;

use super::key::{self, Key};
use super::metadata::AdapterMetadata;
use super::{Adapter, ExtraTensor, ROWS_FILE, parts};
use crate::config::{AdapterConfig, CONFIG_FILE};
use crate::error::{Error, Result};
use crate::file::{SafetensorsFile, TensorRef};

/// Most modules with rows or copies of them: each is compared with the others.
const MAX_MODULES: usize = 1024;

impl Adapter {
    /// Reads the adapter in `dir`.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if a file is absent; those of [`AdapterConfig::read`] and [`SafetensorsFile::open`];
    /// [`Error::Unsupported`] if the rows are only there as a pickle; those of
    /// [`from_parts`](Self::from_parts).
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.exists() {
            let hint = "expected an adapter directory";
            return Err(Error::NotFound {
                path: dir.to_owned(),
                hint,
            });
        }
        let config = AdapterConfig::read(dir.join(CONFIG_FILE))?;
        let path = dir.join(ROWS_FILE);
        if path.exists() {
            return Self::from_parts(config, &SafetensorsFile::open(path)?);
        }
        let pickle = dir.join("adapter_model.bin");
        if pickle.exists() {
            return Err(Error::Unsupported {
                path: pickle,
                what: format!("pickled rows are not read; convert them to {ROWS_FILE}"),
            });
        }
        let hint = "an adapter directory holds its rows there";
        Err(Error::NotFound { path, hint })
    }

    /// Puts an adapter together from its two files.
    ///
    /// # Errors
    ///
    /// [`Error::TensorMissing`] if no rows of a targeted module are there, [`Error::TensorKey`] for a misnamed
    /// tensor, [`Error::TensorDType`] and [`Error::TensorShape`] for rows that are not `[k, D]` floats,
    /// [`Error::TiedCopies`] if copies differ, [`Error::Metadata`] if the metadata contradict the rest,
    /// [`Error::Unsupported`] for rows of more than 1024 modules.
    pub fn from_parts(config: AdapterConfig, file: &SafetensorsFile) -> Result<Self> {
        let kind = config.peft_type();
        let mut stored = Vec::new();
        let mut extra = Vec::new();
        for name in file.names() {
            match key::parse(kind, name) {
                Key::Rows(path) => {
                    if stored.len() == MAX_MODULES {
                        return Err(Error::Unsupported {
                            path: file.path().to_owned(),
                            what: format!("rows of more than {MAX_MODULES} modules are not read"),
                        });
                    }
                    let rows = rows_of(file.tensor(name)?, path, &config)?;
                    stored.push((path.to_owned(), rows));
                }
                Key::Misnamed(expected) => {
                    return Err(Error::TensorKey {
                        path: file.path().to_owned(),
                        tensor: name.to_owned(),
                        expected,
                    });
                }
                Key::Other => extra.push(ExtraTensor {
                    file: file.clone(),
                    name: name.to_owned(),
                }),
            }
        }
        let adapter = Self {
            modules: parts::group(stored, &config, file.path())?,
            metadata: AdapterMetadata::parse(file.metadata(), file.path())?,
            config,
            extra,
            origin: file.path().to_owned(),
        };
        adapter.checked()
    }
}

/// The rows of a tensor. Their number is checked before anything is copied: it is that of the module's ids, or for
/// a copy that of some module's.
fn rows_of(tensor: TensorRef<'_>, path: &str, config: &AdapterConfig) -> Result<TokenRows> {
    tensor.float_dtype()?;
    let ids = config.token_indices();
    let own = ids.of(path).map(<[u32]>::len);
    let mut allowed: Vec<_> = own.map_or_else(|| ids.lists().map(<[u32]>::len).collect(), |own| vec![own]);
    match tensor.shape {
        // Rows without columns would take no bytes, and any number of modules could claim the ids.
        [rows, columns] if allowed.contains(rows) && *columns > 0 => tensor.to_rows(),
        _ => {
            allowed.sort_unstable();
            allowed.dedup();
            let counts: Vec<_> = allowed.iter().map(usize::to_string).collect();
            Err(Error::TensorShape {
                path: tensor.file.to_owned(),
                tensor: tensor.name.to_owned(),
                expected: format!(
                    "[{}, D], D above 0, one row for each of {}",
                    counts.join(" or "),
                    config.peft_type().tokens_field()
                ),
                got: tensor.shape.to_vec(),
            })
        }
    }
}
