//! The embedding in dfdx's habit: as a module, on tapes of every kind, merged and not.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use common::{bits, noise};
use dfdx::nn::modules::Embedding;
use dfdx::nn::{BuildModule, Module, ZeroGrads};
use dfdx::optim::{self, Optimizer};
use dfdx::prelude::builders;
use dfdx::shapes::{HasShape, Rank2};
use dfdx::tensor::{
    AsArray, Cpu, Gradients, NoneTape, OwnedTape, PutTape, SplitTape, Tensor, TensorFrom, TensorFromVec,
    Trace,
};
use dfdx::tensor_ops::{Backward, Device, MeanTo, PermuteTo, SumTo, TryMul};
use half::{bf16, f16};
use trainable_tokens_core::{
    AdamConfig, BackendError, DType, DeltaStore, EmbeddingSource, ErrorKind, HostTable, LayerOptions, RowRef,
    Sgd, SgdConfig, TokenId, TokenRows,
};
use trainable_tokens_dfdx::{DfdxDevice, DfdxElement, DfdxTable, TrainableTokens};

const TOKENS: [u32; 2] = [7, 2];

fn layer<E: DfdxElement>() -> TrainableTokens<E>
where
    Cpu: DfdxDevice<E>,
{
    TrainableTokens::from_tensor(noise::<E>(10, 4, 1), &TOKENS).unwrap()
}

fn sgd(lr: f64) -> Sgd {
    Sgd::new(SgdConfig {
        lr,
        ..SgdConfig::default()
    })
    .unwrap()
}

#[test]
fn a_wrapped_embedding_answers_as_before() {
    let dev = Cpu::default();
    let plain: Embedding<10, 4, f32, Cpu> = BuildModule::build(&dev);
    let embed = TrainableTokens::wrap(plain.clone(), &TOKENS).unwrap();

    let ids = dev.tensor([7, 1, 2, 7, 9]);
    let got = embed.forward(ids.clone());
    assert_eq!((got.shape().0, got.shape().1), (dfdx::shapes::Const::<5>, 4));
    assert_eq!(bits(&got), bits(&plain.forward(ids)));

    let ids = dev.tensor([[7, 1, 2], [2, 0, 9]]);
    assert_eq!(bits(&embed.forward(ids.clone())), bits(&plain.forward(ids)));

    let ids: Tensor<(usize, usize), usize, Cpu> = dev.tensor_from_vec(vec![7, 1, 2, 7, 9, 9], (3, 2));
    let got = embed.forward(ids.leaky_trace());
    assert_eq!(got.shape(), &(3, 2, 4));
    assert_eq!(bits(&got), bits(&plain.forward(ids)));

    let empty: Tensor<(usize,), usize, Cpu> = dev.tensor_from_vec(vec![], (0,));
    assert_eq!(embed.forward(empty).shape(), &(0, 4));
    assert_eq!(
        bits(&embed.into_embedding::<10, 4>().unwrap().weight),
        bits(&plain.weight)
    );
}

#[test]
fn only_the_chosen_rows_train() {
    fn train<E: DfdxElement>()
    where
        Cpu: DfdxDevice<E> + Device<E>,
    {
        let mut embed = layer::<E>();
        let (before, start) = (bits(embed.table().tensor()), embed.rows().unwrap());
        let out = embed.lookup(&[7, 1, 7], OwnedTape::default()).unwrap();
        let gradients: Gradients<E, Cpu> = out.try_sum::<(), _>().unwrap().try_backward().unwrap();
        let gradient = embed.gradient(&gradients).unwrap();
        assert_eq!(gradient.to_f64_vec(), [2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
        embed.step(&gradients, &mut sgd(0.25), &mut []).unwrap();
        assert_eq!(bits(embed.table().tensor()), before);
        let rows = embed.rows().unwrap();
        assert_eq!(rows.dtype(), E::DTYPE.default_row_dtype());
        let rows = rows.to_f64_vec().into_iter().zip(start.to_f64_vec());
        for (at, (row, start)) in rows.enumerate() {
            let want = if at < 4 { start - 0.5 } else { start };
            assert!((row - want).abs() < 1e-6, "{at}: {row} {want}");
        }
    }
    train::<f32>();
    train::<f64>();
    train::<f16>();
}

#[test]
fn rows_of_f32_keep_what_a_table_of_f16_cannot_hold() {
    let mut embed = layer::<f16>();
    let tiny = TokenRows::new(vec![1.0f32 + 1e-5; 8], 2, 4).unwrap();
    embed.set_rows(&tiny).unwrap();
    assert!(embed.rows().unwrap().bits_eq(&tiny));
    let leaf = embed.delta().unwrap().tensor().as_vec();
    assert!(leaf.iter().all(|x| *x == f16::ONE));
    let out = embed.lookup(&[7], NoneTape).unwrap();
    assert_eq!(out.as_vec(), [f16::ONE; 4]);
    assert_eq!(embed.delta().unwrap().dtype(), DType::F32);
    let error = embed.change_rows::<2, 4, _>(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);

    // Rows of the table's own type have nothing to hide from dfdx.
    let rows = TokenRows::new(vec![f16::ONE; 8], 2, 4).unwrap();
    let mut embed = TrainableTokens::with_rows(noise::<f16>(10, 4, 1), &TOKENS, &rows).unwrap();
    embed.change_rows::<2, 4, _>(Tensor::fill_with_zeros).unwrap();
    assert_eq!(embed.rows().unwrap().to_f64_vec(), [0.0; 8]);
}

#[test]
fn gradients_of_a_table_of_f16_are_summed_in_f32() {
    // Neither 4097 nor 4096 + 2^-10 is a number of f16.
    let embed = layer::<f16>();
    let dev = Cpu::default();
    let mut total = dev.tensor(f16::ZERO).put_tape(OwnedTape::default());
    for upstream in [4096.0, 1.0, 1.0 / 1024.0] {
        let out = embed.lookup(&[7], OwnedTape::default()).unwrap();
        let upstream = dev.tensor_from_vec(vec![f16::from_f64(upstream); 4], (1, 4));
        total = total + out.try_mul(upstream).unwrap().sum::<(), _>();
    }
    let gradients = total.backward();
    let gradient = embed.gradient(&gradients).unwrap();
    assert_eq!(gradient.dtype(), DType::F32);
    assert_eq!(gradient.to_f64_vec()[..4], [4097.0 + 1.0 / 1024.0; 4]);
    assert_eq!(gradient.to_f64_vec()[4..], [0.0; 4]);
    // dfdx's own see what f16 can hold.
    let rounded = gradients.get(embed.delta().unwrap().tensor()).as_vec();
    assert_eq!(rounded[..4], [f16::from_f64(4096.0); 4]);

    // The sums outlive the pass where the rows' gradient does, and are zeroed with it.
    let mut gradients = embed.alloc_grads().unwrap();
    for want in [3.0, 6.0] {
        let out = embed.lookup(&[7, 7, 7, 2], OwnedTape::default()).unwrap();
        let tape = dev.tensor([f16::ZERO; 4]).traced(gradients).split_tape().1;
        let loss = dev.tensor(f16::ZERO).put_tape(tape) + out.sum::<(), _>();
        gradients = loss.backward();
        assert_eq!(embed.gradient(&gradients).unwrap().to_f64_vec()[0], want);
    }
    embed.zero_grads(&mut gradients).unwrap();
    assert_eq!(
        embed.gradient(&gradients).unwrap_err().kind(),
        ErrorKind::NoGradient
    );
}

#[test]
fn dfdxs_own_optimizers_train_the_rows() {
    let mut embed = layer::<f32>();
    let (before, start) = (bits(embed.table().tensor()), embed.rows().unwrap());
    let mut adam = optim::Adam::new(
        &embed.delta().unwrap().to_const::<2, 4>().unwrap(),
        optim::AdamConfig {
            lr: 0.05,
            ..Default::default()
        },
    );
    let mut losses = Vec::new();
    for _ in 0..30 {
        let tape = OwnedTape::default();
        let out = embed.lookup(&[7, 1, 2, 7], tape).unwrap();
        let loss = (out - 0.5).square().mean::<(), _>();
        losses.push(loss.array());
        let gradients = loss.backward();
        embed
            .change_rows(|rows| adam.update(rows, &gradients))
            .unwrap()
            .unwrap();
    }
    assert!(losses[29] < losses[0] * 0.5, "{losses:?}");
    assert_eq!(bits(embed.table().tensor()), before);
    assert!(!embed.rows().unwrap().bits_eq(&start));

    // The moments live on under the rows' identity: a step with a zero gradient still moves them.
    let gradients = embed.alloc_grads().unwrap();
    let rows = embed.rows().unwrap();
    embed
        .change_rows(|rows| adam.update(rows, &gradients))
        .unwrap()
        .unwrap();
    assert!(!embed.rows().unwrap().bits_eq(&rows));

    let shape = embed.change_rows::<3, 4, _>(|_| ()).unwrap_err();
    assert_eq!(shape.kind(), ErrorKind::Shape);
    embed.merge().unwrap();
    assert_eq!(
        embed.change_rows::<2, 4, _>(|_| ()).unwrap_err().kind(),
        ErrorKind::State
    );
}

#[test]
fn adam_of_dfdx_and_of_core_agree() {
    let (mut ours, mut theirs) = (layer::<f32>(), layer::<f32>());
    let mut core = trainable_tokens_core::Adam::new(AdamConfig {
        lr: 0.01,
        ..AdamConfig::ADAM
    })
    .unwrap();
    let mut dfdx = optim::Adam::new(
        &theirs.delta().unwrap().to_const::<2, 4>().unwrap(),
        optim::AdamConfig {
            lr: 0.01,
            ..Default::default()
        },
    );
    for _ in 0..20 {
        let gradients = |embed: &TrainableTokens<f32>| {
            let out = embed.lookup(&[7, 2, 7], OwnedTape::default()).unwrap();
            out.square().sum::<(), _>().backward()
        };
        ours.step(&gradients(&ours), &mut core, &mut []).unwrap();
        let gradients = gradients(&theirs);
        theirs
            .change_rows::<2, 4, _>(|rows| dfdx.update(rows, &gradients))
            .unwrap()
            .unwrap();
    }
    let pairs = ours
        .rows()
        .unwrap()
        .to_f64_vec()
        .into_iter()
        .zip(theirs.rows().unwrap().to_f64_vec());
    for (ours, theirs) in pairs {
        assert!((ours - theirs).abs() < 1e-5, "{ours} {theirs}");
    }
}

#[test]
fn gradients_tell_unreached_rows_from_rows_without_an_occurrence() {
    let embed = layer::<f32>();
    let absent = embed.lookup(&[1, 3], OwnedTape::default()).unwrap();
    let gradient = embed.gradient(&absent.sum::<(), _>().backward()).unwrap();
    assert_eq!(gradient.to_f64_vec(), [0.0; 8]);

    // A loss that the rows had no part in, and gradients that no backward pass filled.
    let other: Tensor<Rank2<2, 3>, f32, Cpu> = Cpu::default().tensor([[1.0; 3]; 2]);
    let error = embed
        .gradient(&other.leaky_trace().sum::<(), _>().backward())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoGradient);
    let fresh = embed.alloc_grads().unwrap();
    assert_eq!(embed.gradient(&fresh).unwrap_err().kind(), ErrorKind::NoGradient);

    // The rows of another layer over the same table.
    let twin = layer::<f32>();
    let out = twin.lookup(&[7], OwnedTape::default()).unwrap();
    let gradients = out.sum::<(), _>().backward();
    assert!(twin.gradient(&gradients).is_ok());
    assert_eq!(
        embed.gradient(&gradients).unwrap_err().kind(),
        ErrorKind::NoGradient
    );
}

#[test]
fn a_tape_with_leaves_keeps_the_gradients_of_the_rows() {
    let embed = layer::<f32>();
    let model: Tensor<Rank2<3, 4>, f32, Cpu> = Cpu::default().tensor([[0.5; 4]; 3]);
    let loss = |gradients: Gradients<f32, Cpu>| {
        let out = embed.lookup(&[7, 1, 7], OwnedTape::default()).unwrap();
        let model = model.clone().traced(gradients);
        let model: Tensor<(usize, usize), f32, Cpu, _> = dfdx::tensor_ops::RealizeTo::realize(model);
        model.try_mul(out).unwrap().sum::<(), _>()
    };
    // The gradients of a module drop those of all others …
    let gradients = loss(model.alloc_grads()).backward();
    assert_eq!(
        embed.gradient(&gradients).unwrap_err().kind(),
        ErrorKind::NoGradient
    );
    // … unless told to keep the rows' as well.
    let mut gradients = model.alloc_grads();
    embed.zero_grads(&mut gradients).unwrap();
    let mut gradients = loss(gradients).backward();
    let want = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(embed.gradient(&gradients).unwrap().to_f64_vec(), want);

    // Used again they add up, and zeroed they start again.
    let twice = loss(gradients.clone()).backward();
    assert_eq!(
        embed.gradient(&twice).unwrap().to_f64_vec(),
        want.map(|x| 2.0 * x)
    );
    embed.zero_grads(&mut gradients).unwrap();
    assert_eq!(
        embed.gradient(&gradients).unwrap_err().kind(),
        ErrorKind::NoGradient
    );
    assert_eq!(
        embed.gradient(&loss(gradients).backward()).unwrap().to_f64_vec(),
        want
    );
}

#[test]
fn merging_is_in_place_and_exact() {
    let mut embed = layer::<f32>();
    let before = bits(embed.table().tensor());
    let address = std::ptr::from_ref(&embed.table().tensor()[[0, 0]]);
    let rows = TokenRows::new((0..8u8).map(f32::from).collect(), 2, 4).unwrap();
    embed.set_rows(&rows).unwrap();
    let live = bits(&embed.lookup(&[2, 1, 7], NoneTape).unwrap());

    embed.merge().unwrap();
    assert!(embed.is_merged());
    assert_eq!(std::ptr::from_ref(&embed.table().tensor()[[0, 0]]), address);
    assert_eq!(bits(&embed.lookup(&[2, 1, 7], NoneTape).unwrap()), live);
    let gradients = embed
        .lookup(&[2], OwnedTape::default())
        .unwrap()
        .sum::<(), _>()
        .backward();
    assert_eq!(
        embed.gradient(&gradients).unwrap_err().kind(),
        ErrorKind::NoGradient
    );
    assert_eq!(embed.merge().unwrap_err().kind(), ErrorKind::State);

    embed.unmerge().unwrap();
    assert_eq!(bits(embed.table().tensor()), before);
    assert_eq!(std::ptr::from_ref(&embed.table().tensor()[[0, 0]]), address);
    assert_eq!(embed.unmerge().unwrap_err().kind(), ErrorKind::State);
}

#[test]
fn a_clone_of_the_table_keeps_the_old_rows() {
    let table = noise::<f32>(10, 4, 1);
    let mut embed = TrainableTokens::from_tensor(table.clone(), &TOKENS).unwrap();
    let before = bits(&table);
    embed.set_rows(&TokenRows::zeros(DType::F32, 2, 4)).unwrap();
    embed.merge().unwrap();
    assert_eq!(bits(&table), before);
    assert_ne!(bits(embed.table().tensor()), before);
}

#[test]
fn a_strided_table_is_made_contiguous() {
    let transposed = noise::<f32>(4, 10, 1);
    let table = transposed.clone().permute::<(usize, usize), _>();
    let mut embed = TrainableTokens::from_tensor(table.clone(), &TOKENS).unwrap();
    assert_eq!(bits(embed.table().tensor()), bits(&table));
    embed.set_rows(&TokenRows::zeros(DType::F32, 2, 4)).unwrap();
    embed.merge().unwrap();
    assert_eq!(embed.table().tensor().as_vec()[28..32], [0.0; 4]);
    assert_eq!(
        embed
            .table()
            .tensor()
            .as_vec()
            .iter()
            .filter(|x| **x == 0.0)
            .count(),
        8
    );
}

#[test]
fn options_apply() {
    use trainable_tokens_core::{EmbedScale, MaxNorm, Padding, PaddingRule};
    let token = TokenId(2);
    let rule = PaddingRule::NoLookupGradient;
    let embed = layer::<f64>().with_options(LayerOptions {
        padding: Some(Padding { token, rule }),
        scale: Some(EmbedScale::Exact(3.0)),
        scale_grad_by_freq: true,
        max_norm: Some(MaxNorm::new(0.1).unwrap()),
    });
    let out = embed.lookup(&[7, 2, 7, 1], OwnedTape::default()).unwrap();
    for row in out.as_vec().chunks(4) {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!((norm - 0.3).abs() < 1e-5, "{norm}");
    }
    let gradient = embed.gradient(&out.sum::<(), _>().backward()).unwrap();
    assert_eq!(gradient.to_f64_vec(), [3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn a_table_of_any_type_can_be_loaded() {
    #[derive(Debug)]
    struct Halves(Vec<bf16>);
    impl EmbeddingSource for Halves {
        type Error = trainable_tokens_core::Error;
        fn vocab_size(&self) -> usize {
            self.0.len() / 4
        }
        fn embedding_dim(&self) -> usize {
            4
        }
        fn dtype(&self) -> DType {
            DType::BF16
        }
        fn read_rows(&self, ids: &[TokenId]) -> trainable_tokens_core::Result<TokenRows> {
            self.collect_rows(ids)
        }
    }
    impl HostTable for Halves {
        fn row(&self, id: TokenId) -> Option<RowRef<'_>> {
            self.0.get(id.row() * 4..id.row() * 4 + 4).map(RowRef::BF16)
        }
    }
    let table = Halves((0..40u8).map(|i| bf16::from_f32(f32::from(i) * 0.37)).collect());
    let embed = TrainableTokens::<f32>::load(&table, &TOKENS, &Cpu::default()).unwrap();
    let want: Vec<f32> = table.0.iter().map(|x| x.to_f32()).collect();
    assert_eq!(embed.table().tensor().as_vec(), want);
    assert_eq!(
        embed.rows().unwrap().to_f32_vec(),
        [&want[28..32], &want[8..12]].concat()
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let table = || noise::<f32>(10, 4, 1);
    let kind = |ids: &[u32]| TrainableTokens::from_tensor(table(), ids).unwrap_err().kind();
    assert_eq!(kind(&[7, 10]), ErrorKind::TokenOutOfRange);
    assert_eq!(kind(&[7, 7]), ErrorKind::DuplicateToken);
    let rows = TokenRows::zeros(DType::F32, 2, 3);
    let error = TrainableTokens::with_rows(table(), &TOKENS, &rows).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);

    let embed = layer::<f32>();
    let dev = Cpu::default();
    for id in [10, usize::MAX] {
        let error = embed.try_forward(dev.tensor([1, id])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TokenOutOfRange, "{error}");
    }
    assert!(embed.into_embedding::<9, 4>().is_err());
}

#[test]
fn no_trainable_token_is_a_frozen_embedding() {
    let mut embed = TrainableTokens::from_tensor(noise::<f32>(10, 4, 1), &[]).unwrap();
    let out = embed.lookup(&[7, 1], OwnedTape::default()).unwrap();
    let gradients = out.sum::<(), _>().backward();
    assert_eq!(embed.gradient(&gradients).unwrap().shape(), [0, 4]);
    embed.step(&gradients, &mut sgd(0.1), &mut []).unwrap();
    embed.merge().unwrap();
    embed.unmerge().unwrap();
}

#[test]
fn a_layer_crosses_threads() {
    fn both<T: Send + Sync>(_: &T) {}
    let embed = layer::<f32>();
    both(&embed);
    both(&embed.tied_head());
    both(&DfdxTable::new(noise::<f64>(2, 2, 1)).unwrap());
}

#[test]
fn builders_of_dfdx_make_what_is_wrapped() {
    use dfdx::nn::DeviceBuildExt;
    let embed = Cpu::default().build_module::<builders::Embedding<10, 4>, f32>();
    assert!(TrainableTokens::wrap(embed, &TOKENS).is_ok());
}
