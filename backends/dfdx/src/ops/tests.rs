//! The path of all devices against the CPU's own.

use dfdx::tensor::{AsArray, Cache, Cpu, NoneTape, OwnedTape, PutTape, SplitTape, ZerosTensor};
use dfdx::tensor_ops::{Backward, Device, SumTo, TryMul};
use half::f16;
use trainable_tokens_core::{
    Element, LayerOptions, LookupPlan, MaxNorm, Overlap, Padding, PaddingRule, RowTransform, TokenId,
    TokenRows, TokenSet,
};

use super::*;
use crate::TrainableTokens;
use crate::convert::{matrix, to_rows};

const VOCAB: usize = 11;
const DIM: usize = 3;

fn noise<E: DfdxElement>(rows: usize, dim: usize, seed: u32) -> Matrix<E, Cpu> {
    let len = u32::try_from(rows * dim).unwrap();
    let value = |i| <E as Element>::from_f64((f64::from(i) * 0.37 + f64::from(seed)).sin() * 3.0);
    matrix(&Cpu::default(), (0..len).map(value).collect(), rows, dim).unwrap()
}

fn options(padding: bool, scale_grad_by_freq: bool) -> LayerOptions {
    let token = TokenId(4);
    let rule = PaddingRule::NoLookupGradient;
    LayerOptions {
        padding: padding.then_some(Padding { token, rule }),
        scale_grad_by_freq,
        ..LayerOptions::default()
    }
}

/// The output of a lookup, on one path or the other, and the gradients of its rows and of its flag.
fn both_passes<E: DfdxElement>(plan: &LookupPlan, transform: RowTransform, composed: bool) -> [TokenRows; 3]
where
    Cpu: Kernels<E> + Device<E> + Device<E::Compute>,
{
    let (base, rows) = (noise::<E>(VOCAB, DIM, 1), noise::<E>(3, DIM, 2));
    let reached: Flag<E, Cpu> = base.device().zeros();
    let leaf = NewRows::Leaf(Leaf {
        rows: rows.clone(),
        reached: Some(reached.clone()),
        sums: None,
    });
    let lookup = Lookup {
        base: &base,
        rows: Some(&leaf),
        plan,
        transform,
    };
    let tape = OwnedTape::<E, Cpu>::default();
    let out = if composed {
        composed::lookup(&lookup, tape).unwrap()
    } else {
        lookup.forward(tape).unwrap()
    };
    let values = to_rows(&out).unwrap();
    let mut gradients = if plan.is_empty() {
        // dfdx cannot sum a tensor without elements; the operation still has to run.
        let one: Tensor<(), E, Cpu> = base.device().zeros();
        let (_, tape) = out.split_tape();
        one.put_tape(tape).try_backward().unwrap()
    } else {
        let upstream = noise::<E>(plan.len(), DIM, 5);
        let loss = out.try_mul(upstream).unwrap().try_sum::<(), _>().unwrap();
        loss.try_backward().unwrap()
    };
    gradients.get_or_alloc_mut(&reached).unwrap();
    let flag = gradients.get(&reached).array()[0];
    let flag = TokenRows::new(vec![flag], 1, 1).unwrap();
    [values, to_rows(&gradients.get(&rows)).unwrap(), flag]
}

fn lookups_agree<E: DfdxElement>()
where
    Cpu: Kernels<E> + Device<E> + Device<E::Compute>,
{
    let tokens = TokenSet::new([9, 0, 4], VOCAB).unwrap();
    for ids in [&[4u32, 1, 9, 9, 0, 10, 4][..], &[1, 2, 3], &[4], &[9, 0, 9], &[]] {
        for (padding, by_freq) in [(false, false), (true, false), (false, true), (true, true)] {
            for scale in [None, Some(-1.7)] {
                let what = format!("{} {ids:?} {padding} {by_freq} {scale:?}", E::DTYPE);
                let plan = LookupPlan::new(&tokens, options(padding, by_freq), ids).unwrap();
                let transform = RowTransform {
                    max_norm: None,
                    scale,
                };
                let [out, gradient, flag] = both_passes::<E>(&plan, transform, false);
                let [composed_out, composed_gradient, composed_flag] =
                    both_passes::<E>(&plan, transform, true);
                assert!(out.bits_eq(&composed_out), "{what}");
                assert!(gradient.bits_eq(&composed_gradient), "{what}");
                assert_eq!(gradient.shape(), [3, DIM], "{what}");
                assert_eq!(
                    (flag.to_f64_vec(), composed_flag.to_f64_vec()),
                    (vec![1.0], vec![1.0]),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn both_lookups_give_the_same_bits() {
    lookups_agree::<f32>();
    lookups_agree::<f64>();
    lookups_agree::<f16>();
}

#[test]
fn both_lookups_shorten_the_same_rows() {
    fn agree<E: DfdxElement>(tolerance: f64)
    where
        Cpu: Kernels<E> + Device<E> + Device<E::Compute>,
    {
        let tokens = TokenSet::new([9, 0, 4], VOCAB).unwrap();
        let plan = LookupPlan::new(&tokens, LayerOptions::default(), &[4, 1, 9, 2, 3]).unwrap();
        let transform = RowTransform {
            max_norm: Some(MaxNorm::new(3.0).unwrap()),
            scale: Some(0.5),
        };
        let [out, gradient, _] = both_passes::<E>(&plan, transform, false);
        let [composed_out, composed_gradient, _] = both_passes::<E>(&plan, transform, true);
        assert!(gradient.bits_eq(&composed_gradient));
        let unlimited = RowTransform {
            max_norm: None,
            ..transform
        };
        let [long, _, _] = both_passes::<E>(&plan, unlimited, false);
        assert!(!long.bits_eq(&out));
        for (got, want) in composed_out.to_f64_vec().into_iter().zip(out.to_f64_vec()) {
            assert!(
                (got - want).abs() <= tolerance * want.abs(),
                "{}: {got} {want}",
                E::DTYPE
            );
        }
    }
    agree::<f32>(1e-6);
    agree::<f64>(1e-15);
    agree::<f16>(1e-3);
}

#[test]
fn both_ways_of_reading_overriding_and_adding_agree() {
    fn agree<E: DfdxElement>()
    where
        Cpu: Kernels<E> + Device<E>,
    {
        let table = noise::<E>(VOCAB, DIM, 1);
        let ids = [7, 0, 7, 10].map(TokenId);
        let want = <Cpu as Kernels<E>>::read_rows(&table, &ids).unwrap();
        assert_eq!(composed::read_rows(&table, &ids).unwrap(), want);

        let (logits, part) = (noise::<E>(5, VOCAB, 3), noise::<E>(5, 2, 4));
        let columns = [8, 0].map(TokenId);
        let want = <Cpu as Kernels<E>>::override_columns(logits.clone(), part.clone(), &columns).unwrap();
        let got = composed::override_columns(logits.clone(), part, &columns).unwrap();
        assert!(to_rows(&got).unwrap().bits_eq(&to_rows(&want).unwrap()));
        assert!(!to_rows(&logits).unwrap().bits_eq(&to_rows(&want).unwrap()));

        let leaf = noise::<E>(4, DIM, 6);
        let [got, want] = [true, false].map(|composed| {
            let mut gradients = Gradients::leaky();
            for seed in 0..2 {
                let add = noise::<E>(4, DIM, seed);
                if composed {
                    composed::add_gradient(&mut gradients, &leaf, add).unwrap();
                } else {
                    <Cpu as Kernels<E>>::add_gradient(&mut gradients, &leaf, add).unwrap();
                }
            }
            to_rows(&gradients.get(&leaf)).unwrap()
        });
        assert!(got.bits_eq(&want));
    }
    agree::<f32>();
    agree::<f64>();
    agree::<f16>();
}

#[test]
fn both_ways_of_dividing_a_gradient_agree() {
    fn agree<E: DfdxElement>()
    where
        Cpu: Kernels<E> + Device<E> + Device<E::Compute>,
    {
        let mut embed = TrainableTokens::from_tensor(noise::<E>(VOCAB, DIM, 1), &[9, 0, 4]).unwrap();
        for (name, ids) in [("b", &[4u32, 2][..]), ("none", &[]), ("c", &[4, 9, 7])] {
            let tokens = TokenSet::new(ids.iter().copied(), VOCAB).unwrap();
            embed.add_adapter(name, tokens).unwrap();
        }
        let names = ["default", "b", "none", "c"];
        let weights = vec![1.0, 0.5, 7.0, 3.0];
        for overlap in [Overlap::LastWins, Overlap::WeightedMean(weights)] {
            embed.activate_overlapping(&names, overlap).unwrap();
            let active = embed.active().unwrap().unwrap();
            let NewRows::Combined(combined) = active.new_rows() else {
                panic!("one leaf");
            };
            let gradient = E::widen(noise::<E>(dims(active.tensor())[0], DIM, 3)).unwrap();
            let want = combined.mix.split_gradient(&to_rows(&gradient).unwrap()).unwrap();
            let got = composed::split_gradient(active.new_rows(), gradient).unwrap();
            assert_eq!((got.len(), want.len()), (4, 4));
            for (got, want) in got.iter().zip(&want) {
                assert!(to_rows(got).unwrap().bits_eq(want));
            }
        }
    }
    agree::<f32>();
    agree::<f64>();
    agree::<f16>();
}

#[test]
fn a_lookup_leaves_the_gradient_of_its_output_in_place() {
    let (base, rows) = (noise::<f32>(VOCAB, DIM, 1), noise::<f32>(3, DIM, 2));
    let tokens = TokenSet::new([9, 0, 4], VOCAB).unwrap();
    let plan = LookupPlan::new(&tokens, LayerOptions::default(), &[4, 1]).unwrap();
    let lookup = Lookup {
        base: &base,
        rows: Some(&NewRows::plain(rows.clone())),
        plan: &plan,
        transform: RowTransform::default(),
    };
    let out = lookup.forward(OwnedTape::<f32, Cpu>::default()).unwrap();
    let leaf = out.retaped::<NoneTape>();
    let upstream = noise::<f32>(2, DIM, 5);
    let gradients = out
        .try_mul(upstream.clone())
        .unwrap()
        .try_sum::<(), _>()
        .unwrap()
        .try_backward()
        .unwrap();
    assert!(
        to_rows(&gradients.get(&leaf))
            .unwrap()
            .bits_eq(&to_rows(&upstream).unwrap())
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let (base, rows) = (noise::<f32>(VOCAB, DIM, 1), noise::<f32>(3, DIM, 2));
    for (tokens, vocab, ids) in [(&[9u32, 0, 4][..], 20, 15u32), (&[9, 0, 4, 5], VOCAB, 1)] {
        let tokens = TokenSet::new(tokens.iter().copied(), vocab).unwrap();
        let plan = LookupPlan::new(&tokens, LayerOptions::default(), &[ids]).unwrap();
        let lookup = Lookup {
            base: &base,
            rows: Some(&NewRows::plain(rows.clone())),
            plan: &plan,
            transform: RowTransform::default(),
        };
        assert!(lookup.forward(OwnedTape::<f32, Cpu>::default()).is_err());
    }
}

#[test]
fn a_lookup_reuses_the_buffers_in_the_devices_cache() {
    let base = noise::<f32>(VOCAB, DIM, 1);
    base.device().enable_cache();
    let tokens = TokenSet::new([9], VOCAB).unwrap();
    let plan = LookupPlan::new(&tokens, LayerOptions::default(), &[4, 1, 9]).unwrap();
    let lookup = || {
        let lookup = Lookup {
            base: &base,
            rows: None,
            plan: &plan,
            transform: RowTransform::default(),
        };
        lookup.forward(NoneTape).unwrap()
    };
    let (first, want) = (lookup(), lookup());
    let address = std::ptr::from_ref(&first[[0, 0]]);
    drop(first);
    let again = lookup();
    assert_eq!(std::ptr::from_ref(&again[[0, 0]]), address);
    assert!(to_rows(&again).unwrap().bits_eq(&to_rows(&want).unwrap()));
}
