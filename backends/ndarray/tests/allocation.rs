//! No step allocates in proportion to V x D; with buffers of the caller's, a step allocates nothing.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use ndarray::{Array2, OwnedRepr};
use trainable_tokens_core::{
    Adam, AdamConfig, CrossEntropyOptions, CrossEntropyPlan, EmbedScale, LayerOptions, LogitsChunk, Padding,
    PaddingRule, TokenId, TokenSet,
};
use trainable_tokens_format::Checkpoint;
use trainable_tokens_ndarray::{LossBuffers, NdTable, TrainableTokens, TrainableTokensExt};
use trainable_tokens_testkit::{CountingAllocator, allocated};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

type Layer = TrainableTokens<NdTable<OwnedRepr<f32>>>;

/// Runs `work` and returns the largest allocation and the sum of all, in bytes.
fn measure(work: impl FnOnce()) -> (usize, usize) {
    let ((), cost) = allocated(work).unwrap();
    (cost.largest, cost.total)
}

// One test: the counters are the process's.
#[test]
fn a_step_never_allocates_the_table() {
    const V: usize = 200_000;
    const D: usize = 64;
    const N: usize = 256;
    let table = Array2::<f32>::ones((V, D));
    let tokens: Vec<u32> = (0..100).map(|i| 199_999 - i * 7).collect();
    let ids: Vec<u32> = (0..256)
        .map(|i| {
            if i % 3 == 0 {
                tokens[i % 100]
            } else {
                700 * u32::try_from(i).unwrap()
            }
        })
        .collect();
    let tokens = TokenSet::new(tokens, V).unwrap();
    let mut layer: Layer = TrainableTokens::new(NdTable::new(table).unwrap(), tokens).unwrap();
    let mut optimizer = Adam::new(AdamConfig::ADAMW).unwrap();
    let upstream = Array2::<f32>::ones((N, D));

    let (largest, total) = measure(|| {
        let plan = layer.plan(&ids).unwrap();
        let rows = layer.lookup_planned(&plan).unwrap();
        assert_eq!(rows.dim(), (N, D));
        let gradient = layer.backward(&plan, upstream.view()).unwrap();
        layer.step(&gradient, &mut optimizer, &mut []).unwrap();
    });
    assert!(largest <= N * D * 4, "a step allocated {largest} bytes at once");
    assert!(total < 8 * N * D * 4, "a step allocated {total} bytes");

    let hidden = Array2::<f32>::ones((4, D));
    let logits_gradient = Array2::<f32>::ones((4, V));
    let (largest, _) = measure(|| {
        let mut gradient = layer.zero_gradient();
        layer.logits(hidden.clone()).unwrap();
        layer
            .logits_backward(hidden.view(), logits_gradient.view(), &mut gradient)
            .unwrap();
    });
    assert!(largest <= 4 * V * 4, "the head allocated {largest} bytes at once");

    mapped(&ids, &upstream);

    let padding = Padding {
        token: TokenId(199_999),
        rule: PaddingRule::NoLookupGradient,
    };
    let plain = LayerOptions::default();
    let padded = LayerOptions {
        padding: Some(padding),
        scale: Some(EmbedScale::TableDType(8.0)),
        scale_grad_by_freq: true,
        ..plain
    };
    for options in [plain, padded] {
        layer = layer.with_options(options);
        reused(&mut layer, &ids, &upstream, &mut optimizer);
    }
}

/// From the second step on nothing at all is allocated: plan, lookup, backward pass, optimizer.
fn reused(layer: &mut Layer, ids: &[u32], upstream: &Array2<f32>, optimizer: &mut Adam) {
    let mut plan = layer.plan(ids).unwrap();
    let mut out = Array2::<f32>::zeros(upstream.raw_dim());
    let mut gradient = layer.zero_gradient();
    let mut step = || {
        plan.rebuild(layer.tokens(), layer.options(), ids).unwrap();
        layer.lookup_into(&plan, out.view_mut()).unwrap();
        gradient.zero();
        layer
            .backward_into(&plan, upstream.view(), &mut gradient)
            .unwrap();
        layer.step(&gradient, optimizer, &mut []).unwrap();
    };
    step();
    let (_, total) = measure(step);
    assert_eq!(total, 0, "reused buffers");

    fused_loss();
}

/// The loss of the head costs a chunk of logits, whatever the number of its rows, and in reused buffers not even that.
fn fused_loss() {
    const V: usize = 20_000;
    const D: usize = 16;
    const CHUNK: usize = 32;
    let tokens = TokenSet::new((0..20).map(|slot: u32| slot * 999), V).unwrap();
    let table = NdTable::new(Array2::<f32>::ones((V, D))).unwrap();
    let layer: TrainableTokens<_> = TrainableTokens::new(table, tokens).unwrap();
    let options = CrossEntropyOptions {
        chunk: LogitsChunk::rows(CHUNK).unwrap(),
        ..CrossEntropyOptions::default()
    };
    for n in [256, 2048] {
        let hidden = Array2::<f32>::ones((n, D));
        let labels: Vec<i64> = (0..i64::try_from(n).unwrap()).collect();
        let ((), cost) = allocated(|| {
            layer.cross_entropy(hidden.view(), &labels, options).unwrap();
        })
        .unwrap();
        assert!(
            cost.largest <= CHUNK * V * 4,
            "{n} rows: one allocation of {}",
            cost.largest
        );
        // Beside the logits there are gradients of hidden states, 128 KiB for the many, and a block of the table.
        assert!(
            cost.growth <= CHUNK * V * 4 + (2 << 20),
            "{n} rows: {} at once",
            cost.growth
        );

        let plan = CrossEntropyPlan::new(&labels, V, options).unwrap();
        let (mut out, mut rows) = (hidden.clone(), layer.zero_gradient());
        let mut buffers = LossBuffers::default();
        let mut step = || {
            layer
                .cross_entropy_into(&plan, hidden.view(), 1.0, out.view_mut(), &mut rows, &mut buffers)
                .unwrap();
        };
        step();
        let ((), cost) = allocated(step).unwrap();
        // What ndarray's matrix product packs its operands into.
        assert!(
            cost.growth <= 1 << 20,
            "{n} rows in reused buffers: {} at once",
            cost.growth
        );
    }
}

/// The same step over a memory-mapped file: opening it and training on it copy no table either.
fn mapped(ids: &[u32], upstream: &Array2<f32>) {
    const V: usize = 200_000;
    const D: usize = 64;
    let dir = tempfile::tempdir().unwrap();
    let bytes = vec![0u8; V * D * 2];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, vec![V, D], &bytes).unwrap();
    safetensors::serialize_to_file(
        [("emb.weight", view)],
        None,
        &dir.path().join("model.safetensors"),
    )
    .unwrap();
    let mut optimizer = Adam::new(AdamConfig::ADAMW).unwrap();
    let (largest, _) = measure(|| {
        let table = Checkpoint::open(dir.path()).unwrap().table("emb.weight").unwrap();
        let tokens = TokenSet::new([199_999, 7], V).unwrap();
        let mut layer: TrainableTokens<_> = TrainableTokens::new(table, tokens).unwrap();
        let plan = layer.plan(ids).unwrap();
        layer.lookup_planned(&plan).unwrap();
        let gradient = layer.backward(&plan, upstream.view()).unwrap();
        layer.step(&gradient, &mut optimizer, &mut []).unwrap();
    });
    // The largest is the table of V slots, 4 bytes each.
    assert!(
        largest <= V * 4,
        "a step over a mapped table allocated {largest} bytes at once"
    );
}
