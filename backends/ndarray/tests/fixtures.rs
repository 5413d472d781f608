//! Every case that PEFT made, and what only this backend does with them.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "support/harness.rs"]
mod harness;

use half::{bf16, f16};
use harness::{Nd, array};
use ndarray::Array2;
use trainable_tokens_core::{Element, EmbeddingSource, TokenId, TokenRows, TokenSet};
use trainable_tokens_ndarray::TrainableTokensExt;
use trainable_tokens_testkit::peft::{Fixture, fixtures};
use trainable_tokens_testkit::{Harness, Layer, peft_tests};

peft_tests! { f32: Nd<f32>, f16: Nd<f16>, bf16: Nd<bf16> }

/// The same cases over wider tables, as backends of frameworks without half types run them.
mod wider {
    use trainable_tokens_testkit::peft_tests;

    use super::Nd;

    peft_tests! { f32: Nd<f64>, f16: Nd<f32>, bf16: Nd<f32> }
}

fn layer<T: Element>(case: &Fixture, rows: &TokenRows) -> Layer<Nd<T>> {
    Layer::<Nd<T>>::with_rows(
        Nd::<T>::source(case.table()).unwrap(),
        case.tokens().clone(),
        rows,
    )
    .unwrap()
}

/// Lookups into a buffer give PEFT's bits, and a gradient of its own equals one added to zeros.
fn buffers_agree<T: Element>(name: &str) {
    let case = Fixture::open(&fixtures().join(name)).unwrap();
    let (ids, upstream) = (case.ids("input_ids").unwrap(), case.rows("upstream").unwrap());
    let (initial, trained) = (case.initial_rows().unwrap(), case.adapter_rows().unwrap());
    for (rows, merged, expected) in [
        (&initial, false, "embed.noop"),
        (&trained, false, "embed.trained"),
        (&trained, true, "embed.merged"),
    ] {
        let mut layer = layer::<T>(&case, rows);
        let plan = layer.plan(&ids).unwrap();
        if merged {
            layer.merge().unwrap();
        } else {
            let alone = layer.backward(&plan, array::<T>(&upstream).view()).unwrap();
            let mut added = layer.zero_gradient();
            layer
                .backward_into(&plan, array::<T>(&upstream).view(), &mut added)
                .unwrap();
            let [alone, added] = [alone, added].map(|gradients| layer.gradient(&gradients).unwrap());
            assert!(alone.bits_eq(&added), "{name}: gradients of {expected}");
        }
        let mut out = Array2::from_elem((ids.len(), layer.source().embedding_dim()), T::default());
        layer.lookup_into(&plan, out.view_mut()).unwrap();
        let out = Nd::<T>::read(&out).unwrap();
        assert!(out.bits_eq(&case.rows(expected).unwrap()), "{name}: {expected}");
    }
}

#[test]
fn buffers_of_the_caller_get_the_same_bits() {
    buffers_agree::<f32>("standalone_f32");
    buffers_agree::<f16>("standalone_f16");
    buffers_agree::<bf16>("standalone_bf16");
    buffers_agree::<bf16>("standalone_bf16_noautocast");
}

#[test]
fn a_wrong_id_is_named() {
    let table = Nd::<f32>::source(&TokenRows::zeros(f32::DTYPE, 37, 8)).unwrap();
    let layer = Layer::<Nd<f32>>::new(table, TokenSet::new([29, 3], 37).unwrap()).unwrap();
    let error = layer.lookup(&[1, 37]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "token id 37 is outside the vocabulary of 37 rows"
    );
    assert!(layer.source().read_rows(&[TokenId(37)]).is_err());
}
