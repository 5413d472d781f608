//! Optimizers and hooks against numbers of torch 2.15.0, and the contracts of their state.
#![allow(missing_docs, clippy::unwrap_used)]

use trainable_tokens_core::{
    Adam, AdamConfig, ClipGradNorm, DType, Decay, DecayTowardOriginal, Error, OptimizerHook, Result,
    RowOptimizer, Sgd, SgdConfig, StepContext, TokenRows, TokenSet, step_rows,
};

fn rows(values: [f32; 4]) -> TokenRows {
    TokenRows::new(values.to_vec(), 2, 2).unwrap()
}

fn gradient(step: u8) -> TokenRows {
    rows([0.1 * f32::from(step + 1), -0.3, 0.0, 1.5])
}

fn start() -> TokenRows {
    rows([0.5, -1.0, 2.0, 0.25])
}

fn run(optimizer: &mut dyn RowOptimizer, rows: &mut TokenRows, steps: std::ops::Range<u8>) {
    for step in steps {
        let lr = optimizer.learning_rate();
        optimizer.step(rows, &gradient(step), lr).unwrap();
    }
}

fn every_optimizer() -> Vec<(Box<dyn RowOptimizer>, [f32; 4])> {
    let sgd = |config| Box::new(Sgd::new(config).unwrap()) as Box<dyn RowOptimizer>;
    let adam = |config| Box::new(Adam::new(config).unwrap()) as Box<dyn RowOptimizer>;
    let base = SgdConfig {
        lr: 0.1,
        momentum: 0.9,
        ..SgdConfig::default()
    };
    let fast = AdamConfig {
        lr: 0.1,
        weight_decay: 0.1,
        ..AdamConfig::ADAM
    };
    // Three steps of torch from the same start with the same gradients.
    vec![
        (
            sgd(SgdConfig {
                dampening: 0.1,
                weight_decay: 0.01,
                ..base
            }),
            [0.409_092_5, -0.835_211_04, 1.989_368_4, -0.548_694_55],
        ),
        (
            sgd(SgdConfig {
                nesterov: true,
                ..base
            }),
            [0.354_410_02, -0.758_53, 2.0, -0.957_35],
        ),
        (
            adam(fast),
            [0.203_281_85, -0.700_273_8, 1.700_623_4, -0.049_935_013],
        ),
        (
            adam(AdamConfig {
                decay: Decay::Decoupled,
                ..fast
            }),
            [0.195_786_42, -0.673_289, 1.940_598_1, -0.054_435_242],
        ),
        (
            adam(AdamConfig {
                lr: 0.1,
                amsgrad: true,
                ..AdamConfig::ADAMW
            }),
            [0.207_681_72, -0.7, 2.0, -0.050_000_004],
        ),
    ]
}

#[test]
fn three_steps_are_torchs() {
    for (mut optimizer, want) in every_optimizer() {
        let mut rows = start();
        run(&mut *optimizer, &mut rows, 0..3);
        for (got, want) in rows.to_f32_vec().into_iter().zip(want) {
            assert!((got - want).abs() <= 2e-7, "{got} {want}");
        }
        assert_eq!(optimizer.steps_taken(), 3);
    }
}

#[test]
fn a_loaded_state_goes_on_bit_for_bit() {
    for ((mut straight, _), ((mut first, _), (mut second, _))) in every_optimizer()
        .into_iter()
        .zip(every_optimizer().into_iter().zip(every_optimizer()))
    {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let (mut want, mut got) = (start().to_dtype(dtype), start().to_dtype(dtype));
            let blank = straight.state();
            run(&mut *straight, &mut want, 0..5);
            run(&mut *first, &mut got, 0..2);
            second.load_state(first.state()).unwrap();
            run(&mut *second, &mut got, 2..5);
            assert!(got.bits_eq(&want));
            assert_eq!(second.state(), straight.state());
            // Rows of another type need another memory.
            if dtype == DType::F64 {
                let lr = straight.learning_rate();
                assert!(straight.step(&mut start(), &gradient(0), lr).is_err());
            }
            for optimizer in [&mut straight, &mut first, &mut second] {
                let fresh = trainable_tokens_core::OptimizerState {
                    step: 0,
                    tensors: Vec::new(),
                };
                optimizer.load_state(fresh.clone()).unwrap();
                assert_eq!(optimizer.state(), fresh);
            }
            assert_eq!(blank.step, 0);
        }
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_changes_nothing() {
    let mut adam = Adam::new(AdamConfig::ADAMW).unwrap();
    let mut at = start();
    run(&mut adam, &mut at, 0..2);
    let kept = adam.state();
    let mut missing = kept.clone();
    missing.tensors.pop();
    let mut foreign = kept.clone();
    foreign.tensors.push(("momentum_buffer".to_owned(), start()));
    let mut misshapen = kept.clone();
    misshapen.tensors[0].1 = TokenRows::zeros(DType::F32, 1, 2);
    for state in [missing, foreign, misshapen] {
        assert!(matches!(
            adam.load_state(state),
            Err(Error::OptimizerState { .. })
        ));
        assert_eq!(adam.state(), kept);
    }
    let before = at.clone();
    assert!(
        adam.step(&mut at, &TokenRows::zeros(DType::F32, 1, 2), 0.1)
            .is_err()
    );
    assert!(at.bits_eq(&before));
}

#[test]
fn settings_out_of_range_are_named() {
    let name = |error: Error| match error {
        Error::Hyperparameter { name, .. } => name,
        other => panic!("{other}"),
    };
    let adam = AdamConfig::ADAM;
    assert_eq!(
        name(Adam::new(AdamConfig { lr: -1.0, ..adam }).unwrap_err()),
        "lr"
    );
    assert_eq!(
        name(Adam::new(AdamConfig { beta1: 1.0, ..adam }).unwrap_err()),
        "beta1"
    );
    assert_eq!(
        name(
            Adam::new(AdamConfig {
                beta2: f64::NAN,
                ..adam
            })
            .unwrap_err()
        ),
        "beta2"
    );
    assert_eq!(
        name(Adam::new(AdamConfig { eps: -1e-8, ..adam }).unwrap_err()),
        "eps"
    );
    assert_eq!(
        name(
            Adam::new(AdamConfig {
                weight_decay: f64::INFINITY,
                ..adam
            })
            .unwrap_err()
        ),
        "weight_decay"
    );
    let sgd = SgdConfig::default();
    assert_eq!(
        name(
            Sgd::new(SgdConfig {
                momentum: -0.1,
                ..sgd
            })
            .unwrap_err()
        ),
        "momentum"
    );
    assert_eq!(
        name(
            Sgd::new(SgdConfig {
                nesterov: true,
                ..sgd
            })
            .unwrap_err()
        ),
        "momentum"
    );
    assert_eq!(name(ClipGradNorm::new(0.0).unwrap_err()), "max_norm");
    assert_eq!(
        name(DecayTowardOriginal::new(-1.0, start()).unwrap_err()),
        "weight_decay"
    );
}

fn step(hooks: &mut [&mut dyn OptimizerHook], rows: &mut TokenRows, mut gradient: TokenRows) -> TokenRows {
    let tokens = TokenSet::new([4, 1], 5).unwrap();
    let mut sgd = Sgd::new(SgdConfig {
        lr: 0.5,
        ..SgdConfig::default()
    })
    .unwrap();
    let report = step_rows(&mut sgd, hooks, &tokens, rows, &mut gradient).unwrap();
    assert_eq!(report.step, 1);
    gradient
}

#[test]
fn clipping_is_torchs() {
    let mut clip = ClipGradNorm::new(2.0).unwrap();
    let gradient = step(&mut [&mut clip], &mut start(), rows([3.0, -4.0, 0.0, 12.0]));
    let want = [0.461_538_43, -0.615_384_6, 0.0, 1.846_153_7];
    for (got, want) in gradient.to_f32_vec().into_iter().zip(want) {
        assert!((got - want).abs() <= 2e-7, "{got} {want}");
    }
    let small = step(&mut [&mut clip], &mut start(), rows([0.1, 0.0, 0.0, 0.0]));
    assert!(
        small.bits_eq(&rows([0.1, 0.0, 0.0, 0.0])),
        "a small gradient stays as it is"
    );
}

#[test]
fn decay_pulls_toward_the_original_rows() {
    let mut decay = DecayTowardOriginal::new(0.5, rows([1.0, 1.0, 1.0, 1.0])).unwrap();
    let mut at = rows([2.0, 0.0, 1.0, 5.0]);
    step(&mut [&mut decay], &mut at, rows([0.0; 4]));
    assert_eq!(at.to_f32_vec(), [1.75, 0.25, 1.0, 4.0]);
}

/// Records when it runs, and can refuse.
struct Recorder<'a> {
    name: &'static str,
    log: &'a std::cell::RefCell<Vec<String>>,
    refuses: bool,
}

impl OptimizerHook for Recorder<'_> {
    fn before_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        self.log
            .borrow_mut()
            .push(format!("before {} {}", self.name, context.learning_rate));
        context.learning_rate *= 2.0;
        if self.refuses {
            Err(Error::NoGradient)
        } else {
            Ok(())
        }
    }

    fn after_step(&mut self, context: &mut StepContext<'_>) -> Result<()> {
        self.log
            .borrow_mut()
            .push(format!("after {} {:?}", self.name, context.tokens.to_vec()));
        Ok(())
    }
}

#[test]
fn hooks_run_in_order_and_a_refusal_cancels_the_update() {
    let log = std::cell::RefCell::new(Vec::new());
    let hook = |name, refuses| Recorder {
        name,
        log: &log,
        refuses,
    };
    let mut at = start();
    step(
        &mut [&mut hook("a", false), &mut hook("b", false)],
        &mut at,
        rows([1.0, 0.0, 0.0, 0.0]),
    );
    assert_eq!(
        *log.borrow(),
        ["before a 0.5", "before b 1", "after a [4, 1]", "after b [4, 1]"]
    );
    assert_eq!(
        at.to_f32_vec(),
        [-1.5, -1.0, 2.0, 0.25],
        "the doubled learning rate was used"
    );

    let mut sgd = Sgd::new(SgdConfig::default()).unwrap();
    let (tokens, before) = (TokenSet::new([4, 1], 5).unwrap(), at.clone());
    let mut refusing = hook("c", true);
    assert!(step_rows(&mut sgd, &mut [&mut refusing], &tokens, &mut at, &mut gradient(0)).is_err());
    assert!(at.bits_eq(&before) && sgd.steps_taken() == 0);
}
