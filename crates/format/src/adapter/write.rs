//! Writing an adapter directory.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use super::key::key_of;
use super::{Adapter, ROWS_FILE};
use crate::atomic::{Overwrite, write_dir_atomically};
use crate::config::CONFIG_FILE;
use crate::error::{Error, Result};
use crate::header::{TensorData, write_safetensors};
use crate::table::file_dtype;

impl Adapter {
    /// Writes the adapter as the directory `dir`, whole or not at all. A directory that is replaced loses what
    /// else it held.
    ///
    /// # Errors
    ///
    /// Those of [`write_dir_atomically`].
    pub fn write(&self, dir: impl AsRef<Path>, overwrite: Overwrite) -> Result<()> {
        write_dir_atomically(dir, overwrite, |dir| self.write_into(dir))
    }

    /// Writes the adapter's two files into a directory that exists; for use inside [`write_dir_atomically`],
    /// together with other files.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn write_into(&self, dir: impl AsRef<Path>) -> Result<()> {
        let config = dir.as_ref().join(CONFIG_FILE);
        fs::write(&config, self.config.to_json()).map_err(Error::io("write", &config))?;
        let rows = dir.as_ref().join(ROWS_FILE);
        let file = File::create(&rows).map_err(Error::io("create", &rows))?;
        let mut out = BufWriter::new(file);
        self.write_rows(&mut out)?;
        out.flush().map_err(Error::io("write", &rows))
    }

    /// The bytes of `adapter_model.safetensors`.
    ///
    /// # Errors
    ///
    /// [`Error::TensorMissing`] never in practice: extra tensors were read before.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.write_rows(&mut out)?;
        Ok(out)
    }

    fn write_rows(&self, out: &mut dyn Write) -> Result<()> {
        let mut tensors = Vec::new();
        let modules = self
            .modules
            .iter()
            .map(|module| (module, module.rows.to_le_bytes()));
        let modules: Vec<_> = modules.collect();
        for (module, bytes) in &modules {
            for path in module.all_paths() {
                tensors.push(TensorData {
                    name: key_of(self.config.peft_type(), path),
                    dtype: file_dtype(module.rows.dtype()),
                    shape: module.rows.shape().to_vec(),
                    bytes: Cow::Borrowed(bytes.as_slice()),
                });
            }
        }
        for extra in &self.extra {
            let tensor = extra.file.tensor(&extra.name)?;
            tensors.push(TensorData {
                name: extra.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.to_vec(),
                bytes: Cow::Borrowed(tensor.bytes),
            });
        }
        write_safetensors(out, &self.metadata.to_header(), tensors)
            .map_err(Error::io("write", Path::new(ROWS_FILE)))
    }
}
