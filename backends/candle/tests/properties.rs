//! What must hold for any table, tokens and batch.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Embedding, Module};
use common::{DTYPES, assert_close, bytes, noise, tolerance, values};
use proptest::prelude::*;
use trainable_tokens_candle::TrainableTokens;
use trainable_tokens_core::{
    Adam, AdamConfig, BackendError, CrossEntropyOptions, EmbedScale, ErrorKind, LayerOptions, LogitsChunk,
    Overlap, Reduction, Softcap,
};

/// A table's size and type, its trainable tokens, and a batch.
#[derive(Clone, Debug)]
struct Setup {
    vocab: usize,
    dim: usize,
    dtype: DType,
    tokens: Vec<u32>,
    ids: Vec<u32>,
    seed: usize,
}

impl Setup {
    fn base(&self) -> Tensor {
        noise(&[self.vocab, self.dim], self.dtype, self.seed)
    }

    fn layer(&self, base: &Tensor) -> TrainableTokens {
        TrainableTokens::wrap(Embedding::new(base.clone(), self.dim), &self.tokens).unwrap()
    }

    /// A layer whose rows differ from the base's.
    fn trained(&self, base: &Tensor) -> TrainableTokens {
        let mut layer = self.layer(base);
        let rows = noise(&[self.tokens.len(), self.dim], DType::F64, self.seed + 1);
        let rows = trainable_tokens_core::TokenRows::new(values(&rows), self.tokens.len(), self.dim);
        layer.set_rows(&rows.unwrap()).unwrap();
        layer
    }

    fn batch(&self) -> Tensor {
        Tensor::from_slice(&self.ids, self.ids.len(), &Device::Cpu).unwrap()
    }

    /// The table with the layer's rows written into it, in `f64`, as a variable with a dense gradient.
    fn dense(&self, layer: &TrainableTokens) -> Var {
        let mut table = values(&self.base());
        let rows = layer.var().unwrap().to_dtype(self.dtype).unwrap();
        for (row, id) in values(&rows).chunks(self.dim).zip(&self.tokens) {
            table[*id as usize * self.dim..][..self.dim].copy_from_slice(row);
        }
        Var::from_vec(table, (self.vocab, self.dim), &Device::Cpu).unwrap()
    }

    /// The rows of a dense gradient that belong to the tokens.
    fn rows_of(&self, dense: Option<&Tensor>) -> Vec<f64> {
        let Some(dense) = dense.map(values) else {
            return vec![0.0; self.tokens.len() * self.dim];
        };
        let rows = self
            .tokens
            .iter()
            .map(|id| &dense[*id as usize * self.dim..][..self.dim]);
        rows.flatten().copied().collect()
    }
}

fn setup() -> impl Strategy<Value = Setup> {
    let sizes = (1..24usize, 1..9usize, 0..4usize, any::<u16>());
    sizes.prop_flat_map(|(vocab, dim, dtype, seed)| {
        let last = u32::try_from(vocab).unwrap() - 1;
        let order = Just((0..=last).collect::<Vec<u32>>()).prop_shuffle();
        let count = prop_oneof![Just(0), Just(1), Just(vocab), 0..=vocab];
        let ids = prop::collection::vec(prop_oneof![Just(0), Just(last), 0..=last], 0..20);
        (order, count, ids).prop_map(move |(mut tokens, count, ids)| {
            tokens.truncate(count);
            let (dtype, seed) = (DTYPES[dtype], usize::from(seed));
            Setup {
                vocab,
                dim,
                dtype,
                tokens,
                ids,
                seed,
            }
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn a_fresh_layer_is_a_no_op(setup in setup()) {
        let base = setup.base();
        let layer = setup.layer(&base);
        let candle = Embedding::new(base.clone(), setup.dim);
        let ids = setup.batch();
        let got = layer.forward(&ids).unwrap();
        prop_assert_eq!(bytes(&got), bytes(&candle.forward(&ids).unwrap()));
        let hidden = noise(&[3, setup.dim], setup.dtype, 5);
        let logits = layer.tied_head().forward(&hidden).unwrap();
        prop_assert_eq!(bytes(&logits), bytes(&hidden.matmul(&base.t().unwrap()).unwrap()));
    }

    #[test]
    fn only_chosen_rows_change(setup in setup()) {
        let base = setup.base();
        let layer = setup.trained(&base);
        let (before, ids) = (bytes(&base), setup.batch());
        let width = setup.dim * setup.dtype.size_in_bytes();
        let (plain, got) = (bytes(&base), bytes(&layer.forward(&ids).unwrap()));
        let trained = bytes(&layer.var().unwrap().to_dtype(setup.dtype).unwrap());
        for (row, id) in got.chunks(width).zip(&setup.ids) {
            let want = match setup.tokens.iter().position(|token| token == id) {
                Some(slot) => &trained[slot * width..][..width],
                None => &plain[*id as usize * width..][..width],
            };
            prop_assert_eq!(row, want);
        }
        prop_assert_eq!(before, bytes(&base));
    }

    #[test]
    fn training_leaves_the_base_alone(setup in setup()) {
        let base = setup.base();
        let before = bytes(&base);
        let mut layer = setup.layer(&base);
        let head = layer.tied_head();
        let mut adam = Adam::new(AdamConfig::ADAMW).unwrap();
        for _ in 0..2 {
            let logits = head.forward(&layer.forward(&setup.batch()).unwrap()).unwrap();
            let gradients = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            prop_assert!(gradients.get(&base).is_none());
            layer.step(&gradients, &mut adam, &mut []).unwrap();
        }
        prop_assert_eq!(before, bytes(&base));
    }

    #[test]
    fn the_gradient_is_the_dense_ones_rows(setup in setup(), scale in prop::option::of(-2.0..2.0f64)) {
        let base = setup.base();
        let scale = scale.map(EmbedScale::Exact);
        let layer = setup.trained(&base).with_options(LayerOptions { scale, ..LayerOptions::default() });
        let upstream = noise(&[setup.ids.len(), setup.dim], setup.dtype, 7);
        let loss = |out: Tensor, upstream: &Tensor| (out * upstream).unwrap().sum_all().unwrap();
        let out = layer.forward(&setup.batch()).unwrap();
        let got = layer.gradient(&loss(out, &upstream).backward().unwrap()).unwrap();
        let dense = setup.dense(&layer);
        let factor = layer.layer().transform().scale.unwrap_or(1.0);
        let out = (dense.index_select(&setup.batch(), 0).unwrap() * factor).unwrap();
        let want = loss(out, &upstream.to_dtype(DType::F64).unwrap()).backward().unwrap();
        // Gradients of half tables are summed in f32.
        let tolerance = if setup.dtype == DType::F64 { 1e-12 } else { 2e-5 };
        assert_close("gradient", &got.to_f64_vec(), &setup.rows_of(want.get(&dense)), tolerance);
    }

    #[test]
    fn the_tied_heads_gradients_are_the_dense_ones(setup in setup(), rows in 0..5usize) {
        let layer = setup.trained(&setup.base());
        let head = layer.tied_head();
        let hidden = Var::from_tensor(&noise(&[rows, setup.dim], setup.dtype, 3)).unwrap();
        let upstream = noise(&[rows, setup.vocab], setup.dtype, 4);
        let logits = head.forward(&hidden).unwrap();
        let gradients = (&logits * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let wide = |t: &Tensor| t.detach().to_dtype(DType::F64).unwrap();
        let (dense, exact) = (setup.dense(&layer), Var::from_tensor(&wide(&hidden)).unwrap());
        let exact_logits = exact.matmul(&dense.t().unwrap()).unwrap();
        let want = (&exact_logits * wide(&upstream)).unwrap().sum_all().unwrap().backward().unwrap();
        let tolerance = tolerance(setup.dtype);
        assert_close("logits", &values(&logits), &values(&exact_logits), tolerance);
        let got = gradients.get(&hidden).unwrap();
        assert_close("hidden", &values(got), &values(want.get(&exact).unwrap()), tolerance);
        let got = layer.gradient(&gradients).unwrap();
        let of_rows = if setup.dtype == DType::F64 { 1e-12 } else { 2e-5 };
        assert_close("rows", &got.to_f64_vec(), &setup.rows_of(want.get(&dense)), of_rows);
    }

    #[test]
    fn the_fused_loss_is_that_of_the_logits(
        setup in setup(),
        labels in prop::collection::vec(prop::option::of(any::<u32>()), 1..12),
        softcap in prop::option::of(0.5..5.0f64),
        mean in any::<bool>(),
        chunk in 1..14usize,
    ) {
        let layer = setup.trained(&setup.base());
        let head = layer.tied_head();
        let vocab = u32::try_from(setup.vocab).unwrap();
        let labels: Vec<Option<u32>> = labels.iter().map(|label| label.map(|id| id % vocab)).collect();
        let count = labels.iter().flatten().count();
        let reduction = if mean { Reduction::Mean } else { Reduction::Sum };
        let options = CrossEntropyOptions {
            softcap: softcap.map(|softcap| Softcap::new(softcap).unwrap()),
            reduction,
            chunk: LogitsChunk::rows(chunk).unwrap(),
            ..CrossEntropyOptions::default()
        };
        let n = labels.len();
        let hidden = Var::from_tensor(&noise(&[n, setup.dim], setup.dtype, 3)).unwrap();
        let ids: Vec<i64> = labels.iter().map(|label| label.map_or(-100, i64::from)).collect();
        let got = head.cross_entropy(&hidden, &Tensor::from_vec(ids, n, &Device::Cpu).unwrap(), options);
        if mean && count == 0 {
            prop_assert_eq!(got.unwrap_err().kind(), ErrorKind::AllIgnored);
            return Ok(());
        }
        let got = got.unwrap();

        let wide = |t: &Tensor| t.detach().to_dtype(DType::F64).unwrap();
        let (dense, exact) = (setup.dense(&layer), Var::from_tensor(&wide(&hidden)).unwrap());
        let mut logits = exact.matmul(&dense.t().unwrap()).unwrap();
        if let Some(softcap) = softcap {
            logits = ((logits / softcap).unwrap().tanh().unwrap() * softcap).unwrap();
        }
        let at: Vec<u32> = labels.iter().map(|label| label.unwrap_or(0)).collect();
        let of_labels = logits.gather(&Tensor::from_vec(at, (n, 1), &Device::Cpu).unwrap(), 1).unwrap();
        let losses = (logits.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap() - of_labels).unwrap();
        let factor = if mean { 1.0 / count as f64 } else { 1.0 };
        let factors: Vec<f64> = labels.iter().map(|label| if label.is_some() { factor } else { 0.0 }).collect();
        let factors = Tensor::from_vec(factors, (n, 1), &Device::Cpu).unwrap();
        let want = (losses * factors).unwrap().sum_all().unwrap();

        // The logits of half tables are never rounded; the gradient of the hidden states is.
        let of_sums = if setup.dtype == DType::F64 { 1e-12 } else { 2e-5 };
        assert_close("loss", &values(&got), &values(&want), of_sums);
        let (got, want) = (got.backward().unwrap(), want.backward().unwrap());
        let of_hidden = values(want.get(&exact).unwrap());
        assert_close("hidden", &values(got.get(&hidden).unwrap()), &of_hidden, tolerance(setup.dtype));
        let of_rows = layer.gradient(&got).unwrap().to_f64_vec();
        assert_close("rows", &of_rows, &setup.rows_of(want.get(&dense)), of_sums);
    }

    #[test]
    fn unmerging_restores_every_bit(setup in setup()) {
        let base = setup.base();
        let mut layer = setup.trained(&base);
        let (before, live) = (bytes(&base), bytes(&layer.forward(&setup.batch()).unwrap()));
        layer.merge().unwrap();
        let candle = Embedding::new(base.clone(), setup.dim).forward(&setup.batch()).unwrap();
        prop_assert_eq!(&bytes(&candle), &live, "everything that shares the table sees the rows");
        prop_assert_eq!(&bytes(&layer.forward(&setup.batch()).unwrap()), &live);
        layer.unmerge().unwrap();
        prop_assert_eq!(bytes(&base), before);
        prop_assert_eq!(&bytes(&layer.forward(&setup.batch()).unwrap()), &live);
    }

    #[test]
    fn several_adapters_are_what_merging_them_makes(
        setup in setup(),
        shift in 1..24u32,
        weights in prop::option::of([0.01..9.0f64, 0.01..9.0f64]),
    ) {
        let base = setup.base();
        let mut layer = setup.trained(&base);
        let last = u32::try_from(setup.vocab).unwrap();
        let others: Vec<u32> = setup.tokens.iter().rev().map(|id| (id + shift) % last).collect();
        let rows = values(&noise(&[others.len(), setup.dim], DType::F64, setup.seed + 9));
        let rows = trainable_tokens_core::TokenRows::new(rows, others.len(), setup.dim).unwrap();
        layer.add_adapter_with_rows("other", &others, &rows).unwrap();
        let head = layer.tied_head();
        let hidden = noise(&[2, setup.dim], setup.dtype, 5);
        let overlap = weights.map_or(Overlap::LastWins, |weights| Overlap::WeightedMean(weights.to_vec()));
        layer.activate_overlapping(&["default", "other"], overlap).unwrap();
        let live = bytes(&layer.forward(&setup.batch()).unwrap());
        let logits = values(&head.forward(&hidden).unwrap());
        layer.merge().unwrap();
        prop_assert_eq!(&bytes(&layer.forward(&setup.batch()).unwrap()), &live);
        let merged = values(&head.forward(&hidden).unwrap());
        assert_close("logits", &logits, &merged, tolerance(setup.dtype));
        layer.unmerge().unwrap();
        prop_assert_eq!(bytes(&base), bytes(&setup.base()));
        prop_assert_eq!(&bytes(&layer.forward(&setup.batch()).unwrap()), &live);

        // Each half of a mixed batch sees one adapter alone.
        let both = Tensor::stack(&[setup.batch(), setup.batch()], 0).unwrap();
        let mixed = layer.lookup_mixed(&both, &[Some("other"), None]).unwrap();
        layer.activate(&["other"]).unwrap();
        let other = layer.forward(&setup.batch()).unwrap();
        layer.activate(&[]).unwrap();
        let none = layer.forward(&setup.batch()).unwrap();
        prop_assert_eq!(bytes(&mixed), [bytes(&other), bytes(&none)].concat());
    }
}
