//! What one backend writes, the other reads to the same bits; the shared optimizers move both alike.
#![allow(missing_docs, clippy::unwrap_used)]

use candle_core::{Device, Tensor, WithDType};
use candle_nn::Module;
use half::{bf16, f16};
use ndarray::Array2;
use proptest::prelude::*;
use trainable_tokens::candle;
use trainable_tokens::format::{Adapter, Checkpoint, Overwrite, TrainingState, digest};
use trainable_tokens::ndarray::{NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens::{
    Adam, AdamConfig, DType, Element, EmbeddingSource, RowOptimizer, TokenRows, TokenSet,
};

const MODULE: &str = "model.embed_tokens";

fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f32::from(u16::try_from(state >> 48).unwrap()) / 32768.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

#[derive(Clone, Debug)]
struct Case {
    v: usize,
    d: usize,
    tokens: Vec<u32>,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    (1usize..30, 1usize..7, any::<u64>()).prop_flat_map(|(v, d, seed)| {
        let all: Vec<u32> = (0..u32::try_from(v).unwrap()).collect();
        let tokens = proptest::sample::subsequence(all, 0..=v).prop_shuffle();
        tokens.prop_map(move |tokens| Case { v, d, tokens, seed })
    })
}

impl Case {
    fn table(&self) -> Array2<f32> {
        Array2::from_shape_vec((self.v, self.d), noise(self.seed, self.v * self.d)).unwrap()
    }

    fn tensor(&self) -> Tensor {
        Tensor::from_vec(noise(self.seed, self.v * self.d), (self.v, self.d), &Device::Cpu).unwrap()
    }

    fn tokens(&self) -> TokenSet {
        TokenSet::new(self.tokens.clone(), self.v).unwrap()
    }

    fn rows(&self) -> TokenRows {
        let k = self.tokens.len();
        TokenRows::new(noise(self.seed ^ 9, k * self.d), k, self.d).unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Save then load is the identity, in each backend and from either to the other.
    #[test]
    fn a_saved_adapter_is_the_same_in_every_backend(case in case(), tied: bool) {
        let mut nd: TrainableTokens<_> = TrainableTokens::new(NdTable::new(case.table()).unwrap(), case.tokens()).unwrap();
        nd.set_rows(&case.rows()).unwrap();
        let mut candle = candle::TrainableTokens::from_tensor(case.tensor(), &case.tokens).unwrap();
        candle.set_rows(&case.rows()).unwrap();

        let dir = tempfile::tempdir().unwrap();
        let digest = digest(nd.source()).unwrap();
        prop_assert_eq!(digest, trainable_tokens::format::digest(candle.table()).unwrap());
        for (name, rows) in [("nd", nd.rows().unwrap()), ("candle", candle.rows().unwrap())] {
            let mut builder = Adapter::builder(MODULE, &case.tokens(), rows).base(digest, DType::F32);
            if tied {
                builder = builder.tied("lm_head");
            }
            builder.build().unwrap().write(dir.path().join(name), Overwrite::Refuse).unwrap();
        }
        let file = |name: &str| std::fs::read(dir.path().join(name).join("adapter_model.safetensors")).unwrap();
        prop_assert_eq!(file("nd"), file("candle"), "both backends write the same bytes");

        let adapter = Adapter::read(dir.path().join("nd")).unwrap();
        prop_assert_eq!(adapter.config().token_indices(), &case.tokens[..]);
        let rows = adapter.rows(MODULE).unwrap();
        prop_assert!(rows.bits_eq(&case.rows()));
        let loaded = candle::TrainableTokens::with_rows(case.tensor(), &case.tokens, rows).unwrap();
        let all: Vec<u32> = (0..u32::try_from(case.v).unwrap()).collect();
        let from_candle = loaded.forward(&Tensor::new(&all[..], &Device::Cpu).unwrap()).unwrap();
        let from_nd = nd.lookup(&all).unwrap();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        prop_assert_eq!(bits(from_candle.flatten_all().unwrap().to_vec1().unwrap()), bits(from_nd.into_iter().collect()));
    }

    /// A run that is saved in one backend goes on in the other, bit for bit.
    #[test]
    fn training_goes_on_in_the_other_backend(case in case()) {
        let gradient = |step: u64| {
            let k = case.tokens.len();
            TokenRows::new(noise(case.seed ^ (100 + step), k * case.d), k, case.d).unwrap()
        };
        let config = AdamConfig { lr: 0.1, weight_decay: 0.1, ..AdamConfig::ADAMW };
        let mut nd: TrainableTokens<_> = TrainableTokens::new(NdTable::new(case.table()).unwrap(), case.tokens()).unwrap();
        let mut optimizer = Adam::new(config).unwrap();
        let mut state = None;
        for step in 0..6 {
            if step == 3 {
                let extra = serde_json::Value::Null;
                let bytes = TrainingState { optimizer: optimizer.state(), extra }.to_bytes().unwrap();
                state = Some((nd.rows().unwrap(), bytes));
            }
            nd.step_with(gradient(step), &mut optimizer, &mut []).unwrap();
        }
        let (rows, bytes) = state.unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(TrainingState::FILE_NAME), bytes).unwrap();
        let state = TrainingState::read(dir.path().join(TrainingState::FILE_NAME)).unwrap();
        let mut candle = candle::TrainableTokens::with_rows(case.tensor(), &case.tokens, &rows).unwrap();
        let mut resumed = Adam::new(config).unwrap();
        resumed.load_state(state.optimizer).unwrap();
        for step in 3..6 {
            candle.step_with(gradient(step), &mut resumed, &mut []).unwrap();
        }
        prop_assert!(candle.rows().unwrap().bits_eq(&nd.rows().unwrap()));
        prop_assert_eq!(resumed.state(), optimizer.state());
    }
}

/// The ndarray layer over a memory-mapped table gives what candle's gives over the loaded one.
fn mapped<T: Element + WithDType>(file_type: safetensors::Dtype) {
    let (v, d) = (50, 6);
    let values: Vec<T> = noise(3, v * d)
        .into_iter()
        .map(<T as Element>::from_f32)
        .collect();
    let bytes = TokenRows::new(values.clone(), v, d).unwrap().to_le_bytes();
    let view = safetensors::tensor::TensorView::new(file_type, vec![v, d], &bytes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let name = "model.embed_tokens.weight";
    safetensors::serialize_to_file([(name, view)], None, &dir.path().join("model.safetensors")).unwrap();
    let table = Checkpoint::open(dir.path()).unwrap().table(name).unwrap();
    assert_eq!((table.vocab_size(), table.dtype()), (v, <T as Element>::DTYPE));

    let ids = [4u32, 49, 0, 4, 7];
    let tokens = TokenSet::new([49, 4], v).unwrap();
    let rows = TokenRows::new(noise(5, 2 * d), 2, d).unwrap();
    let nd: TrainableTokens<_, T> = TrainableTokens::with_rows(table, tokens, &rows).unwrap();
    let loaded = Tensor::from_vec(values, (v, d), &Device::Cpu).unwrap();
    let candle = candle::TrainableTokens::with_rows(loaded, &[49, 4], &rows).unwrap();
    let want = candle.forward(&Tensor::new(&ids, &Device::Cpu).unwrap()).unwrap();
    let got = nd.lookup(&ids).unwrap().into_iter().collect::<Vec<T>>();
    assert_eq!(got, want.flatten_all().unwrap().to_vec1::<T>().unwrap());

    let plan = nd.plan(&ids).unwrap();
    let one = <T as Element>::from_f32(1.0);
    let gradient = nd.backward(&plan, Array2::from_elem((5, d), one).view()).unwrap();
    assert_eq!(gradient.to_f32_vec(), [[1.0; 6], [2.0; 6]].concat());
    assert_eq!(nd.logits(Array2::from_elem((1, d), one)).unwrap().dim(), (1, v));
}

#[test]
fn a_mapped_table_is_used_in_place() {
    mapped::<f64>(safetensors::Dtype::F64);
    mapped::<f32>(safetensors::Dtype::F32);
    mapped::<f16>(safetensors::Dtype::F16);
    mapped::<bf16>(safetensors::Dtype::BF16);
}
