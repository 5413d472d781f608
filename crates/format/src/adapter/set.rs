//! Several adapters in one directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::Adapter;
use crate::atomic::{Overwrite, write_dir_atomically};
use crate::config::CONFIG_FILE;
use crate::error::{Error, Result};

/// The adapters of one model by name, as PEFT's `save_pretrained` lays them out: `default` in the directory itself,
/// every other in a subdirectory of its name.
#[derive(Clone, Debug, Default)]
pub struct AdapterSet {
    adapters: BTreeMap<String, Adapter>,
}

impl AdapterSet {
    /// The name of the adapter at the top of the directory, PEFT's own for one that is not named.
    pub const DEFAULT: &'static str = "default";

    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads every adapter in `dir`: at its top, and in each subdirectory that holds an `adapter_config.json`. Other
    /// subdirectories are passed over.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is none; [`Error::AdapterName`] if a subdirectory's name cannot be that of an
    /// adapter, or is `default` beside an adapter at the top; those of [`Adapter::read`].
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let mut set = Self::new();
        if !dir.exists() {
            let hint = "expected a directory of adapters";
            return Err(Error::NotFound {
                path: dir.to_owned(),
                hint,
            });
        }
        if dir.join(CONFIG_FILE).exists() {
            set.adapters.insert(Self::DEFAULT.to_owned(), Adapter::read(dir)?);
        }
        for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
            let path = entry.map_err(Error::io("list", dir))?.path();
            if !path.join(CONFIG_FILE).exists() {
                continue;
            }
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            check_name(&name)?;
            if set.adapters.contains_key(&name) {
                let reason = "there is another one at the top of the directory".to_owned();
                return Err(Error::AdapterName { name, reason });
            }
            set.adapters.insert(name, Adapter::read(path)?);
        }
        if set.adapters.is_empty() {
            let hint = "a directory of adapters holds it at its top or in a subdirectory for each";
            return Err(Error::NotFound {
                path: dir.join(CONFIG_FILE),
                hint,
            });
        }
        Ok(set)
    }

    /// Writes every adapter below `dir`, all or none.
    ///
    /// # Errors
    ///
    /// Those of [`write_dir_atomically`]; a set without adapters is [`Error::Target`].
    pub fn write(&self, dir: impl AsRef<Path>, overwrite: Overwrite) -> Result<()> {
        let dir = dir.as_ref();
        if self.adapters.is_empty() {
            return Err(Error::Target {
                path: dir.to_owned(),
                reason: "there is no adapter to write".to_owned(),
            });
        }
        write_dir_atomically(dir, overwrite, |dir| {
            self.adapters.iter().try_for_each(|(name, adapter)| {
                if name == Self::DEFAULT {
                    return adapter.write_into(dir);
                }
                let dir = dir.join(name);
                fs::create_dir(&dir).map_err(Error::io("create the directory", &dir))?;
                adapter.write_into(dir)
            })
        })
    }

    /// Adds an adapter; the one that had this name is returned.
    ///
    /// # Errors
    ///
    /// [`Error::AdapterName`] if it cannot be a name: PEFT keeps adapters in torch modules, whose keys are not empty
    /// and have no dots, and in directories of their names.
    pub fn insert(&mut self, name: impl Into<String>, adapter: Adapter) -> Result<Option<Adapter>> {
        let name = name.into();
        check_name(&name)?;
        Ok(self.adapters.insert(name, adapter))
    }

    /// Takes an adapter out.
    pub fn remove(&mut self, name: &str) -> Option<Adapter> {
        self.adapters.remove(name)
    }

    /// The adapter of this name.
    pub fn get(&self, name: &str) -> Option<&Adapter> {
        self.adapters.get(name)
    }

    /// The adapters by name, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Adapter)> {
        self.adapters
            .iter()
            .map(|(name, adapter)| (name.as_str(), adapter))
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// The number of adapters.
    pub fn len(&self) -> usize {
        self.adapters.len()
    }

    /// Whether there is no adapter.
    pub fn is_empty(&self) -> bool {
        self.adapters.is_empty()
    }
}

fn check_name(name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "it is empty".to_owned()
    } else if let Some(c) = name
        .chars()
        .find(|c| matches!(c, '.' | '/' | '\\') || c.is_control())
    {
        format!("it has {c:?} in it; PEFT's names have no dots, and are names of directories")
    } else {
        return Ok(());
    };
    Err(Error::AdapterName {
        name: name.to_owned(),
        reason,
    })
}
