//! What one backend writes, every other reads to the same bits; the shared optimizers move all alike.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../backends/burn/tests/support/harness.rs"]
mod burn;
#[path = "../backends/candle/tests/support/harness.rs"]
mod candle;
#[path = "../backends/dfdx/tests/support/harness.rs"]
mod dfdx;
#[path = "../backends/ndarray/tests/support/harness.rs"]
mod nd;
#[path = "support/noise.rs"]
mod noise;

use candle_core::{Device, Tensor, WithDType};
use candle_nn::Module;
use half::{bf16, f16};
use ndarray::Array2;
use noise::noise;
use proptest::prelude::*;
use trainable_tokens::candle::TrainableTokens as CandleLayer;
use trainable_tokens::format::{Adapter, Checkpoint, Overwrite, TrainingState, digest};
use trainable_tokens::ndarray::{TrainableTokens, TrainableTokensExt};
use trainable_tokens::{
    Adam, AdamConfig, DType, Element, EmbeddingSource, RowOptimizer, TokenRows, TokenSet,
};
use trainable_tokens_testkit::{Harness, Layer};

const MODULE: &str = "model.embed_tokens";

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
    fn table(&self) -> TokenRows {
        noise(self.seed, DType::F32, self.v, self.d)
    }

    fn tokens(&self) -> TokenSet {
        TokenSet::new(self.tokens.clone(), self.v).unwrap()
    }

    fn rows(&self) -> TokenRows {
        let k = self.tokens.len();
        noise(self.seed ^ 9, DType::F32, k, self.d)
    }
}

/// Runs one function for every backend that writes and every one that reads.
macro_rules! in_every_pair {
    ($function:ident($case:expr)) => {
        in_every_pair!(@writer $function($case) nd::Nd<f32>);
        in_every_pair!(@writer $function($case) candle::OnCpu<f32>);
        in_every_pair!(@writer $function($case) burn::OnFlex<f32>);
        in_every_pair!(@writer $function($case) dfdx::OnCpu<f32>);
    };
    (@writer $function:ident($case:expr) $Writer:ty) => {
        $function::<$Writer, nd::Nd<f32>>($case);
        $function::<$Writer, candle::OnCpu<f32>>($case);
        $function::<$Writer, burn::OnFlex<f32>>($case);
        $function::<$Writer, dfdx::OnCpu<f32>>($case);
    };
}

/// Save, then load in another backend: the same rows, and the same lookup of every token.
fn saved_and_loaded<W: Harness, R: Harness>(case: &Case) {
    let layer =
        Layer::<W>::with_rows(W::source(&case.table()).unwrap(), case.tokens(), &case.rows()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut builder = Adapter::builder(MODULE, layer.tokens(), layer.rows().unwrap());
    builder = builder.base(digest(layer.source()).unwrap(), DType::F32);
    if case.seed.is_multiple_of(2) {
        builder = builder.tied("lm_head");
    }
    builder
        .build()
        .unwrap()
        .write(dir.path().join("adapter"), Overwrite::Refuse)
        .unwrap();

    let adapter = Adapter::read(dir.path().join("adapter")).unwrap();
    let source = R::source(&case.table()).unwrap();
    assert_eq!(adapter.metadata().base_digest, Some(digest(&source).unwrap()));
    let module = adapter.module(MODULE).unwrap();
    let rows = module.rows();
    assert!(rows.bits_eq(&case.rows()));
    let loaded = Layer::<R>::with_rows(source, module.token_set(case.v).unwrap(), rows).unwrap();
    let all: Vec<u32> = (0..u32::try_from(case.v).unwrap()).collect();
    let written = W::read(&layer.lookup(&all).unwrap()).unwrap();
    assert!(R::read(&loaded.lookup(&all).unwrap()).unwrap().bits_eq(&written));
}

/// A run that is saved in one backend goes on in the other, bit for bit.
fn resumed<W: Harness, R: Harness>(case: &Case) {
    let k = case.tokens.len();
    let gradient = |step: u64| noise(case.seed ^ (100 + step), DType::F32, k, case.d);
    let config = AdamConfig {
        lr: 0.1,
        weight_decay: 0.1,
        ..AdamConfig::ADAMW
    };
    let mut layer = Layer::<W>::new(W::source(&case.table()).unwrap(), case.tokens()).unwrap();
    let (mut optimizer, mut saved) = (Adam::new(config).unwrap(), None);
    for step in 0..6 {
        if step == 3 {
            let dir = tempfile::tempdir().unwrap();
            let extra = serde_json::Value::Null;
            let optimizer = optimizer.state();
            TrainingState { optimizer, extra }.write_into(dir.path()).unwrap();
            let state = TrainingState::read(dir.path().join(TrainingState::FILE_NAME)).unwrap();
            saved = Some((layer.rows().unwrap(), state));
        }
        layer.step_with(gradient(step), &mut optimizer, &mut []).unwrap();
    }
    let (rows, state) = saved.unwrap();
    let mut other = Layer::<R>::with_rows(R::source(&case.table()).unwrap(), case.tokens(), &rows).unwrap();
    let mut again = Adam::new(config).unwrap();
    again.load_state(state.optimizer).unwrap();
    for step in 3..6 {
        other.step_with(gradient(step), &mut again, &mut []).unwrap();
    }
    assert!(other.rows().unwrap().bits_eq(&layer.rows().unwrap()));
    assert_eq!(again.state(), optimizer.state());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_saved_adapter_is_the_same_in_every_backend(case in case()) {
        in_every_pair!(saved_and_loaded(&case));
    }

    #[test]
    fn training_goes_on_in_every_other_backend(case in case()) {
        in_every_pair!(resumed(&case));
    }
}

/// The ndarray layer over a memory-mapped table gives what candle's gives over the loaded one.
fn mapped<T: Element + WithDType>(file_type: safetensors::Dtype) {
    let (v, d) = (50, 6);
    let rows = noise(3, <T as Element>::DTYPE, v, d);
    let (values, bytes) = (rows.as_slice::<T>().unwrap().to_vec(), rows.to_le_bytes());
    let view = safetensors::tensor::TensorView::new(file_type, vec![v, d], &bytes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let name = "model.embed_tokens.weight";
    safetensors::serialize_to_file([(name, view)], None, &dir.path().join("model.safetensors")).unwrap();
    let table = Checkpoint::open(dir.path()).unwrap().table(name).unwrap();
    assert_eq!((table.vocab_size(), table.dtype()), (v, <T as Element>::DTYPE));

    let ids = [4u32, 49, 0, 4, 7];
    let tokens = TokenSet::new([49, 4], v).unwrap();
    let rows = noise(5, DType::F32, 2, d);
    let nd: TrainableTokens<_, T> = TrainableTokens::with_rows(table, tokens, &rows).unwrap();
    let loaded = Tensor::from_vec(values, (v, d), &Device::Cpu).unwrap();
    let candle = CandleLayer::with_rows(loaded, &[49, 4], &rows).unwrap();
    let want = candle.forward(&Tensor::new(&ids, &Device::Cpu).unwrap()).unwrap();
    let got = nd.lookup(&ids).unwrap().into_iter().collect::<Vec<T>>();
    assert_eq!(got, want.flatten_all().unwrap().to_vec1::<T>().unwrap());

    let plan = nd.plan(&ids).unwrap();
    let one = <T as Element>::from_f32(1.0);
    let gradient = nd.backward(&plan, Array2::from_elem((5, d), one).view()).unwrap();
    let gradient = nd.gradient(&gradient).unwrap();
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
