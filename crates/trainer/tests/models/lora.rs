//! Weights of LoRA beside rows of tokens: how they start, what they change, what is refused.

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use trainable_tokens_core::PaddingRule;
use trainable_tokens_trainer::{ALL_LINEAR, Graph, LanguageModel, LoraOptions};

use crate::case::{Case, flat, hidden, with_adapter};

fn options(targets: &[&str]) -> LoraOptions {
    LoraOptions {
        rank: 3,
        alpha: 6.0,
        targets: targets.iter().map(|target| (*target).to_owned()).collect(),
        seed: 7,
        ..LoraOptions::default()
    }
}

fn logits(model: &LanguageModel) -> Vec<f32> {
    let ids = Tensor::new(&[[1u32, 149, 40, 7], [3, 40, 149, 149]], &Device::Cpu).unwrap();
    let hidden = model
        .hidden(&model.embed(&ids).unwrap().detach(), &ids, None)
        .unwrap();
    assert!(!hidden.track_op(), "a pass without a graph keeps one");
    flat(&model.logits(&hidden).unwrap())
}

#[test]
fn it_starts_as_a_no_op_and_from_its_seed() {
    for name in ["llama_untied", "llama_tied"] {
        let case = Case::open(name);
        let base = case.base(&Value::Null);
        let plain = logits(&case.model(&json!({ "state": "base" })));
        let all = options(&[ALL_LINEAR]);
        let start = all.start(&base, &[149, 40], None).unwrap();
        assert_eq!(
            start.lora_weights().unwrap().len(),
            14,
            "{name}: seven in each of two layers"
        );
        assert_eq!(start.config().field("lora_alpha"), Some(json!(6)));
        let weights = &start.lora_weights().unwrap()[0];
        assert_eq!((weights.rank(), weights.scaling()), (3, 2.0));
        let [a, b] = weights.factors().unwrap();
        let bound = 1.0 / (weights.in_features() as f64).sqrt();
        let largest = a.to_f64_vec().into_iter().fold(0f64, |most, x| most.max(x.abs()));
        assert!(largest <= bound && largest > 0.8 * bound, "{largest} {bound}");
        assert_eq!(b.norm(), 0.0);

        let model = with_adapter(&base, &start);
        let same = logits(&model)
            .iter()
            .zip(&plain)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{name}: not a no-op");
        let again = all.start(&base, &[149, 40], None).unwrap();
        let other = LoraOptions { seed: 8, ..all }
            .start(&base, &[149, 40], None)
            .unwrap();
        let first = |adapter: &trainable_tokens_format::Adapter| {
            adapter.lora_weights().unwrap()[0].factors().unwrap()[0].to_f64_vec()
        };
        assert_eq!(first(&start), first(&again));
        assert_ne!(first(&start), first(&other));
    }
}

/// Half-precision weights: the product is computed in single precision and rounded with the sum.
#[test]
fn weights_of_lora_stay_in_single_precision_over_bf16() {
    let case = Case::open("lora_list_untied");
    let base = case.base(&Value::Null);
    let adapter = case.adapter(&Value::Null);
    let padding = PaddingRule::NoLookupGradient;
    let model = LanguageModel::load_adapter(&base, &adapter, padding, DType::BF16, &Device::Cpu).unwrap();
    for low_rank in model.low_rank() {
        let stored = adapter.lora_weights().unwrap();
        let stored = stored
            .iter()
            .find(|weights| weights.path() == low_rank.path())
            .unwrap();
        let ours = low_rank.read().unwrap();
        for (ours, theirs) in ours.iter().zip(stored.factors().unwrap()) {
            assert!(ours.bits_eq(&theirs), "{}", low_rank.path());
        }
    }
    let ids = &case.expected["probe.input_ids"];
    let hidden = hidden(&model, ids).detach();
    let ours = flat(&model.logits(&hidden).unwrap().to_dtype(DType::F32).unwrap());
    let theirs = case.flat("logits.trained");
    let norm = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let apart: Vec<f32> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
    assert!(
        norm(&apart) < 0.02 * norm(&theirs),
        "{} {}",
        norm(&apart),
        norm(&theirs)
    );
}

#[test]
fn what_cannot_train_is_refused_by_name() {
    let untied = Case::open("llama_untied").base(&Value::Null);
    let tied = Case::open("llama_tied").base(&Value::Null);
    for (base, options, culprit) in [
        (&untied, options(&["q_proj", "qproj"]), "'qproj'"),
        (&untied, options(&["embed_tokens"]), "model.embed_tokens"),
        (&untied, options(&[""]), "no target"),
        (&tied, options(&["lm_head"]), "lm_head"),
        (
            &untied,
            LoraOptions {
                rank: 0,
                ..options(&["q_proj"])
            },
            "rank is 0",
        ),
        (
            &untied,
            LoraOptions {
                alpha: f64::NAN,
                ..options(&["q_proj"])
            },
            "NaN",
        ),
    ] {
        let error = options.start(base, &[40], None).unwrap_err().to_string();
        assert!(error.contains(culprit), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    // An untied head is a linear layer like any other.
    let head = options(&["lm_head"]).start(&untied, &[40], None).unwrap();
    assert_eq!(with_adapter(&untied, &head).low_rank().len(), 1);
}

/// The loss of a head with weights of LoRA is that of its logits.
#[test]
fn a_head_with_weights_of_lora_trains() {
    let case = Case::open("llama_untied");
    let base = case.base(&Value::Null);
    let start = options(&["lm_head"]).start(&base, &[149, 40], None).unwrap();
    let [with, without] = [
        with_adapter(&base, &start),
        case.model(&json!({ "state": "noop" })),
    ];
    let ids = Tensor::new(&[[1u32, 149, 40, 7]], &Device::Cpu).unwrap();
    let labels = Tensor::new(&[[149i64, -100, 7, 40]], &Device::Cpu).unwrap();
    let loss = |model: &LanguageModel| {
        let hidden = hidden(model, &ids);
        model.cross_entropy(&hidden, &labels, Graph::Keep).unwrap()
    };
    let [ours, frozen] = [loss(&with), loss(&without)].map(|loss| loss.to_scalar::<f32>().unwrap());
    assert!((ours - frozen).abs() < 1e-6, "{ours} {frozen}");
    let gradients = loss(&with).backward().unwrap();
    let [_, b] = with.low_rank()[0].factors();
    let norm = gradients
        .get(b.tensor())
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap();
    assert!(norm.to_scalar::<f32>().unwrap() > 0.0);
}
