//! How rows start.

use trainable_tokens_core::{
    DType, EmbeddingSource, ErrorKind, InitMode, InitModifier, Population, RowInit, TokenId, TokenRows,
    TokenSet, initial_rows,
};
use trainable_tokens_format::{Adapter, Overwrite};

use super::DTYPES;
use crate::failure::{ensure, equal, refused, same};
use crate::world::{World, for_all, noise, odd_values, select};
use crate::{Failure, Harness, Outcome};

/// The rows of an init by its text.
fn rows<S: EmbeddingSource>(
    text: &str,
    source: &S,
    tokens: &TokenSet,
    dtype: DType,
) -> Result<TokenRows, Failure> {
    Ok(text.parse::<RowInit>()?.rows(source, tokens, dtype)?)
}

/// The first numbers that a seed stands for, for one token.
fn draws(seed: u64, token: u32, count: usize) -> Result<Vec<f64>, Failure> {
    let init = RowInit::new(InitMode::Normal { std: 1.0 }).with_seed(seed);
    let table = TokenRows::zeros(DType::F64, token as usize + 1, count);
    let tokens = TokenSet::new([token], table.vocab_size())?;
    Ok(init.rows(&table, &tokens, DType::F64)?.to_f64_vec())
}

/// A table, dense.
struct Dense(Vec<Vec<f64>>);

impl Dense {
    fn of(table: &TokenRows) -> Self {
        let values = table.to_f64_vec();
        Self(
            values
                .chunks(table.embedding_dim())
                .map(<[f64]>::to_vec)
                .collect(),
        )
    }

    fn mean(&self, ids: &[usize]) -> Vec<f64> {
        let column = |at: usize| ids.iter().map(|id| self.0[*id][at]).sum::<f64>() / ids.len() as f64;
        (0..self.0[0].len()).map(column).collect()
    }

    fn mean_norm(&self) -> f64 {
        self.0.iter().map(|row| norm(row)).sum::<f64>() / self.0.len() as f64
    }
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn scaled(row: &[f64], to: f64) -> Vec<f64> {
    let factor = to / norm(row);
    row.iter().map(|x| x * factor).collect()
}

/// Rows for all tokens, rounded as they are written.
fn rounded(rows: &[Vec<f64>], dim: usize, dtype: DType) -> Result<TokenRows, Failure> {
    Ok(TokenRows::new(rows.concat(), rows.len(), dim)?.to_dtype(dtype))
}

/// Every mode that draws nothing gives the bits of its formula, in every type.
pub fn rows_are_those_of_the_formulas<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = world.table::<H>();
        let (source, tokens, dense) = (H::source(&table)?, world.token_set()?, Dense::of(&table));
        let all: Vec<usize> = (0..world.v).collect();
        let trains = |id: &usize| world.tokens.iter().any(|token| *token as usize == *id);
        let others: Vec<usize> = all.iter().copied().filter(|id| !trains(id)).collect();
        let (last, named) = (world.v - 1, format!("{},0,{0}", world.v - 1));
        let each = |row: &dyn Fn(usize) -> Vec<f64>| -> Vec<Vec<f64>> {
            world.tokens.iter().map(|id| row(*id as usize)).collect()
        };
        let mut cases = vec![
            ("zeros".to_owned(), each(&|_| vec![0.0; world.d])),
            ("mean".to_owned(), each(&|_| dense.mean(&all))),
            (format!("copy:{last}"), each(&|_| dense.0[last].clone())),
            (
                format!("mean-of:{named}"),
                each(&|_| dense.mean(&[last, 0, last])),
            ),
            (
                format!("interpolate:0:{last}:0.3"),
                each(&|_| {
                    let ends = dense.0[0].iter().zip(&dense.0[last]);
                    ends.map(|(a, b)| (1.0 - 0.3) * a + 0.3 * b).collect()
                }),
            ),
            (
                "keep+norm-match:2.5".to_owned(),
                each(&|id| scaled(&dense.0[id], 2.5)),
            ),
            (
                "keep+norm-match".to_owned(),
                each(&|id| scaled(&dense.0[id], dense.mean_norm())),
            ),
        ];
        if !others.is_empty() {
            cases.push(("mean:others".to_owned(), each(&|_| dense.mean(&others))));
        }
        for (text, want) in cases {
            for dtype in DTYPES {
                let got = rows(&text, &source, &tokens, dtype)?;
                same(
                    &format!("{text} in {dtype}"),
                    &got,
                    &rounded(&want, world.d, dtype)?,
                )?;
            }
        }
        Ok(())
    })
}

/// Rows that are kept have the table's bits, whatever they are.
pub fn kept_rows_are_not_computed_with<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = odd_values(world.seed, H::DTYPE, world.v, world.d);
        let got = rows("keep", &H::source(&table)?, &world.token_set()?, H::DTYPE)?;
        same("kept rows", &got, &select(&table, &world.tokens)?)
    })
}

/// A seed stands for the same numbers everywhere.
pub fn a_seed_stands_for_these_numbers<H: Harness>() -> Outcome {
    let world = World::fixed(5, 4, &[3], &[]);
    let (source, tokens) = (H::source(&world.table::<H>())?, world.token_set()?);
    let drawn = |text: &str| -> Result<Vec<u64>, Failure> {
        let rows = rows(text, &source, &tokens, DType::F64)?.to_f64_vec();
        Ok(rows.iter().map(|x| x.to_bits()).collect())
    };
    // Computed in Python, after the clauses.
    let row = [
        0x3fe6_2f5e_4a82_b349,
        0xbfe3_763d_2b87_256b,
        0xbfe2_212e_d21c_8749,
        0xbff3_ffbc_1d5e_3c0f,
    ];
    let second = [
        0x3fa2_1dc7_e3cb_0b57,
        0xbfc3_e89d_f615_89c0,
        0xc007_0041_ee5c_11b7,
        0x4000_9d1c_5184_62cc,
    ];
    equal("a random row", &drawn("random:1+seed:7")?, &row.to_vec())?;
    equal(
        "the noise of the second modifier",
        &drawn("zeros+noise:0+noise:1+seed:7")?,
        &second.to_vec(),
    )
}

/// What is drawn depends on the seed, the token and the table's values alone: not on the backend, the other tokens or
/// the order of slots.
pub fn equal_tables_and_seeds_give_equal_rows<H: Harness>() -> Outcome {
    for_all(|world| {
        let table = world.table::<H>();
        let (source, tokens, dense) = (H::source(&table)?, world.token_set()?, Dense::of(&table));
        let all: Vec<usize> = (0..world.v).collect();
        let mean = dense.mean(&all);
        let factor = (0.25 / world.v as f64).sqrt();
        let sample = |id: &u32| -> Result<Vec<f64>, Failure> {
            let z = draws(world.seed, *id, world.v)?;
            let column = |at: usize| {
                let centred = dense.0.iter().zip(&z).map(|(row, z)| z * (row[at] - mean[at]));
                mean[at] + factor * centred.sum::<f64>()
            };
            Ok((0..world.d).map(column).collect())
        };
        let want: Vec<Vec<f64>> = world.tokens.iter().map(sample).collect::<Result<_, _>>()?;
        let text = format!("mean-covariance:0.25+seed:{}", world.seed);
        for dtype in DTYPES {
            let got = rows(&text, &source, &tokens, dtype)?;
            same(
                &format!("{text} in {dtype}"),
                &got,
                &rounded(&want, world.d, dtype)?,
            )?;
        }
        for text in [
            "random:0.02",
            "mean-covariance",
            "mean-covariance:1+noise:0.1+norm-match",
        ] {
            let text = format!("{text}+seed:{}", world.seed);
            let together = rows(&text, &source, &tokens, DType::F64)?;
            same(&text, &together, &rows(&text, &table, &tokens, DType::F64)?)?;
            for (slot, id) in world.tokens.iter().enumerate() {
                let alone = rows(&text, &source, &TokenSet::new([*id], world.v)?, DType::F64)?;
                let slot = u32::try_from(slot)?;
                same(
                    &format!("{text}, token {id} alone"),
                    &alone,
                    &select(&together, &[slot])?,
                )?;
            }
        }
        Ok(())
    })
}

/// Each slot may have an init of its own.
pub fn slots_may_start_in_their_own_ways<H: Harness>() -> Outcome {
    let world = World::fixed(9, 3, &[8, 2, 5, 0], &[]);
    let table = world.table::<H>();
    let (source, tokens) = (H::source(&table)?, world.token_set()?);
    let texts = [
        "mean-covariance:1:others+seed:4",
        "keep",
        "copy:1",
        "mean-covariance:0.5+noise:1+seed:4",
    ];
    let inits: Vec<RowInit> = texts.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let dtype = H::DTYPE.default_row_dtype();
    let got = initial_rows(&source, &tokens, &inits, dtype)?;
    for (slot, text) in (0u32..).zip(texts) {
        let want = select(&rows(text, &table, &tokens, dtype)?, &[slot])?;
        same(&format!("slot {slot}, {text}"), &select(&got, &[slot])?, &want)?;
    }
    refused(
        "one init less than slots",
        initial_rows(&source, &tokens, &inits[1..], dtype),
        ErrorKind::Shape,
    )?;
    let foreign = TokenSet::new([1], 8)?;
    refused(
        "tokens of another vocabulary",
        inits[1].rows(&source, &foreign, dtype),
        ErrorKind::Shape,
    )
}

/// What cannot be done is refused, and names the culprit.
pub fn what_cannot_be_initialised_is_refused<H: Harness>() -> Outcome {
    let mut table = noise(5, DType::F64, 6, 2).to_f64_vec();
    table[2 * 2 + 1] = f64::NAN;
    table[3 * 2..4 * 2].fill(0.0);
    let source = H::source(&TokenRows::new(table, 6, 2)?.to_dtype(H::DTYPE))?;
    let tokens = TokenSet::new([5, 3], 6)?;
    for (text, kind, culprit) in [
        ("copy:6", ErrorKind::TokenOutOfRange, "6"),
        ("mean-of:1,9", ErrorKind::TokenOutOfRange, "9"),
        ("interpolate:1:7:0.5", ErrorKind::TokenOutOfRange, "7"),
        ("interpolate:1:1:inf", ErrorKind::Hyperparameter, "t is inf"),
        ("random:-1", ErrorKind::Hyperparameter, "std is -1"),
        ("mean-covariance:-1", ErrorKind::Hyperparameter, "scale is -1"),
        ("zeros+noise:NaN", ErrorKind::Hyperparameter, "noise is NaN"),
        ("keep+norm-match:0", ErrorKind::Hyperparameter, "norm-match is 0"),
        ("mean-of:", ErrorKind::Init, "at least one token"),
        ("copy:2", ErrorKind::Init, "token id 2 is not finite at column 1"),
        ("mean", ErrorKind::Init, "token id 2 is not finite at column 1"),
        (
            "mean-covariance",
            ErrorKind::Init,
            "token id 2 is not finite at column 1",
        ),
        (
            "copy:1+norm-match",
            ErrorKind::Init,
            "token id 2 is not finite at column 1",
        ),
        ("keep+norm-match:1", ErrorKind::Init, "token id 3"),
        ("random:1e300", ErrorKind::Init, "F16"),
    ] {
        let result = text.parse::<RowInit>()?.rows(&source, &tokens, DType::F16);
        if let Err(error) = &result {
            let message = error.to_string();
            ensure!(
                message.contains(culprit),
                "{text}: '{message}' does not say '{culprit}'"
            );
        }
        refused(text, result, kind)?;
    }
    let all = TokenSet::new(0..6, 6)?;
    refused(
        "the mean of no other row",
        "mean:others".parse::<RowInit>()?.rows(&source, &all, DType::F32),
        ErrorKind::Init,
    )?;
    // A row that trains is none of the others, and may hold anything.
    rows("mean:others", &source, &TokenSet::new([2], 6)?, DType::F32)?;
    Ok(())
}

/// Texts mean what the specification says, and are written so that they can be read again.
pub fn texts_are_those_of_the_specification<H: Harness>() -> Outcome {
    let noise = |std| InitModifier::Noise { std };
    let matched = |target| InitModifier::NormMatch { target };
    let (all, others) = (Population::All, Population::Others);
    let sample = |scale, over| RowInit::new(InitMode::MeanCovariance { scale, over });
    let blend = InitMode::Interpolate {
        from: TokenId(5),
        to: TokenId(7),
        t: 0.3,
    };
    let cases = [
        ("keep", RowInit::default(), "keep"),
        ("zeros", RowInit::new(InitMode::Zeros), "zeros"),
        (
            "random",
            RowInit::new(InitMode::Normal { std: 0.02 }),
            "random:0.02+seed:0",
        ),
        (
            "random:1",
            RowInit::new(InitMode::Normal { std: 1.0 }),
            "random:1.0+seed:0",
        ),
        ("mean", RowInit::new(InitMode::Mean { over: all }), "mean"),
        (
            "mean:others",
            RowInit::new(InitMode::Mean { over: others }),
            "mean:others",
        ),
        (
            "mean-covariance",
            sample(1e-9, all),
            "mean-covariance:1e-9+seed:0",
        ),
        (
            "mean+covariance:1",
            sample(1.0, all),
            "mean-covariance:1.0+seed:0",
        ),
        (
            "mean-covariance:others",
            sample(1e-9, others),
            "mean-covariance:1e-9:others+seed:0",
        ),
        ("copy:5", RowInit::new(InitMode::Copy(TokenId(5))), "copy:5"),
        (
            "mean-of:5,7",
            RowInit::new(InitMode::MeanOf([5, 7].map(TokenId).to_vec())),
            "mean-of:5,7",
        ),
        ("interpolate:5:7:.3", RowInit::new(blend), "interpolate:5:7:0.3"),
        (
            "mean+noise:0.01+norm-match+norm-match:2+seed:9",
            RowInit::new(InitMode::Mean { over: all })
                .with(noise(0.01))
                .with(matched(None))
                .with(matched(Some(2.0)))
                .with_seed(9),
            "mean+noise:0.01+norm-match+norm-match:2.0+seed:9",
        ),
        (
            "keep+seed:3+noise:1",
            RowInit::default().with(noise(1.0)).with_seed(3),
            "keep+noise:1.0+seed:3",
        ),
    ];
    for (text, init, written) in cases {
        equal(text, &text.parse()?, &init)?;
        equal(text, &init.to_string().as_str(), &written)?;
        equal(written, &written.parse()?, &init)?;
    }
    for text in [
        "",
        "kept",
        "keep:1",
        "copy:+1",
        "mean-of:1,,2",
        "mean+noise",
        "mean+seed:1+seed:2",
        "mean+",
    ] {
        ensure!(text.parse::<RowInit>().is_err(), "'{text}' is accepted");
    }
    Ok(())
}

/// An adapter tells how its rows started, and the rows can be made again from that.
pub fn an_adapter_tells_how_it_started<H: Harness>() -> Outcome {
    let world = World::fixed(11, 4, &[7, 2], &[]);
    let (source, tokens) = (H::source(&world.table::<H>())?, world.token_set()?);
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("adapter");
    for text in ["keep", "mean-covariance:1+noise:0.1+norm-match+seed:3"] {
        let init: RowInit = text.parse()?;
        let start = init.rows(&source, &tokens, DType::F32)?;
        Adapter::builder("embed_tokens", &tokens, start.clone())
            .init_weights(init.keeps_base())
            .init(init.to_string())
            .build()?
            .write(&path, Overwrite::Replace)?;
        let adapter = Adapter::read(&path)?;
        equal(
            "init_weights",
            &adapter.config().init_weights(),
            &(text == "keep"),
        )?;
        let told = adapter.metadata().init.clone().unwrap_or_default();
        same(&told, &rows(&told, &source, &tokens, DType::F32)?, &start)?;
    }
    Ok(())
}
