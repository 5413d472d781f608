//! Models whose code is not changed: merged inference, and training over a compact table.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Embedding, Init, Linear, Module, Optimizer, VarBuilder};
use common::{DTYPES, assert_close, bytes, noise};
use trainable_tokens_candle::{
    AdapterMut, CandleTable, CompactTable, MergedBackend, TrainableTokens, merged_var_builder,
};
use trainable_tokens_core::{
    Adam, AdamConfig, BackendError, ErrorKind, MergeCheck, Overlap, RowOptimizer, TokenRows,
};

const VOCAB: usize = 40;
const DIM: usize = 6;
const TABLE: &str = "model.embed_tokens.weight";
const TOKENS: [u32; 3] = [30, 2, 17];

/// A model that knows nothing of trainable tokens: embedding, a nonlinear layer, an untied head.
struct Model {
    embed: Embedding,
    up: Linear,
    head: Linear,
}

impl Model {
    fn load(vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            embed: candle_nn::embedding(VOCAB, DIM, vb.pp("model.embed_tokens"))?,
            up: candle_nn::linear(DIM, 12, vb.pp("model.up"))?,
            head: candle_nn::linear_no_bias(12, VOCAB, vb.pp("lm_head"))?,
        })
    }

    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.head
            .forward(&self.up.forward(&self.embed.forward(ids)?)?.silu()?)
    }
}

fn checkpoint(dtype: DType) -> HashMap<String, Tensor> {
    let tensors: [(&str, &[usize]); 4] = [
        (TABLE, &[VOCAB, DIM]),
        ("model.up.weight", &[12, DIM]),
        ("model.up.bias", &[12]),
        ("lm_head.weight", &[VOCAB, 12]),
    ];
    let tensors = tensors.into_iter().enumerate();
    tensors
        .map(|(seed, (name, shape))| (name.to_owned(), noise(shape, dtype, seed)))
        .collect()
}

fn builder(tensors: &HashMap<String, Tensor>, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone(), dtype, &Device::Cpu)
}

fn rows() -> TokenRows {
    let values: Vec<f32> = (0..3 * 6u8).map(|i| f32::from(i) * 0.1 - 0.77).collect();
    TokenRows::new(values, 3, DIM).unwrap()
}

fn ids() -> Tensor {
    Tensor::new(&[[30i64, 1, 2, 9], [17, 17, 39, 0]], &Device::Cpu).unwrap()
}

#[test]
fn the_merged_weight_is_that_of_a_merge() {
    for dtype in DTYPES {
        let tensors = checkpoint(dtype);
        let before = bytes(&tensors[TABLE]);
        let vb = merged_var_builder(builder(&tensors, dtype), TABLE, &TOKENS, rows());
        let served = vb.get((VOCAB, DIM), TABLE).unwrap();
        let again = vb.pp("model.embed_tokens").get((VOCAB, DIM), "weight").unwrap();
        let mut layer = TrainableTokens::with_rows(tensors[TABLE].copy().unwrap(), &TOKENS, &rows()).unwrap();
        layer.merge().unwrap();
        assert_eq!(bytes(&served), bytes(layer.table().tensor()));
        assert_eq!(bytes(&again), bytes(&served));
        assert_eq!(
            bytes(&tensors[TABLE]),
            before,
            "the checkpoint's own tensor is not written"
        );
        let other = vb.get((12, DIM), "model.up.weight").unwrap();
        assert_eq!(bytes(&other), bytes(&tensors["model.up.weight"]));
        assert!(vb.contains_tensor(TABLE) && !vb.contains_tensor("nothing"));
        assert!(Model::load(&vb).unwrap().forward(&ids()).is_ok());
    }
}

#[test]
fn a_head_under_another_name_gets_the_merged_weight_too() {
    let tensors = checkpoint(DType::F32);
    let inner: Box<dyn SimpleBackend> = Box::new(tensors);
    let backend = MergedBackend::new(inner, TABLE, &TOKENS, rows()).with_alias("output.weight");
    let get = |name| {
        backend
            .get(
                (VOCAB, DIM).into(),
                name,
                Init::Const(0.0),
                DType::F32,
                &Device::Cpu,
            )
            .unwrap()
    };
    assert_eq!(bytes(&get("output.weight")), bytes(&get(TABLE)));
    assert!(backend.contains_tensor("output.weight"));
    let unchecked = backend
        .get_unchecked("output.weight", DType::BF16, &Device::Cpu)
        .unwrap();
    assert_eq!(unchecked.dtype(), DType::BF16);
}

#[test]
fn several_adapters_are_merged_as_a_layer_merges_them() {
    let other: [u32; 2] = [2, 9];
    let more = TokenRows::new((0..12u8).map(|i| f32::from(i) * -0.2).collect(), 2, DIM).unwrap();
    let means = Overlap::WeightedMean(vec![3.0, 1.0]);
    for (dtype, overlap) in DTYPES
        .iter()
        .flat_map(|dtype| [(*dtype, Overlap::LastWins), (*dtype, means.clone())])
    {
        let tensors = checkpoint(dtype);
        let serve = |overlap: &Overlap| {
            let inner: Box<dyn SimpleBackend> = Box::new(tensors.clone());
            MergedBackend::new(inner, TABLE, &TOKENS, rows())
                .with_adapter("more", &other, more.clone())
                .with_overlap(overlap.clone())
                .with_check(MergeCheck::Finite)
                .get_unchecked(TABLE, dtype, &Device::Cpu)
        };
        let mut layer = TrainableTokens::with_rows(tensors[TABLE].copy().unwrap(), &TOKENS, &rows()).unwrap();
        layer.add_adapter_with_rows("more", &other, &more).unwrap();
        let names = ["default", "more"];
        layer
            .merge_adapters(&names, &overlap, MergeCheck::Finite)
            .unwrap();
        let served = serve(&overlap).unwrap();
        assert_eq!(bytes(&served), bytes(layer.table().tensor()));
        assert_ne!(bytes(&served), bytes(&tensors[TABLE]));
        let error = serve(&Overlap::Refuse).unwrap_err().to_string();
        assert!(error.contains("token id 2 is trained by both adapter"), "{error}");
    }
    let inner: Box<dyn SimpleBackend> = Box::new(checkpoint(DType::F32));
    let bad = TokenRows::new(vec![f32::NAN; DIM], 1, DIM).unwrap();
    let served = MergedBackend::new(inner, TABLE, &[4], bad).with_check(MergeCheck::Finite);
    let error = served.get_unchecked(TABLE, DType::F32, &Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("token id 4 "), "{error}");
}

#[test]
fn rows_that_do_not_fit_the_weight_are_refused() {
    let load = |tokens: &[u32], rows: TokenRows| {
        let vb = merged_var_builder(builder(&checkpoint(DType::F32), DType::F32), TABLE, tokens, rows);
        vb.get((VOCAB, DIM), TABLE).unwrap_err().to_string()
    };
    assert!(load(&[1, 2, 40], rows()).contains("token id 40 is outside"));
    assert!(load(&[1, 2], rows()).contains("shape"));
    assert!(load(&[1, 2, 1], rows()).contains("token id 1 is given twice"));
}

fn compact(tensors: &HashMap<String, Tensor>, dtype: DType) -> CompactTable {
    let table = CandleTable::new(tensors[TABLE].clone()).unwrap();
    let used = ids().flatten_all().unwrap().to_vec1::<i64>().unwrap();
    let used = used.into_iter().map(|id| u32::try_from(id).unwrap());
    CompactTable::new(&table, &TOKENS, used, dtype, &Device::Cpu).unwrap()
}

#[test]
fn logits_over_the_compact_table_are_the_whole_ones() {
    for dtype in DTYPES {
        let tensors = checkpoint(dtype);
        let compact = compact(&tensors, dtype);
        assert_eq!(compact.tensor().dims(), [3 + 7, DIM]);
        let model = Model::load(&compact.var_builder(builder(&tensors, dtype), TABLE)).unwrap();
        let whole = Model::load(&builder(&tensors, dtype)).unwrap();
        let got = model.forward(&compact.remap(&ids()).unwrap()).unwrap();
        assert_eq!(bytes(&got), bytes(&whole.forward(&ids()).unwrap()));
    }
}

/// Trains both ways; the rows after it must be the same.
fn train(dtype: DType, mut step: impl FnMut(&mut CompactTable, &Tensor)) -> (CompactTable, Vec<Vec<u8>>) {
    let tensors = checkpoint(dtype);
    let mut compact = compact(&tensors, dtype);
    let model = Model::load(&compact.var_builder(builder(&tensors, dtype), TABLE)).unwrap();
    let mut seen = Vec::new();
    for _ in 0..4 {
        let logits = model.forward(&compact.remap(&ids()).unwrap()).unwrap();
        seen.push(bytes(&logits));
        step(&mut compact, &logits.sqr().unwrap().mean_all().unwrap());
    }
    (compact, seen)
}

#[test]
fn training_over_the_compact_table_is_training_over_the_whole() {
    let adam = || {
        Adam::new(AdamConfig {
            lr: 0.05,
            ..AdamConfig::ADAMW
        })
        .unwrap()
    };
    let mut optimizer = adam();
    let (compact, seen) = train(DType::F32, |compact, loss| {
        compact
            .step(&loss.backward().unwrap(), &mut optimizer, &mut [])
            .unwrap();
    });
    assert_eq!(optimizer.steps_taken(), 4);
    assert!(seen.windows(2).all(|pair| pair[0] != pair[1]));
    assert_eq!(compact.var().unwrap().dims(), [3, DIM]);

    let tensors = checkpoint(DType::F32);
    let mut layer = TrainableTokens::from_tensor(tensors[TABLE].clone(), &TOKENS).unwrap();
    let whole = Model::load(&builder(&tensors, DType::F32)).unwrap();
    let mut optimizer = adam();
    for logits in &seen {
        let hidden = whole
            .up
            .forward(&layer.forward(&ids()).unwrap())
            .unwrap()
            .silu()
            .unwrap();
        let out = whole.head.forward(&hidden).unwrap();
        assert_eq!(&bytes(&out), logits);
        let gradients = out.sqr().unwrap().mean_all().unwrap().backward().unwrap();
        layer.step(&gradients, &mut optimizer, &mut []).unwrap();
    }
    assert!(compact.rows().unwrap().bits_eq(&layer.rows().unwrap()));

    // And the rows serve a merged model.
    let vb = merged_var_builder(
        builder(&tensors, DType::F32),
        TABLE,
        &TOKENS,
        compact.rows().unwrap(),
    );
    let merged = Model::load(&vb).unwrap().forward(&ids()).unwrap();
    layer.merge().unwrap();
    assert_eq!(bytes(&merged), bytes(&whole.forward(&ids()).unwrap()));
}

#[test]
fn candles_own_optimizer_trains_the_compact_table() {
    let mut adam = None;
    let (compact, seen) = train(DType::BF16, |compact, loss| {
        let new = || candle_nn::AdamW::new_lr(vec![compact.var().unwrap()], 0.05).unwrap();
        adam.get_or_insert_with(new).backward_step(loss).unwrap();
    });
    assert!(seen.windows(2).all(|pair| pair[0] != pair[1]));
    compact.refresh().unwrap();
    let served = compact.tensor().narrow(0, 0, 3).unwrap().contiguous().unwrap();
    assert_eq!(
        bytes(&served),
        bytes(&compact.var().unwrap().to_dtype(DType::BF16).unwrap())
    );
}

#[test]
fn what_a_compact_table_cannot_serve_is_refused() {
    let tensors = checkpoint(DType::F32);
    let mut compact = compact(&tensors, DType::F32);
    let error = compact
        .remap(&Tensor::new(&[5u32], &Device::Cpu).unwrap())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TokenOutOfRange);
    assert_eq!(
        error.to_string(),
        "token id 5 is not among the ids that the compact table was built for"
    );
    let vb = compact.var_builder(builder(&tensors, DType::F32), TABLE);
    assert!(vb.get((VOCAB, DIM + 1), TABLE).is_err());
    assert!(vb.to_dtype(DType::BF16).get((VOCAB, DIM), TABLE).is_err());
    let mut adam = Adam::new(AdamConfig::ADAMW).unwrap();
    let cut = compact.tensor().detach().sum_all().unwrap().backward().unwrap();
    let error = compact.step(&cut, &mut adam, &mut []).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoGradient);
    let table = CandleTable::new(tensors[TABLE].clone()).unwrap();
    let error = CompactTable::new(&table, &[1], [40], DType::F32, &Device::Cpu).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TokenOutOfRange);
}

#[test]
fn a_compact_table_without_tokens_or_without_other_rows_works() {
    let tensors = checkpoint(DType::F32);
    let table = CandleTable::new(tensors[TABLE].clone()).unwrap();
    let none = CompactTable::new(&table, &[], [4, 4, 1], DType::F32, &Device::Cpu).unwrap();
    assert_eq!(
        (none.tensor().dims(), none.remap_slice(&[1, 4]).unwrap()),
        (&[2, DIM][..], vec![1, 0])
    );
    none.refresh().unwrap();
    let all = CompactTable::new(&table, &[4, 1], [1, 4], DType::F32, &Device::Cpu).unwrap();
    let gradients = all.tensor().sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.get(&all.var().unwrap()).unwrap().dims(), [2, DIM]);
}

/// Adapters `a` and `b`, which share token 2.
fn two_adapters(dtype: DType) -> CompactTable {
    let table = CandleTable::new(checkpoint(dtype)[TABLE].clone()).unwrap();
    let adapters = [("a", &[30, 2][..]), ("b", &[2, 17])];
    let used = [1, 9, 39, 0];
    let mut compact = CompactTable::with_adapters(&table, &adapters, used, dtype, &Device::Cpu).unwrap();
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        let values = noise(&[2, DIM], DType::F64, 40 + seed).flatten_all().unwrap();
        let rows = TokenRows::new(values.to_vec1::<f64>().unwrap(), 2, DIM).unwrap();
        compact.adapter_mut(name).unwrap().set_rows(&rows).unwrap();
    }
    compact
}

/// A layer over the whole table with the adapters of a compact one.
fn whole_layer(dtype: DType, compact: &CompactTable) -> TrainableTokens {
    let mut layer = TrainableTokens::frozen(checkpoint(dtype)[TABLE].clone()).unwrap();
    for name in compact.adapter_names() {
        let adapter = compact.adapter(&name).unwrap();
        let (tokens, rows) = (adapter.tokens().to_vec(), adapter.rows().unwrap());
        layer.add_adapter_with_rows(&name, &tokens, &rows).unwrap();
    }
    layer
}

#[test]
fn a_compact_table_sends_ids_to_the_adapters_that_are_active() {
    for dtype in DTYPES {
        let mut compact = two_adapters(dtype);
        let mut layer = whole_layer(dtype, &compact);
        assert_eq!(compact.adapter_names(), ["a", "b"]);
        let vb = compact.var_builder(builder(&checkpoint(dtype), dtype), TABLE);
        let embed = candle_nn::embedding(VOCAB, DIM, vb.pp("model.embed_tokens")).unwrap();
        let check = |compact: &CompactTable, layer: &TrainableTokens, what: &str| {
            let got = embed.forward(&compact.remap(&ids()).unwrap()).unwrap();
            assert_eq!(bytes(&got), bytes(&layer.forward(&ids()).unwrap()), "{what}");
        };
        check(&compact, &layer, "none");
        assert_eq!(
            compact.activate(&["a", "b"]).unwrap_err().kind(),
            ErrorKind::Overlap
        );
        for names in [&["a"][..], &["b"], &["a", "b"], &["b", "a"]] {
            compact.activate_overlapping(names, Overlap::LastWins).unwrap();
            layer.activate_overlapping(names, Overlap::LastWins).unwrap();
            assert_eq!(compact.active_names(), names);
            check(&compact, &layer, "active");
        }
        compact.disable().unwrap();
        layer.disable().unwrap();
        check(&compact, &layer, "disabled");
        let names = [Some("b"), None];
        assert_eq!(
            compact.remap_mixed(&ids(), &names).unwrap_err().kind(),
            ErrorKind::State
        );
        compact.enable();
        layer.enable();
        let got = embed
            .forward(&compact.remap_mixed(&ids(), &names).unwrap())
            .unwrap();
        assert_eq!(bytes(&got), bytes(&layer.lookup_mixed(&ids(), &names).unwrap()));
        let few = compact.remap_mixed(&ids(), &names[..1]).unwrap_err();
        assert_eq!(few.kind(), ErrorKind::Shape);
        let mean = Overlap::WeightedMean(vec![1.0, 1.0]);
        let error = compact.activate_overlapping(&["a", "b"], mean).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        check(&compact, &layer, "after refusals");
    }
}

#[test]
fn adapters_of_a_compact_table_train_as_over_the_whole() {
    let mut compact = two_adapters(DType::F64);
    let mut layer = whole_layer(DType::F64, &compact);
    let tensors = checkpoint(DType::F64);
    let model = Model::load(&compact.var_builder(builder(&tensors, DType::F64), TABLE)).unwrap();
    let whole = Model::load(&builder(&tensors, DType::F64)).unwrap();
    let names = [Some("b"), Some("a")];
    let mut adam = [(); 4].map(|()| Adam::new(AdamConfig::ADAMW).unwrap());
    for _ in 0..3 {
        let mixed = compact.remap_mixed(&ids(), &names).unwrap();
        // Another batch before the first one's backward pass: places stay.
        compact.remap_mixed(&ids(), &[None, Some("b")]).unwrap();
        let loss = model.forward(&mixed).unwrap().sqr().unwrap().mean_all().unwrap();
        let gradients = loss.backward().unwrap();
        let rows = layer.lookup_mixed(&ids(), &names).unwrap();
        let hidden = whole.up.forward(&rows).unwrap().silu().unwrap();
        let want = whole
            .head
            .forward(&hidden)
            .unwrap()
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap();
        assert_eq!(bytes(&loss), bytes(&want));
        let want = want.backward().unwrap();
        for (at, name) in ["a", "b"].into_iter().enumerate() {
            let step = |mut adapter: AdapterMut<'_>, gradients: &GradStore, adam: &mut Adam| {
                adapter.step(gradients, adam, &mut []).unwrap();
                adapter.rows().unwrap().to_f64_vec()
            };
            let got = step(compact.adapter_mut(name).unwrap(), &gradients, &mut adam[at]);
            let want = step(layer.adapter_mut(name).unwrap(), &want, &mut adam[2 + at]);
            assert_close(name, &got, &want, 1e-12);
        }
    }
}
