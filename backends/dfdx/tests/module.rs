//! The embedding as a collection of tensors of const sizes.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/common.rs"]
mod common;

use common::bits;
use dfdx::nn::modules::Embedding;
use dfdx::nn::{BuildModule, Module, NumParams, ToDtype, ZeroGrads};
use dfdx::optim::{Adam, AdamConfig, Optimizer, Sgd, SgdConfig};
use dfdx::shapes::{Const, HasShape};
use dfdx::tensor::{AsArray, Cpu, NoneTape, OwnedTape, TensorFrom, Trace};
use dfdx::tensor_ops::{Backward, MeanTo, SumTo};
use trainable_tokens_core::{BackendError, ErrorKind, LayerOptions, Padding, PaddingRule, TokenId};
use trainable_tokens_dfdx::{TrainableEmbedding, TrainableTokens};

const TOKENS: [u32; 2] = [7, 2];

type Module4 = TrainableEmbedding<10, 2, 4, f32>;

fn embedding() -> Embedding<10, 4, f32, Cpu> {
    BuildModule::build(&Cpu::seed_from_u64(3))
}

fn module() -> Module4 {
    TrainableEmbedding::wrap(embedding(), &TOKENS).unwrap()
}

#[test]
fn it_answers_as_dfdxs_embedding_and_as_the_layer() {
    let (plain, module) = (embedding(), module());
    let layer = TrainableTokens::wrap(embedding(), &TOKENS).unwrap();
    let dev = Cpu::default();
    let ids = dev.tensor([7, 1, 2, 9]);
    let got = module.forward(ids.clone());
    assert_eq!(got.shape(), &(Const::<4>, Const::<4>));
    assert_eq!(bits(&got), bits(&plain.forward(ids)));
    let ids = dev.tensor([[7, 1], [2, 9]]);
    assert_eq!(bits(&module.forward(ids.clone())), bits(&plain.forward(ids)));

    let hidden = common::noise::<f32>(3, 4, 5);
    let hidden = dfdx::tensor_ops::RealizeTo::realize::<(usize, Const<4>)>(hidden);
    let want = layer.tied_head().logits(hidden.clone()).unwrap();
    assert_eq!(bits(&module.logits(hidden).unwrap()), bits(&want));
}

#[test]
fn dfdxs_adam_trains_the_rows_and_nothing_else() {
    let mut module = module();
    let before = bits(&module.weight);
    assert_eq!(module.num_trainable_params(), 2 * 4);
    let mut adam = Adam::new(
        &module,
        AdamConfig {
            lr: 0.05,
            ..Default::default()
        },
    );
    let ids = Cpu::default().tensor([7, 1, 2, 7, 0]);
    let mut gradients = module.alloc_grads();
    let mut losses = Vec::new();
    for _ in 0..30 {
        let out = module.forward(ids.clone().traced(gradients));
        let loss = (out - 0.5).square().mean::<(), _>();
        losses.push(loss.array());
        gradients = loss.backward();
        adam.update(&mut module, &gradients).unwrap();
        module.zero_grads(&mut gradients);
    }
    assert!(losses[29] < losses[0], "{losses:?}");
    assert_eq!(bits(&module.weight), before);
    assert_ne!(
        module.rows().unwrap().to_f64_vec(),
        TrainableTokens::wrap(embedding(), &TOKENS)
            .unwrap()
            .rows()
            .unwrap()
            .to_f64_vec()
    );

    let (rows, got) = (
        module.rows().unwrap().to_f32_vec(),
        module.merge().unwrap().weight.as_vec(),
    );
    assert_eq!([&got[28..32], &got[8..12]].concat(), rows);
    let frozen = |values: &[f32]| [&values[..8], &values[12..28], &values[32..]].concat();
    assert_eq!(frozen(&got), frozen(&embedding().weight.as_vec()));
}

#[test]
fn a_batch_without_a_trainable_token_is_no_unused_tensor() {
    let mut module = module();
    let start = module.rows().unwrap();
    let mut sgd = Sgd::new(&module, SgdConfig::default());
    for head in [false, true] {
        let hidden = module.lookup(&[1, 3], OwnedTape::default()).unwrap();
        let loss = if head {
            let hidden = dfdx::tensor_ops::RealizeTo::realize::<(usize, Const<4>)>(hidden);
            (module.logits(hidden).unwrap() * 0.0).sum::<(), _>()
        } else {
            hidden.sum::<(), _>()
        };
        sgd.update(&mut module, &loss.backward()).unwrap();
    }
    assert!(module.rows().unwrap().bits_eq(&start));
}

#[test]
fn options_apply() {
    let token = TokenId(2);
    let rule = PaddingRule::NoLookupGradient;
    let module = module().with_options(LayerOptions {
        padding: Some(Padding { token, rule }),
        ..LayerOptions::default()
    });
    let out = module.lookup(&[7, 2], OwnedTape::default()).unwrap();
    let gradients = out.sum::<(), _>().backward();
    assert_eq!(
        gradients.get(&module.trainable_tokens_delta).array(),
        [[1.0; 4], [0.0; 4]]
    );
}

#[test]
fn what_dfdx_makes_of_it_asks_for_its_tokens() {
    let module = module();
    let ids = [7u32, 1];
    let mut wide = module.to_dtype::<f64>();
    let error = wide.lookup(&ids, NoneTape).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    wide.set_tokens(&TOKENS).unwrap();
    let got: Vec<f64> = wide.lookup(&ids, NoneTape).unwrap().as_vec();
    let want = module.lookup(&ids, NoneTape).unwrap().as_vec();
    assert_eq!(got, want.into_iter().map(f64::from).collect::<Vec<_>>());

    let kind = |ids: &[u32]| Module4::wrap(embedding(), ids).unwrap_err().kind();
    assert_eq!(kind(&[7]), ErrorKind::Shape);
    assert_eq!(kind(&[7, 10]), ErrorKind::TokenOutOfRange);
    assert_eq!(kind(&[7, 7]), ErrorKind::DuplicateToken);
    let error = module.try_forward(Cpu::default().tensor([10])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TokenOutOfRange);
}
