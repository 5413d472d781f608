//! The program's options.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trainable_tokens_core::LogitsChunk;

use crate::checkpoint::Shape;

/// The batch that is made where none is given.
const BATCH: [usize; 2] = [2, 128];

pub(crate) struct Options {
    pub(crate) make: Option<Shape>,
    pub(crate) model: PathBuf,
    input_ids: Option<PathBuf>,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) steps: u64,
    pub(crate) lr: f64,
    pub(crate) recompute: bool,
    pub(crate) logits_chunk: LogitsChunk,
    pub(crate) dtype: DType,
    pub(crate) device: Device,
}

impl Options {
    pub(crate) fn of_program() -> Self {
        let mut options = Self {
            make: None,
            model: PathBuf::from("target/llama-256k"),
            input_ids: None,
            token_ids: (255_000..255_016).collect(),
            steps: 4,
            lr: 1e-3,
            recompute: false,
            logits_chunk: LogitsChunk::default(),
            dtype: DType::F32,
            device: Device::Cpu,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_else(|| panic!("{name} needs a value"));
            match name.as_str() {
                // Cargo's own, for every benchmark.
                "--bench" => {}
                "--make" => options.make = Some(Shape::named(&value())),
                "--model" => options.model = value().into(),
                "--input-ids" => options.input_ids = Some(value().into()),
                "--token-ids" => options.token_ids = ids(&value()),
                "--steps" => options.steps = value().parse().unwrap(),
                "--lr" => options.lr = value().parse().unwrap(),
                "--recompute" => options.recompute = true,
                "--chunk-mib" => {
                    let mib: usize = value().parse().unwrap();
                    options.logits_chunk = LogitsChunk::bytes(mib << 20).unwrap();
                }
                "--dtype" => {
                    options.dtype = match value().as_str() {
                        "f32" => DType::F32,
                        "bf16" => DType::BF16,
                        other => panic!("--dtype {other}: expected f32 or bf16"),
                    };
                }
                "--device" => {
                    options.device = match value().as_str() {
                        "cpu" => Device::Cpu,
                        "cuda" => Device::new_cuda(0).unwrap(),
                        other => panic!("--device {other}: expected cpu or cuda"),
                    };
                }
                other => panic!("{other} is no option"),
            }
        }
        options
    }

    /// The rows of token ids of every step.
    pub(crate) fn batch(&self, vocab_size: usize) -> Vec<Vec<u32>> {
        match &self.input_ids {
            Some(path) => read(path),
            None => self.random_batch(vocab_size),
        }
    }

    fn random_batch(&self, vocab_size: usize) -> Vec<Vec<u32>> {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let mut id = |position: usize| match position % 8 {
            0 => self.token_ids[random.random_range(0..self.token_ids.len())],
            _ => u32::try_from(random.random_range(0..vocab_size)).unwrap(),
        };
        let mut row = || (0..BATCH[1]).map(&mut id).collect();
        (0..BATCH[0]).map(|_| row()).collect()
    }
}

fn read(path: &Path) -> Vec<Vec<u32>> {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Ids such as `12,7,300-310`.
fn ids(text: &str) -> Vec<u32> {
    let number = |text: &str| {
        text.parse::<u32>()
            .unwrap_or_else(|_| panic!("'{text}' is no id"))
    };
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => number(first)..=number(last),
        None => number(part)..=number(part),
    };
    text.split(',').flat_map(range).collect()
}
