//! Every mode against its dense definition, random modes against their distributions.

use std::cell::Cell;

use half::{bf16, f16};
use proptest::prelude::*;

use super::random::{Normals, Purpose};
use super::*;
use crate::RowData;

/// A table in memory that remembers its largest read.
struct Table {
    rows: TokenRows,
    largest_read: Cell<usize>,
}

impl Table {
    fn new(rows: TokenRows) -> Self {
        Self {
            rows,
            largest_read: Cell::new(0),
        }
    }
}

impl EmbeddingSource for Table {
    type Error = Error;

    fn vocab_size(&self) -> usize {
        self.rows.num_rows()
    }
    fn embedding_dim(&self) -> usize {
        self.rows.embedding_dim()
    }
    fn dtype(&self) -> DType {
        self.rows.dtype()
    }
    fn read_rows(&self, ids: &[TokenId]) -> Result<TokenRows> {
        self.largest_read.set(self.largest_read.get().max(ids.len()));
        self.rows.read_rows(ids)
    }
}

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// Rows with correlated columns, means away from zero and norms that differ.
fn table(dtype: DType, v: u32, d: u32) -> Table {
    let mut normals = Normals::new(99, TokenId(0), Purpose::Row);
    let mut values = Vec::new();
    for row in 0..v {
        let shared = normals.draw();
        for column in 0..d {
            values.push(0.3 * f64::from(column) + shared + 0.5 * normals.draw() * f64::from(1 + row % 3));
        }
    }
    let rows = TokenRows::new(values, v as usize, d as usize).unwrap();
    Table::new(rows.to_dtype(dtype))
}

fn tokens(ids: &[u32], table: &Table) -> TokenSet {
    TokenSet::new(ids.iter().copied(), table.vocab_size()).unwrap()
}

fn rows(init: &str, table: &Table, ids: &[u32], dtype: DType) -> Result<TokenRows> {
    init.parse::<RowInit>()
        .unwrap()
        .rows(table, &tokens(ids, table), dtype)
}

/// The table, dense, in `f64`.
fn dense(table: &Table) -> Vec<Vec<f64>> {
    let values = table.rows.to_f64_vec();
    values
        .chunks(table.embedding_dim())
        .map(<[f64]>::to_vec)
        .collect()
}

/// The mean of each column, by its definition.
fn mean_of(rows: &[&Vec<f64>]) -> Vec<f64> {
    let column = |at: usize| rows.iter().map(|row| row[at]).sum::<f64>() / rows.len() as f64;
    (0..rows[0].len()).map(column).collect()
}

fn length(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[track_caller]
fn assert_rows(what: &str, got: &TokenRows, want: &[Vec<f64>], dtype: DType) {
    let want = TokenRows::new(want.concat(), want.len(), want[0].len())
        .unwrap()
        .to_dtype(dtype);
    assert!(got.bits_eq(&want), "{what}: {got:?}, expected {want:?}");
}

#[test]
fn every_mode_is_its_formula_in_every_type() {
    let ids = [7, 0, 3];
    for (table_type, row_type) in DTYPES.iter().flat_map(|a| DTYPES.map(|b| (*a, b))) {
        let table = table(table_type, 11, 5);
        let e = dense(&table);
        let all: Vec<_> = e.iter().collect();
        let others: Vec<_> = [1, 2, 4, 5, 6, 8, 9, 10].map(|id: usize| &e[id]).to_vec();
        let mean_norm = e.iter().map(|row| length(row)).sum::<f64>() / 11.0;
        let matched = |row: &Vec<f64>, norm: f64| {
            let factor = norm / length(row);
            row.iter().map(|x| x * factor).collect::<Vec<f64>>()
        };
        let draws = |id: u32, purpose, count: usize| {
            let mut normals = Normals::new(5, TokenId(id), purpose);
            (0..count).map(|_| normals.draw()).collect::<Vec<f64>>()
        };
        let sample = |id: u32, scale: f64, over: &[&Vec<f64>]| {
            let (mean, z) = (mean_of(over), draws(id, Purpose::Row, over.len()));
            let factor = (scale / over.len() as f64).sqrt();
            let column = |at: usize| {
                let centred = over.iter().zip(&z).map(|(row, z)| z * (row[at] - mean[at]));
                mean[at] + factor * centred.sum::<f64>()
            };
            (0..5).map(column).collect::<Vec<f64>>()
        };
        let noisy = |row: &[f64], id: u32, at: u64, std: f64| {
            let noise = draws(id, Purpose::Noise(at), 5);
            row.iter()
                .zip(noise)
                .map(|(x, z)| x + std * z)
                .collect::<Vec<f64>>()
        };
        let same = |row: Vec<f64>| vec![row; 3];
        let each = |row: &dyn Fn(u32) -> Vec<f64>| ids.map(row).to_vec();
        let blend: Vec<f64> = e[4]
            .iter()
            .zip(&e[9])
            .map(|(a, b)| (1.0 - 0.3) * a + 0.3 * b)
            .collect();
        let cases = [
            ("keep", each(&|id| e[id as usize].clone())),
            ("zeros", same(vec![0.0; 5])),
            (
                "random:0.5+seed:5",
                each(&|id| draws(id, Purpose::Row, 5).iter().map(|z| 0.5 * z).collect()),
            ),
            (
                "random+seed:5",
                each(&|id| draws(id, Purpose::Row, 5).iter().map(|z| 0.02 * z).collect()),
            ),
            ("mean", same(mean_of(&all))),
            ("mean:others", same(mean_of(&others))),
            ("mean-covariance:0.7+seed:5", each(&|id| sample(id, 0.7, &all))),
            ("mean+covariance+seed:5", each(&|id| sample(id, 1e-9, &all))),
            (
                "mean-covariance:2:others+seed:5",
                each(&|id| sample(id, 2.0, &others)),
            ),
            (
                "mean-covariance:others+seed:5",
                each(&|id| sample(id, 1e-9, &others)),
            ),
            ("copy:7", same(e[7].clone())),
            ("mean-of:4,9,4", same(mean_of(&[&e[4], &e[9], &e[4]]))),
            ("interpolate:4:9:0.3", same(blend)),
            ("zeros+noise:0.1+seed:5", each(&|id| noisy(&[0.0; 5], id, 0, 0.1))),
            ("keep+norm-match", each(&|id| matched(&e[id as usize], mean_norm))),
            ("keep+norm-match:2", each(&|id| matched(&e[id as usize], 2.0))),
            (
                "mean+noise:1+norm-match:3+seed:5",
                each(&|id| matched(&noisy(&mean_of(&all), id, 0, 1.0), 3.0)),
            ),
            (
                "mean+norm-match:3+noise:1+seed:5",
                each(&|id| noisy(&matched(&mean_of(&all), 3.0), id, 1, 1.0)),
            ),
        ];
        for (init, want) in cases {
            let got = rows(init, &table, &ids, row_type).unwrap();
            assert_rows(
                &format!("{init}, {table_type} to {row_type}"),
                &got,
                &want,
                row_type,
            );
        }
    }
}

#[test]
fn keep_keeps_every_bit() {
    let odd = [0x7fa0_0001u32, 0x8000_0000, 0x7f80_0000, 1]
        .map(f32::from_bits)
        .to_vec();
    let table = Table::new(TokenRows::new(odd, 2, 2).unwrap());
    let got = rows("keep+seed:3", &table, &[1, 0], DType::F32).unwrap();
    assert!(got.bits_eq(&table.read_rows(&[TokenId(1), TokenId(0)]).unwrap()));
}

#[test]
fn blocks_and_other_tokens_make_no_difference() {
    let table = table(DType::BF16, 23, 4);
    let init: RowInit = "mean-covariance:1+noise:0.1+norm-match+seed:9".parse().unwrap();
    let together = tokens(&[20, 3, 11], &table);
    let inits = vec![init.clone(); 3];
    let whole = initial_rows_by(&table, &together, &inits, DType::F64, 1 << 20).unwrap();
    assert_eq!(table.largest_read.replace(0), 23);
    for (block, largest) in [(0, 3), (1, 3), (4, 3), (20, 5), (91, 22), (92, 23)] {
        let got = initial_rows_by(&table, &together, &inits, DType::F64, block).unwrap();
        assert!(got.bits_eq(&whole), "block of {block}");
        assert_eq!(table.largest_read.replace(0), largest, "block of {block}");
    }
    for (slot, id) in together.ids().iter().enumerate() {
        let alone = init.rows(&table, &tokens(&[id.0], &table), DType::F64).unwrap();
        assert!(alone.bits_eq(&TokenRows::new(whole.to_f64_vec()[slot * 4..][..4].to_vec(), 1, 4).unwrap()));
    }
    let other = init
        .clone()
        .with_seed(10)
        .rows(&table, &together, DType::F64)
        .unwrap();
    assert!(!other.bits_eq(&whole));
}

#[test]
fn every_slot_may_start_its_own_way() {
    let table = table(DType::F32, 9, 3);
    let set = tokens(&[8, 2, 5, 0], &table);
    let texts = [
        "mean-covariance:1:others+seed:4",
        "keep",
        "copy:1",
        "mean-covariance:0.5+seed:4",
    ];
    let inits = texts.map(|text| text.parse::<RowInit>().unwrap());
    let got = initial_rows(&table, &set, &inits, DType::F32)
        .unwrap()
        .to_f64_vec();
    for (slot, init) in inits.iter().enumerate() {
        let want = init.rows(&table, &set, DType::F32).unwrap().to_f64_vec();
        assert_eq!(got[slot * 3..][..3], want[slot * 3..][..3], "slot {slot}");
    }
    assert_eq!(
        initial_rows(&table, &set, &inits[..3], DType::F32),
        Err(Error::shape("list of inits", &[4], &[3]))
    );
    let foreign = TokenSet::new([1], 8).unwrap();
    let init = RowInit::default();
    assert!(matches!(
        init.rows(&table, &foreign, DType::F32),
        Err(Error::Shape { .. })
    ));
}

#[test]
fn random_rows_have_their_distribution() {
    let table = table(DType::F32, 3000, 3);
    let ids: Vec<u32> = (0..2000).collect();
    let drawn = rows("random:0.25+seed:1", &table, &ids, DType::F64)
        .unwrap()
        .to_f64_vec();
    let n = drawn.len() as f64;
    let (mean, square) = (
        drawn.iter().sum::<f64>() / n,
        drawn.iter().map(|x| x * x).sum::<f64>() / n,
    );
    // Five standard errors of the mean and of the variance.
    assert!(mean.abs() < 5.0 * 0.25 / n.sqrt(), "{mean}");
    assert!(
        (square - 0.0625).abs() < 5.0 * 0.0625 * (2.0 / n).sqrt(),
        "{square}"
    );
}

#[test]
fn covariance_samples_have_the_tables_mean_and_covariance() {
    let table = table(DType::F32, 1200, 3);
    let e = dense(&table);
    let want_mean = mean_of(&e.iter().collect::<Vec<_>>());
    let covariance = |rows: &[Vec<f64>], mean: &[f64], a: usize, b: usize| {
        rows.iter()
            .map(|row| (row[a] - mean[a]) * (row[b] - mean[b]))
            .sum::<f64>()
            / rows.len() as f64
    };
    let ids: Vec<u32> = (0..1200).collect();
    let n = ids.len() as f64;
    for scale in [1.0, 0.01] {
        let got = rows(
            &format!("mean-covariance:{scale}+seed:2"),
            &table,
            &ids,
            DType::F64,
        )
        .unwrap();
        let got: Vec<Vec<f64>> = got.to_f64_vec().chunks(3).map(<[f64]>::to_vec).collect();
        for a in 0..3 {
            let variance = |at| scale * covariance(&e, &want_mean, at, at);
            let mean = got.iter().map(|row| row[a]).sum::<f64>() / n;
            assert!(
                (mean - want_mean[a]).abs() < 5.0 * (variance(a) / n).sqrt(),
                "mean {a}: {mean}"
            );
            for b in 0..=a {
                let want = scale * covariance(&e, &want_mean, a, b);
                let error = ((variance(a) * variance(b) + want * want) / n).sqrt();
                let got = covariance(&got, &want_mean, a, b);
                assert!(
                    (got - want).abs() < 5.0 * error,
                    "covariance {a} {b}: {got}, expected {want}"
                );
                assert!(want > 10.0 * error || a != b, "the test tells nothing");
            }
        }
    }
}

#[test]
fn a_table_without_full_rank_is_sampled_all_the_same() {
    // Four rows in a plane of eight dimensions: transformers' factorisation fails here.
    let flat: Vec<f32> = [(1u8, 2u8), (3, 1), (0, 4), (2, 2)]
        .iter()
        .flat_map(|(a, b)| [*a, *b, *a, *b, 0, 0, 0, 0].map(f32::from))
        .collect();
    let table = Table::new(TokenRows::new(flat, 4, 8).unwrap());
    let got = rows("mean-covariance:1", &table, &[2], DType::F64)
        .unwrap()
        .to_f64_vec();
    assert_eq!((got[0], got[1]), (got[2], got[3]));
    assert_eq!(got[4..], [0.0; 4]);
    assert!(got[0] != 1.5 && got[1] != 2.25);
    // Without any variance it is the mean, exactly.
    let one = Table::new(TokenRows::new([0.5f32, -3.0].repeat(6), 6, 2).unwrap());
    assert_eq!(
        rows("mean-covariance:1", &one, &[2], DType::F64)
            .unwrap()
            .to_f64_vec(),
        [0.5, -3.0]
    );
}

#[test]
fn wrong_requests_name_the_culprit() {
    let table = table(DType::F32, 6, 2);
    let refused = |init: RowInit| {
        init.rows(&table, &tokens(&[5, 1], &table), DType::F32)
            .unwrap_err()
    };
    let out = |id| Error::TokenOutOfRange { id, vocab_size: 6 };
    let id = |id| TokenId(id);
    for (mode, error) in [
        (InitMode::Copy(id(6)), out(6)),
        (InitMode::MeanOf(vec![id(1), id(9)]), out(9)),
        (
            InitMode::Interpolate {
                from: id(1),
                to: id(7),
                t: 0.5,
            },
            out(7),
        ),
        (
            InitMode::Interpolate {
                from: id(8),
                to: id(1),
                t: 0.5,
            },
            out(8),
        ),
        (InitMode::MeanOf(Vec::new()), InitError::NoTokens.into()),
    ] {
        assert_eq!(refused(RowInit::new(mode)), error);
    }
    for bad in [-0.1, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let over = Population::All;
        let modifier = |modifier| RowInit::default().with(modifier);
        let named = [
            ("std", RowInit::new(InitMode::Normal { std: bad })),
            (
                "scale",
                RowInit::new(InitMode::MeanCovariance { scale: bad, over }),
            ),
            ("noise", modifier(InitModifier::Noise { std: bad })),
            (
                "norm-match",
                modifier(InitModifier::NormMatch { target: Some(bad) }),
            ),
        ];
        for (want, init) in named {
            assert!(
                matches!(refused(init), Error::Hyperparameter { name, .. } if name == want),
                "{want} {bad}"
            );
        }
        if !bad.is_finite() {
            let init = RowInit::new(InitMode::Interpolate {
                from: id(0),
                to: id(1),
                t: bad,
            });
            assert!(matches!(refused(init), Error::Hyperparameter { name: "t", .. }));
        }
    }
    let zero_target = RowInit::default().with(InitModifier::NormMatch { target: Some(0.0) });
    assert!(matches!(
        refused(zero_target),
        Error::Hyperparameter {
            name: "norm-match",
            ..
        }
    ));
    let zeros = RowInit::new(InitMode::Zeros).with(InitModifier::NormMatch { target: None });
    assert_eq!(refused(zeros), InitError::ZeroNorm { id: id(5) }.into());
    let all = tokens(&[0, 1, 2, 3, 4, 5], &table);
    let others: RowInit = "mean:others".parse().unwrap();
    assert_eq!(
        others.rows(&table, &all, DType::F32),
        Err(InitError::NoOthers.into())
    );
}

#[test]
fn rows_that_are_no_numbers_are_refused_where_they_count() {
    let values = vec![1.0f32, 2.0, f32::NAN, 4.0, 5.0, f32::INFINITY, 7.0, 8.0];
    let table = Table::new(TokenRows::new(values, 4, 2).unwrap());
    let refused = |init: &str, ids: &[u32]| match rows(init, &table, ids, DType::F32) {
        Err(Error::Init(InitError::NotFinite { id, column })) => (id.0, column),
        other => panic!("{init}: {other:?}"),
    };
    assert_eq!(refused("copy:1", &[0]), (1, 0));
    assert_eq!(refused("mean-of:0,2", &[0]), (2, 1));
    assert_eq!(refused("interpolate:2:0:0.0", &[0]), (2, 1));
    assert_eq!(refused("mean", &[0]), (1, 0));
    assert_eq!(refused("mean-covariance:1", &[0]), (1, 0));
    assert_eq!(refused("copy:0+norm-match", &[0]), (1, 0));
    assert_eq!(refused("keep+noise:1", &[2]), (2, 1));
    assert_eq!(refused("mean:others", &[1, 0]), (2, 1));
    // Rows that do not count may hold anything.
    let fine = rows("mean:others", &table, &[1, 2], DType::F32).unwrap();
    assert_eq!(fine.to_f64_vec(), [4.0, 5.0, 4.0, 5.0]);
    rows("mean-covariance:1:others", &table, &[1, 2], DType::F32).unwrap();
    rows("zeros", &table, &[1, 2], DType::F32).unwrap();
    rows("copy:0+norm-match:2", &table, &[1], DType::F32).unwrap();
}

#[test]
fn values_beyond_the_element_type_are_refused() {
    let table = Table::new(TokenRows::new(vec![1.0f32, 70_000.0], 1, 2).unwrap());
    let overflow = |dtype| InitError::Overflow {
        id: TokenId(0),
        column: 1,
        dtype,
    };
    assert_eq!(
        rows("copy:0", &table, &[0], DType::F16),
        Err(overflow(DType::F16).into())
    );
    assert!(matches!(
        rows("copy:0", &table, &[0], DType::BF16).unwrap().data(),
        RowData::BF16(_)
    ));
    let huge = rows("random:1e300", &table, &[0], DType::F32);
    assert!(matches!(huge, Err(Error::Init(InitError::Overflow { .. }))));
    // What is kept is never judged.
    let kept = rows("keep", &table, &[0], DType::F16).unwrap();
    assert_eq!(kept.as_slice::<f16>().unwrap()[1], f16::INFINITY);
    assert_eq!(
        bf16::from_f32(70_000.0).to_f64(),
        rows("keep", &table, &[0], DType::BF16).unwrap().to_f64_vec()[1]
    );
}

#[test]
fn no_token_takes_no_pass() {
    let table = table(DType::F32, 6, 2);
    assert_eq!(
        rows("mean-covariance", &table, &[], DType::F32).unwrap().shape(),
        [0, 2]
    );
    rows("copy:1+noise:1", &table, &[4], DType::F32).unwrap();
    assert_eq!(table.largest_read.get(), 1);
}

#[test]
fn texts_that_are_no_init_are_refused() {
    for text in [
        "",
        "kept",
        "Keep",
        "keep:1",
        "zeros:0",
        "random:",
        "random:x",
        "mean:all",
        "mean-covariance:x",
        "mean-covariance:1:all",
        "copy",
        "copy:",
        "copy:x",
        "copy:-1",
        "copy:+1",
        "copy:4294967296",
        "mean-of",
        "mean-of:1,",
        "mean-of:1,,2",
        "mean-of:1 2",
        "interpolate",
        "interpolate:1:2",
        "interpolate:1:2:3:4",
        "interpolate:1:x:0.5",
        "mean+noise",
        "mean+noise:x",
        "mean+norm-match:",
        "mean+seed",
        "mean+seed:-1",
        "mean+seed:1+seed:2",
        "mean+seed:18446744073709551616",
        "mean+other",
        "mean+",
        "+mean",
        "+seed:1",
    ] {
        let error = text
            .parse::<RowInit>()
            .map(|init| init.to_string())
            .unwrap_err()
            .to_string();
        assert!(!error.contains('\n') && !error.ends_with('.'), "{text}: {error}");
    }
}

fn any_init() -> impl Strategy<Value = RowInit> {
    let id = || any::<u32>().prop_map(TokenId);
    // Whatever is not NaN: the text form carries what `check` will refuse, too.
    let number = || any::<f64>().prop_filter("a number", |x| !x.is_nan());
    let over = || prop_oneof![Just(Population::All), Just(Population::Others)];
    let mode = prop_oneof![
        Just(InitMode::Keep),
        Just(InitMode::Zeros),
        number().prop_map(|std| InitMode::Normal { std }),
        over().prop_map(|over| InitMode::Mean { over }),
        (number(), over()).prop_map(|(scale, over)| InitMode::MeanCovariance { scale, over }),
        id().prop_map(InitMode::Copy),
        proptest::collection::vec(id(), 0..4).prop_map(InitMode::MeanOf),
        (id(), id(), number()).prop_map(|(from, to, t)| InitMode::Interpolate { from, to, t }),
    ];
    let modifier = prop_oneof![
        number().prop_map(|std| InitModifier::Noise { std }),
        proptest::option::of(number()).prop_map(|target| InitModifier::NormMatch { target }),
    ];
    let modifiers = proptest::collection::vec(modifier, 0..3);
    let init = (mode, modifiers, prop_oneof![Just(0), any::<u64>()]);
    init.prop_map(|(mode, modifiers, seed)| RowInit {
        mode,
        modifiers,
        seed,
    })
}

proptest! {
    #[test]
    fn the_text_form_round_trips(init in any_init()) {
        prop_assert_eq!(init.to_string().parse::<RowInit>().unwrap(), init);
    }

    #[test]
    fn no_text_is_more_than_an_error(text in "(keep|mean|copy|mean-of|random|interpolate|[a-z+:-]{0,9})[:+0-9a-z,.é-]{0,20}") {
        if let Ok(init) = text.parse::<RowInit>() {
            prop_assert_eq!(init.to_string().parse::<RowInit>().unwrap().to_string(), init.to_string());
        }
    }
}

#[test]
fn tokens_after_the_last_row_start_from_the_rows_that_are_there() {
    let table = TokenRows::new(vec![1.0f64, 2.0, 3.0, 6.0], 2, 2).unwrap();
    let tokens = TokenSet::new([3, 1, 2], 4).unwrap();
    let inits = |texts: [&str; 3]| texts.map(|text| text.parse::<RowInit>().unwrap());
    let rows = |texts| initial_rows(&table, &tokens, &inits(texts), DType::F64);
    let found = rows(["mean", "keep", "copy:0"]).unwrap();
    assert_eq!(found.to_f64_vec(), [2.0, 4.0, 3.0, 6.0, 1.0, 2.0]);
    // Means and norms count the rows that are there, not those that are to come.
    let mean_norm = f64::midpoint(5f64.sqrt(), 45f64.sqrt());
    let matched = rows(["mean+norm-match", "keep", "mean:others"])
        .unwrap()
        .to_f64_vec();
    assert!((matched[0].hypot(matched[1]) - mean_norm).abs() < 1e-12);
    assert_eq!(matched[4..], [1.0, 2.0]);
    // Random rows are those of the same token in the grown table.
    let grown = TokenRows::new(vec![0.0f64; 8], 4, 2).unwrap();
    let random = inits(["random", "random", "random"]);
    let of_grown = initial_rows(&grown, &tokens, &random, DType::F64).unwrap();
    assert!(rows(["random"; 3]).unwrap().bits_eq(&of_grown));
    for text in ["keep", "keep+noise:1"] {
        let error = rows([text, "keep", "mean"]).unwrap_err();
        assert_eq!(error, Error::Init(InitError::NoRow { id: TokenId(3) }), "{text}");
    }
    assert!(rows(["copy:3", "keep", "mean"]).is_err());
}
