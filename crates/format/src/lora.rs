//! LoRA's weights: two factors for each module, whose product is added to the module's weight.

mod delta;
mod key;
mod layout;
mod pattern;
mod settings;
mod target;

use std::collections::BTreeMap;
use std::path::Path;

pub use delta::LoraDelta;
pub(crate) use delta::LowRank;
pub(crate) use key::Factor;
use key::Key;
use settings::Settings;
use target::LoraTargets;
use trainable_tokens_core::{DType, TokenRows};

use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::config::{AdapterConfig, CONFIG_FILE, PeftType};
use crate::error::{Error, Result};
use crate::file::{SafetensorsFile, TensorRef};

/// The layers that can have LoRA's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoraLayer {
    /// A linear layer: factors `A` `[r, in]` and `B` `[out, r]`; `B @ A` is added.
    Linear,
    /// An embedding table: factors `A` `[r, V]` and `B` `[D, r]`; the transpose of `B @ A` is added.
    Embedding,
}

/// LoRA's weights of one module. They stay in their file.
#[derive(Clone, Debug)]
pub struct LoraWeights {
    path: String,
    layer: LoraLayer,
    rank: usize,
    scaling: f64,
    a: StoredFactor,
    b: StoredFactor,
    /// What the product is added to, if the file says so: PEFT puts it in the place of the base's.
    base: Option<StoredFactor>,
    fan_in_fan_out: bool,
}

impl LoraWeights {
    /// The module's path in the model, such as `model.layers.0.self_attn.q_proj`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The kind of layer.
    pub fn layer(&self) -> LoraLayer {
        self.layer
    }

    /// The rank `r`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What the product of the factors is multiplied by: `alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// The module's inputs: columns of `A`. For an embedding, `V`.
    pub fn in_features(&self) -> usize {
        self.a.shape[1]
    }

    /// The module's outputs: rows of `B`. For an embedding, `D`.
    pub fn out_features(&self) -> usize {
        self.b.shape[0]
    }

    /// The factors `A` and `B`, read from the file.
    ///
    /// # Errors
    ///
    /// None for weights that an adapter has handed out; the file's bytes are those of its shapes.
    pub fn factors(&self) -> Result<[TokenRows; 2]> {
        Ok([self.a.to_rows()?, self.b.to_rows()?])
    }

    /// Whether the file also has the weight that the product is added to, in the place of the base's.
    pub fn replaces_base(&self) -> bool {
        self.base.is_some()
    }

    /// The element types of the factors.
    pub fn dtypes(&self) -> [DType; 2] {
        [self.a.dtype, self.b.dtype]
    }

    /// The names of its tensors in the file: those of the factors, and of the base's weight where it is there too.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let all = [Some(&self.a), Some(&self.b), self.base.as_ref()];
        all.into_iter().flatten().map(|stored| stored.name.as_str())
    }

    /// The first value of its tensors that is not finite: the tensor's name, row and column.
    pub fn first_non_finite(&self) -> Option<(&str, usize, usize)> {
        let all = [Some(&self.a), Some(&self.b), self.base.as_ref()];
        all.into_iter().flatten().find_map(|factor| {
            let (row, column) = factor.first_non_finite()?;
            Some((factor.name.as_str(), row, column))
        })
    }
}

/// A matrix of floats in a mapped file.
#[derive(Clone, Debug)]
struct StoredFactor {
    file: SafetensorsFile,
    name: String,
    dtype: DType,
    shape: [usize; 2],
}

impl StoredFactor {
    fn new(file: &SafetensorsFile, tensor: &TensorRef<'_>, expected: &str) -> Result<Self> {
        let dtype = tensor.float_dtype()?;
        let [rows, columns] = *tensor.shape else {
            return Err(wrong_shape(
                tensor,
                format!("{expected}; only linear layers and embeddings are merged"),
            ));
        };
        Ok(Self {
            file: file.clone(),
            name: tensor.name.to_owned(),
            dtype,
            shape: [rows, columns],
        })
    }

    fn to_rows(&self) -> Result<TokenRows> {
        let [rows, columns] = self.shape;
        Ok(TokenRows::from_le_bytes(self.dtype, rows, columns, self.bytes())?)
    }

    /// Little-endian bytes, row-major.
    fn bytes(&self) -> &[u8] {
        self.file.tensor(&self.name).map_or(&[], |tensor| tensor.bytes)
    }
}

fn wrong_shape(tensor: &TensorRef<'_>, expected: String) -> Error {
    Error::TensorShape {
        path: tensor.file.to_owned(),
        tensor: tensor.name.to_owned(),
        expected,
        got: tensor.shape.to_vec(),
    }
}

impl Adapter {
    /// LoRA's weights in the file, by module, in the order of their paths; none for an adapter of another kind.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] naming a field or a tensor that gives the weights a meaning that is not supported (`DoRA`,
    /// LoRA biases, starts that change the base, modules saved whole, tensors of unknown names, and others);
    /// [`Error::Field`] for a wrong field, or if `target_modules` does not target a module with weights;
    /// [`Error::TensorMissing`] if one of two factors is absent; [`Error::TensorDType`] and [`Error::TensorShape`] for a
    /// factor that is no matrix of floats, or not of the config's rank.
    pub fn lora_weights(&self) -> Result<Vec<LoraWeights>> {
        if self.config().peft_type() != PeftType::Lora {
            return Ok(Vec::new());
        }
        let settings = Settings::new(self.config(), self.origin())?;
        let targets = LoraTargets::new(self.config(), self.origin())?;
        let mut factors: BTreeMap<&str, BTreeMap<Factor, StoredFactor>> = BTreeMap::new();
        let mut bases = BTreeMap::new();
        for (file, name) in self.stored_extras() {
            let tensor = file.tensor(name)?;
            match key::parse(name) {
                Key::Factor(path, factor) => {
                    let stored = StoredFactor::new(file, &tensor, factor.shape())?;
                    factors.entry(path).or_default().insert(factor, stored);
                }
                Key::Other(path) => return Err(unsupported(&tensor, &other_weights(name, path))),
                Key::Base(_) | Key::Foreign if self.is_whole_table(name) => {}
                Key::Base(path) => {
                    bases.insert(path, StoredFactor::new(file, &tensor, "that of a table")?);
                }
                Key::Foreign => return Err(unsupported(&tensor, &foreign(name))),
            }
        }
        if let Some((_, stored)) = bases.iter().find(|(path, _)| !factors.contains_key(*path)) {
            return Err(unsupported(
                &stored.file.tensor(&stored.name)?,
                &foreign(&stored.name),
            ));
        }
        let weights = factors.into_iter().map(|(path, found)| {
            if !targets.contain(path)? {
                return Err(not_targeted(path, self.origin()));
            }
            let base = bases.get(path).cloned();
            Ok(LoraWeights {
                base,
                ..pair(path, &found, &settings, self.origin())?
            })
        });
        weights.collect()
    }
}

impl AdapterConfig {
    /// The modules of a model that a `LoraConfig` gives weights, as PEFT chooses them: those with a matrix that
    /// `target_modules` targets, in the order of their paths.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a wrong field; [`Error::Unsupported`] for one that is not supported, and for a config of another
    /// kind, or without `target_modules`.
    pub fn lora_modules(&self, base: &Checkpoint) -> Result<Vec<String>> {
        let file = Path::new(CONFIG_FILE);
        Settings::new(self, file)?;
        let targets = LoraTargets::new(self, file)?;
        if self.peft_type() != PeftType::Lora || !targets.are_known() {
            return Err(Error::Unsupported {
                path: file.to_owned(),
                what: "only the target_modules of a LoRA config, spelled out, name modules".to_owned(),
            });
        }
        let mut modules = Vec::new();
        for name in base.names() {
            modules.extend(targets.matrix(base, name)?);
        }
        modules.sort_unstable();
        Ok(modules)
    }
}

/// Puts the two factors of a module together.
fn pair(
    path: &str,
    found: &BTreeMap<Factor, StoredFactor>,
    settings: &Settings,
    file: &Path,
) -> Result<LoraWeights> {
    let (rank, scaling) = settings.of(path)?;
    let linear = [Factor::LinearA, Factor::LinearB];
    let embedding = [Factor::EmbeddingA, Factor::EmbeddingB];
    let any = |factors: &[Factor; 2]| factors.iter().find_map(|factor| found.get(factor));
    let (layer, [a, b]) = match (any(&linear), any(&embedding)) {
        (Some(_), Some(other)) => {
            let what = format!("module {path:?} also has factors of a linear layer");
            return Err(unsupported(&other.file.tensor(&other.name)?, &what));
        }
        (_, None) => (LoraLayer::Linear, linear),
        (None, _) => (LoraLayer::Embedding, embedding),
    };
    let of_rank = |factor: Factor, other: Factor, axis: usize| {
        let stored = found.get(&factor).ok_or_else(|| Error::TensorMissing {
            path: file.to_owned(),
            tensor: factor.key(path),
            hint: format!(", the factor that goes with {:?}", other.key(path)),
        })?;
        if stored.shape[axis] == rank {
            return Ok(stored.clone());
        }
        let expected = format!(
            "{} with r = {rank}, as the config says for {path:?}",
            factor.shape()
        );
        Err(wrong_shape(&stored.file.tensor(&stored.name)?, expected))
    };
    Ok(LoraWeights {
        path: path.to_owned(),
        layer,
        rank,
        scaling,
        a: of_rank(a, b, 0)?,
        b: of_rank(b, a, 1)?,
        base: None,
        fan_in_fan_out: settings.fan_in_fan_out,
    })
}

fn unsupported(tensor: &TensorRef<'_>, what: &str) -> Error {
    Error::Unsupported {
        path: tensor.file.to_owned(),
        what: format!("tensor {:?}: {what}", tensor.name),
    }
}

fn other_weights(name: &str, path: &str) -> String {
    if name.ends_with("lora_magnitude_vector") {
        return format!("magnitudes of DoRA are not supported (module {path:?})");
    }
    if name.ends_with("lora_B.bias") {
        return format!("biases of LoRA are not supported (module {path:?})");
    }
    format!(
        "not one of the weights of LoRA that are supported; those of module {path:?} are {:?} and {:?}",
        Factor::LinearA.key(path),
        Factor::LinearB.key(path)
    )
}

fn foreign(name: &str) -> String {
    if name.rsplit('.').next() == Some("bias") {
        return "biases that an adapter replaces (bias \"all\" or \"lora_only\") are not supported"
            .to_owned();
    }
    "neither rows of tokens nor weights of LoRA: modules that are saved whole (modules_to_save) are not supported"
        .to_owned()
}

fn not_targeted(path: &str, file: &Path) -> Error {
    let config = file.with_file_name(CONFIG_FILE);
    let reason =
        format!("the file has weights for module {path:?}, which is not targeted; PEFT would ignore them");
    Error::field(&config, "target_modules", reason)
}
