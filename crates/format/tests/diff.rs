//! Adapters are compared token by token, whatever their slots.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::adapter_dirs;
use safetensors::Dtype;
use trainable_tokens_core::{BackendError as _, ErrorKind, TokenId, TokenRows, TokenSet};
use trainable_tokens_format::{Adapter, AdapterBuilder, AdapterDiff, TensorDifference};

const MODULE: &str = "model.embed_tokens";

fn builder(ids: &[u32], rows: Vec<f32>) -> AdapterBuilder {
    let columns = rows.len() / ids.len();
    let tokens = TokenSet::new(ids.iter().copied(), 100).unwrap();
    Adapter::builder(MODULE, &tokens, TokenRows::new(rows, ids.len(), columns).unwrap())
}

#[test]
fn rows_meet_by_their_tokens() {
    let first = builder(&[7, 3, 5], vec![3.0, 4.0, 0.0, 0.0, 1.0, 2.0])
        .build()
        .unwrap();
    let second = builder(&[5, 9, 7, 3], vec![1.0, 2.0, 8.0, 8.0, 4.0, -3.0, 0.0, -0.0])
        .build()
        .unwrap();
    let diff = AdapterDiff::between(&first, &second).unwrap();
    let [module] = &diff.modules[..] else {
        panic!("{diff:?}");
    };
    assert_eq!(module.path, MODULE);
    let ids: Vec<_> = module.rows.iter().map(|row| row.id.0).collect();
    assert_eq!(ids, [7, 3, 5]);
    let [turned, zero, same] = &module.rows[..] else {
        panic!("{module:?}");
    };
    assert_eq!((turned.norms, turned.cosine), ([5.0, 5.0], 0.0));
    assert_eq!(turned.distance, 50f64.sqrt());
    assert!(
        zero.cosine.is_nan() && zero.distance == 0.0 && !zero.is_same,
        "0 and -0"
    );
    assert!(same.is_same && same.cosine == 1.0);
    assert!(module.only_in_first.is_empty());
    assert_eq!(module.only_in_second, [TokenId(9)]);
    assert_eq!(module.changed(), 2);
    assert!(!diff.is_empty());
    let back = AdapterDiff::between(&second, &first).unwrap();
    assert_eq!(back.modules[0].only_in_first, [TokenId(9)]);
}

#[test]
fn other_tensors_and_modules_count_too() {
    let rows = vec![1.0, 2.0];
    let tensor = |value: u8| ("x", Dtype::U8, [1], vec![value]);
    let with = |value: u8| {
        let (name, dtype, shape, bytes) = tensor(value);
        builder(&[1], rows.clone()).extra_tensor(name, dtype, shape, bytes)
    };
    let plain = builder(&[1], rows.clone()).build().unwrap();
    let (first, second) = (with(1).build().unwrap(), with(2).build().unwrap());
    let difference = |a: &Adapter, b: &Adapter| {
        let diff = AdapterDiff::between(a, b).unwrap();
        assert!(!diff.is_empty());
        diff.tensors[0].difference.clone()
    };
    assert_eq!(difference(&first, &second), TensorDifference::Values);
    assert_eq!(difference(&first, &plain), TensorDifference::OnlyInFirst);
    assert_eq!(difference(&plain, &first), TensorDifference::OnlyInSecond);
    assert!(AdapterDiff::between(&first, &first).unwrap().is_empty());

    let head = TokenRows::new(vec![3f32, 4.0], 1, 2).unwrap();
    let both = builder(&[1], rows.clone())
        .module("lm_head", head)
        .build()
        .unwrap();
    for (a, b, only) in [(&both, &plain, [1, 0]), (&plain, &both, [0, 1])] {
        let diff = AdapterDiff::between(a, b).unwrap();
        let alone = diff
            .modules
            .iter()
            .find(|module| module.path == "lm_head")
            .unwrap();
        assert_eq!([alone.only_in_first.len(), alone.only_in_second.len()], only);
        assert!(!diff.is_empty());
    }
    let longer = builder(&[1], vec![1.0, 2.0, 3.0]).build().unwrap();
    let error = AdapterDiff::between(&plain, &longer).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
}

#[test]
fn every_adapter_of_peft_equals_itself() {
    let mut compared = 0;
    for dir in adapter_dirs() {
        // Some are there to be refused.
        let Ok(adapter) = Adapter::read(&dir) else {
            continue;
        };
        compared += 1;
        let diff = AdapterDiff::between(&adapter, &adapter).unwrap();
        assert!(diff.is_empty(), "{}", dir.display());
        let rows: usize = diff.modules.iter().map(|module| module.rows.len()).sum();
        let expected = adapter
            .modules()
            .iter()
            .map(|module| module.token_indices().len());
        assert_eq!(rows, expected.sum::<usize>(), "{}", dir.display());
    }
    assert!(compared > 40, "{compared}");
}
