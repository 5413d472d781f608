//! Several adapters, merging and state: F9 to F13 and F20.

use trainable_tokens::ndarray::{NdTable, TrainableTokens};
use trainable_tokens::{BackendError, EmbeddingSource};
use trainable_tokens::{Error, ErrorKind, MergeCheck, Overlap, TokenId, TokenRows, TokenSet, WriteRows};

use crate::layer::{bits, case, table};

type Layer = TrainableTokens<NdTable<ndarray::OwnedRepr<f32>>>;

/// PEFT's own case of three adapters over one table: `first` and `third` share token 28.
fn three_adapters() -> (Layer, std::collections::BTreeMap<String, TokenRows>) {
    let expected = case("multi_standalone");
    let mut layer = Layer::frozen(NdTable::new(table(&expected["base.weight"])).unwrap()).unwrap();
    for (name, tokens) in [
        ("first", &[3, 28, 9][..]),
        ("second", &[12, 0]),
        ("third", &[28, 5]),
    ] {
        let rows = crate::files::rows(&format!("multi_standalone/adapter/{name}"));
        let tokens = TokenSet::new(tokens.iter().copied(), 30).unwrap();
        layer.add_adapter_with_rows(name, tokens, &rows).unwrap();
    }
    (layer, expected)
}

fn ids(expected: &std::collections::BTreeMap<String, TokenRows>) -> Vec<u32> {
    crate::layer::ids(&expected["input_ids"])
}

/// PEFT drops `adapter_names` for standalone adapters: every example gets the active adapter's rows, in silence.
/// Here each example gets those that it names, with PEFT's own bits of the single runs.
#[test]
fn f09_mixed_batches_are_not_ignored() {
    let (layer, expected) = three_adapters();
    let ids = ids(&expected);
    let batch = [ids.clone(), ids.clone(), ids.clone()].concat();
    let got = layer
        .lookup_mixed(&batch, &[Some("second"), None, Some("first")])
        .unwrap();
    let want = ["embed.second", "embed.disabled", "embed.first"];
    let want: Vec<u8> = want
        .iter()
        .flat_map(|name| expected[*name].to_le_bytes())
        .collect();
    assert_eq!(bits(&got), want);
    // PEFT's answer was that of `first` for all of them.
    assert_ne!(
        bits(&got)[..want.len() / 3],
        expected["embed.first"].to_le_bytes()[..]
    );
}

/// LoRA's wrapper refuses a second active adapter ("Only one adapter can be set at a time"), even with disjoint tokens,
/// and nothing says what overlapping ones would mean. Here any disjoint ones are active together, and for overlapping
/// ones there is a choice.
#[test]
fn f10_several_adapters_are_active_at_once() {
    let (mut layer, expected) = three_adapters();
    let ids = ids(&expected);
    layer.activate(&["first", "second"]).unwrap();
    assert_eq!(
        bits(&layer.lookup(&ids).unwrap()),
        expected["embed.first+second"].to_le_bytes()
    );

    let error = layer.activate(&["first", "third"]).unwrap_err();
    let (first, second) = ("first".to_owned(), "third".to_owned());
    let token = TokenId(28);
    assert_eq!(error, Error::Overlap { token, first, second });
    assert_eq!(layer.active_names().collect::<Vec<_>>(), ["first", "second"]);

    let row = |layer: &Layer| layer.lookup(&[28]).unwrap().row(0).to_vec();
    let alone = ["first", "third"].map(|name| {
        layer.activate(&[name]).unwrap();
        row(&layer)
    });
    layer
        .activate_overlapping(&["first", "third"], Overlap::LastWins)
        .unwrap();
    assert_eq!(row(&layer), alone[1]);
    layer
        .activate_overlapping(&["first", "third"], Overlap::WeightedMean(vec![1.0, 3.0]))
        .unwrap();
    let mean: Vec<f32> = alone[0]
        .iter()
        .zip(&alone[1])
        .map(|(a, b)| 0.25 * a + 0.75 * b)
        .collect();
    assert_eq!(row(&layer), mean);
}

/// With standalone adapters on a tied model a second adapter breaks PEFT's forward on newer transformers. Here lookup
/// and tied head are one layer, whatever adapters it has.
#[test]
fn f11_a_tied_model_takes_a_second_adapter() {
    let (mut layer, expected) = three_adapters();
    layer.activate(&["second"]).unwrap();
    let hidden = table(&expected["base.weight"]);
    let before = layer.logits(hidden.clone()).unwrap();
    layer.activate(&["second", "third"]).unwrap();
    let after = layer.logits(hidden).unwrap();
    let changed: Vec<usize> = (0..30)
        .filter(|id| before.column(*id) != after.column(*id))
        .collect();
    assert_eq!(changed, [5, 28]);
    layer.lookup(&[5, 28, 12]).unwrap();
}

/// PEFT unmerges by writing back rows that it kept at construction (its commit 5d602fdbf: the adapter's own random ones),
/// so that a base that changed since is corrupted. Here a merge keeps what it overwrites, and merges are undone in order.
#[test]
fn f12_unmerging_restores_what_was_there() {
    let (layer, expected) = three_adapters();
    let tokens = TokenSet::new([3, 28, 9], 30).unwrap();
    let trained = layer.adapter("first").unwrap().rows().unwrap();
    let mut source = layer.into_source();
    let changed = TokenRows::new(vec![7.25f32; 6], 1, 6).unwrap();
    source.write_rows(&[TokenId(28)], &changed).unwrap();
    let mut layer = Layer::with_rows(source, tokens, &trained).unwrap();
    let rows = crate::files::rows("multi_standalone/adapter/second");
    layer
        .add_adapter_with_rows("second", TokenSet::new([12, 0], 30).unwrap(), &rows)
        .unwrap();
    layer.merge().unwrap();
    layer
        .merge_adapters(&["second"], &Overlap::Refuse, MergeCheck::Unchecked)
        .unwrap();
    layer.unmerge().unwrap();
    layer.unmerge().unwrap();
    let row = layer
        .source()
        .read_rows(&[TokenId(28), TokenId(12)])
        .unwrap()
        .to_f32_vec();
    assert_eq!(row[..6], [7.25; 6]);
    assert_eq!(row[6..], expected["base.weight"].to_f32_vec()[12 * 6..13 * 6]);
}

/// PEFT's `safe_merge` looks at the whole matrix: a NaN of an untrained row is "NaNs detected in the merged weights. The
/// adapter default seems to be broken". Here only the rows that are written count, and the error names the one.
#[test]
fn f13_a_safe_merge_checks_the_rows_it_writes() {
    let mut base = ndarray::Array2::<f32>::zeros((16, 4));
    base[[7, 2]] = f32::NAN;
    let tokens = TokenSet::new([15, 3], 16).unwrap();
    let mut layer = Layer::new(NdTable::new(base.clone()).unwrap(), tokens).unwrap();
    layer.merge_checked(MergeCheck::Finite).unwrap();
    layer.unmerge().unwrap();

    for (adapter, culprit) in [
        ("adapter_nan", true),
        ("adapter_inf", true),
        ("adapter_huge", false),
    ] {
        let rows = crate::files::rows(&format!("merge_nan_f32/{adapter}"));
        layer.set_rows(&rows).unwrap();
        let outcome = layer.merge_checked(MergeCheck::Finite);
        assert_eq!(outcome.is_err(), culprit, "{adapter}");
        if let Err(error) = outcome {
            assert_eq!(error.kind(), ErrorKind::NonFinite);
            let (row, column) = rows.first_non_finite().unwrap();
            let token = [15, 3][row];
            assert!(
                error
                    .to_string()
                    .contains(&format!("token id {token} at column {column}")),
                "{error}"
            );
            assert!(!layer.is_merged());
        } else {
            layer.unmerge().unwrap();
        }
    }
    assert_eq!(bits(&layer.source().view().to_owned()), bits(&base));
}

/// In PEFT `disable_adapter` while merged unmerges for good, `set_adapter` unmerges with a warning, and an active adapter
/// is ignored once another one is merged. Here no call changes what it does not say.
#[test]
fn f20_state_changes_only_by_the_calls_that_say_so() {
    let (mut layer, expected) = three_adapters();
    let ids = ids(&expected);
    layer.activate(&["first"]).unwrap();
    layer.merge().unwrap();
    assert_eq!(layer.disable().unwrap_err().kind(), ErrorKind::State);
    layer.activate(&["first", "second"]).unwrap();
    assert!(layer.is_merged() && layer.is_enabled());
    assert_eq!(
        bits(&layer.lookup(&ids).unwrap()),
        expected["embed.first+second"].to_le_bytes()
    );
    assert_eq!(
        bits(&layer.source().view().to_owned()),
        expected["merged.first"].to_le_bytes()
    );
    // PEFT deletes an active adapter, and another becomes active.
    assert_eq!(
        layer.delete_adapter("second").unwrap_err().kind(),
        ErrorKind::State
    );
    layer.unmerge().unwrap();
    layer.disable().unwrap();
    assert_eq!(
        bits(&layer.lookup(&ids).unwrap()),
        expected["embed.disabled"].to_le_bytes()
    );
    assert_eq!(layer.active_names().collect::<Vec<_>>(), ["first", "second"]);
}
