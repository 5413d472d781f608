//! The adapter between two checkpoints gives the second again, bit for bit; what it cannot express is named.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use common::fixtures;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use trainable_tokens_core::{BackendError as _, EmbeddingSource as _, ErrorKind, TokenId};
use trainable_tokens_format::{
    Adapter, BaseCheck, Checkpoint, CheckpointDiff, Error, Extract, Merge, Overwrite, TensorDifference,
};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const NORM: &str = "model.norm.weight";

type Tensors = BTreeMap<&'static str, (Dtype, Vec<usize>, Vec<u8>)>;

fn write(dir: &Path, tied: bool, tensors: &Tensors) -> Checkpoint {
    fs::create_dir_all(dir).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": tied,
        "vocab_size": tensors[EMBEDDING].1[0],
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn assert_same_tensors(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>());
    for name in a.names() {
        let (a, b) = (a.tensor(name).unwrap(), b.tensor(name).unwrap());
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}");
        assert!(a.bytes == b.bytes, "{name}");
    }
}

/// A base, and bytes for some rows of the embedding and of the head, the last ones past the base's end.
#[derive(Debug)]
struct World {
    base: Tensors,
    tied: bool,
    /// By table: rows by id.
    rows: [BTreeMap<usize, Vec<u8>>; 2],
    vocab_size: usize,
}

impl World {
    /// The base with the rows, as any program might have written it.
    fn tuned(&self) -> Tensors {
        let mut tensors = self.base.clone();
        for (name, rows) in [EMBEDDING, HEAD].into_iter().zip(&self.rows) {
            if let Some((_, shape, bytes)) = tensors.get_mut(name) {
                let row_bytes = bytes.len() / shape[0];
                shape[0] = self.vocab_size;
                bytes.resize(row_bytes * self.vocab_size, 0);
                for (id, row) in rows {
                    bytes[id * row_bytes..][..row_bytes].copy_from_slice(row);
                }
            }
        }
        tensors
    }
}

fn worlds() -> impl Strategy<Value = World> {
    let dtype = prop::sample::select(vec![Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16]);
    let sizes = (2..40usize, 1..5usize, 0..4usize, dtype, any::<[bool; 2]>());
    let worlds = sizes.prop_flat_map(|(old, columns, more, dtype, [tied, copied])| {
        let row_bytes = columns * dtype.bitsize() / 8;
        // Any bits, NaNs among them.
        let table = move || vec(any::<u8>(), old * row_bytes);
        let ids = move || btree_set(0..old, 0..6);
        let row = move || vec(any::<u8>(), row_bytes);
        (table(), table(), ids(), ids(), vec(row(), 20)).prop_map(move |(embedding, head, a, b, rows)| {
            let shape = vec![old, columns];
            let mut base = Tensors::from([
                (EMBEDDING, (dtype, shape.clone(), embedding.clone())),
                (NORM, (Dtype::F32, vec![2], vec![7; 8])),
            ]);
            if !tied {
                base.insert(HEAD, (dtype, shape, head));
            } else if copied {
                base.insert(HEAD, (dtype, shape, embedding));
            }
            let vocab_size = old + more;
            let mut rows = rows.into_iter();
            let mut take = |ids: &BTreeSet<usize>| -> BTreeMap<usize, Vec<u8>> {
                let ids = ids.iter().copied().chain(old..vocab_size);
                ids.zip(rows.by_ref()).collect()
            };
            let embedding = take(&a);
            let head = if tied { embedding.clone() } else { take(&b) };
            World {
                base,
                tied,
                rows: [embedding, head],
                vocab_size,
            }
        })
    });
    worlds.prop_filter("something differs", |world| world.tuned() != world.base)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn merging_what_was_extracted_gives_the_tuned_tensors(world in worlds()) {
        let home = tempfile::tempdir().unwrap();
        let base = write(&home.path().join("base"), world.tied, &world.base);
        let tuned = write(&home.path().join("tuned"), world.tied, &world.tuned());
        let adapter = Extract::new(&base, &tuned).max_rows(1000).adapter().unwrap();
        let dir = home.path().join("adapter");
        adapter.write(&dir, Overwrite::Refuse).unwrap();
        let adapter = Adapter::read(&dir).unwrap();
        adapter.check_against(&base, BaseCheck::SameTable).unwrap();
        // The rows are those that differ, and no others.
        let old = world.base[EMBEDDING].1[0];
        let mut differ = BTreeSet::new();
        for (name, rows) in [EMBEDDING, HEAD].into_iter().zip(&world.rows) {
            if let Some((.., bytes)) = world.base.get(name) {
                let row_bytes = bytes.len() / old;
                differ.extend(rows.iter().filter_map(|(id, row)| {
                    let same = *id < old && bytes[id * row_bytes..][..row_bytes] == row[..];
                    (!same).then(|| u32::try_from(*id).unwrap())
                }));
            }
        }
        let expected: Vec<_> = differ.into_iter().collect();
        for module in adapter.modules() {
            prop_assert_eq!(module.token_indices(), &expected);
        }
        let out = home.path().join("out");
        let merge = Merge::new(&base).base_check(BaseCheck::SameTable);
        merge.with("extracted", &adapter).unwrap().write(&out, Overwrite::Refuse).unwrap();
        assert_same_tensors(&Checkpoint::open(&out).unwrap(), &tuned);
    }
}

/// The rows of an adapter come back from PEFT's own merge, all of which had changed.
#[test]
fn what_peft_merged_is_extracted_again() {
    for case in ["llama_tied", "llama_untied", "gemma2_tied", "qwen2_sharded"] {
        let open = |name: &str| Checkpoint::open(fixtures().join(case).join(name)).unwrap();
        let (base, merged) = (open("base"), open("merged"));
        let theirs = Adapter::read(fixtures().join(case).join("adapter")).unwrap();
        let ours = Extract::new(&base, &merged).adapter().unwrap();
        let [ours, theirs] = [&ours.modules()[0], &theirs.modules()[0]];
        assert_eq!(ours.path(), theirs.path(), "{case}");
        assert_eq!(ours.tied_paths(), theirs.tied_paths(), "{case}");
        let mut sorted = theirs.token_indices().to_vec();
        sorted.sort_unstable();
        assert_eq!(ours.token_indices(), sorted, "{case}");
        for (slot, id) in theirs.token_ids().iter().enumerate() {
            let at = sorted.binary_search(&id.0).unwrap();
            let row = theirs.rows().to_dtype(ours.rows().dtype());
            assert_eq!(
                format!("{:?}", row.row(slot)),
                format!("{:?}", ours.rows().row(at)),
                "{case}: {id}"
            );
        }
    }
}

/// Shards that a merge has linked are the same file; the one that it wrote is not.
#[test]
fn linked_shards_are_equal() {
    let home = tempfile::tempdir().unwrap();
    let case = fixtures().join("qwen2_sharded");
    let base = Checkpoint::open(case.join("base")).unwrap();
    // Beside the output, so that links can be made.
    let copy = home.path().join("base");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(base.dir()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let base = Checkpoint::open(&copy).unwrap();
    let out = home.path().join("out");
    let adapter = Adapter::read(case.join("adapter")).unwrap();
    let merge = Merge::new(&base).with("adapter", &adapter).unwrap();
    let report = merge.write(&out, Overwrite::Refuse).unwrap();
    assert!(report.shared.len() > 1);
    let diff = CheckpointDiff::between(&base, &Checkpoint::open(&out).unwrap()).unwrap();
    let tables: Vec<_> = diff.tables.iter().map(|table| table.tensor.clone()).collect();
    assert_eq!((tables, &diff.tensors[..]), (report.tensors, &[][..]));
    assert_same_tensors(&base, &Checkpoint::open(case.join("base")).unwrap());
}

fn small() -> Tensors {
    let table = |start: u8| {
        let values = (start..start + 20).flat_map(|value| f32::from(value).to_le_bytes());
        (Dtype::F32, vec![10, 2], values.collect::<Vec<_>>())
    };
    Tensors::from([
        (EMBEDDING, table(0)),
        (HEAD, table(100)),
        (NORM, (Dtype::F32, vec![2], vec![7; 8])),
    ])
}

/// Extracts from [`small`], changed; the error names `parts`.
fn refuse(tied: bool, change: impl FnOnce(&mut Tensors), parts: &[&str]) -> Error {
    let home = tempfile::tempdir().unwrap();
    let mut base = small();
    if tied {
        base.insert(HEAD, base[EMBEDDING].clone());
    }
    let mut tuned = base.clone();
    change(&mut tuned);
    let base = write(&home.path().join("base"), tied, &base);
    let tuned = write(&home.path().join("tuned"), tied, &tuned);
    let error = Extract::new(&base, &tuned).adapter().unwrap_err();
    let text = error.to_string();
    for part in parts.iter().chain(&["/tuned"]) {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    error
}

fn edit(tensors: &mut Tensors, name: &str, row: usize) {
    tensors.get_mut(name).unwrap().2[row * 8] ^= 1;
}

#[test]
fn what_no_adapter_can_express_is_named() {
    let nothing = refuse(false, |_| {}, &["same tensors"]);
    assert!(matches!(nothing, Error::NothingToExtract { .. }));
    let others = refuse(
        false,
        |tensors| {
            edit(tensors, EMBEDDING, 3);
            edit(tensors, NORM, 0);
            tensors.insert("extra", (Dtype::I32, vec![1], vec![0; 4]));
        },
        &["\"model.norm.weight\" (values)", "\"extra\" (only in the second)"],
    );
    assert!(matches!(others, Error::NotOnlyRows { tensors, .. } if tensors.len() == 2));
    refuse(
        false,
        |tensors| tensors.get_mut(EMBEDDING).unwrap().0 = Dtype::U32,
        &["\"model.embed_tokens.weight\" (element types F32 and U32)"],
    );
    refuse(
        false,
        |tensors| tensors.get_mut(EMBEDDING).unwrap().1 = vec![5, 4],
        &["shapes [10, 2] and [5, 4]"],
    );
    refuse(
        false,
        |tensors| {
            let (_, shape, bytes) = tensors.get_mut(EMBEDDING).unwrap();
            shape[0] = 9;
            bytes.truncate(72);
        },
        &["shapes [10, 2] and [9, 2]"],
    );
    // A vocabulary that grew in the embedding alone: no adapter of one set of tokens.
    let grown = refuse(
        false,
        |tensors| {
            let (_, shape, bytes) = tensors.get_mut(EMBEDDING).unwrap();
            shape[0] = 11;
            bytes.extend([1; 8]);
            edit(tensors, HEAD, 2);
        },
        &["model.embed_tokens.weight has 11 rows", "lm_head.weight has 10"],
    );
    assert_eq!(grown.kind(), ErrorKind::Shape);
    let all = refuse(
        false,
        |tensors| (0..6).for_each(|row| edit(tensors, EMBEDDING, row)),
        &["6 of the 10 rows of model.embed_tokens.weight", "limit of 5"],
    );
    assert!(matches!(
        all,
        Error::TooManyRows {
            rows: 6,
            limit: 5,
            ..
        }
    ));
    let copies = refuse(
        true,
        |tensors| edit(tensors, HEAD, 4),
        &["model.embed_tokens.weight", "lm_head.weight", "row 4"],
    );
    assert!(matches!(copies, Error::TiedCopies { row: 4, .. }));
}

/// Whether a copy of a tied table is saved is no difference, as long as it is a copy.
#[test]
fn a_tied_copy_may_be_saved_or_not() {
    let home = tempfile::tempdir().unwrap();
    let mut with = small();
    with.insert(HEAD, with[EMBEDDING].clone());
    let mut without = with.clone();
    without.remove(HEAD);
    edit(&mut without, EMBEDDING, 7);
    let (a, b) = (home.path().join("a"), home.path().join("b"));
    let (with, without) = (write(&a, true, &with), write(&b, true, &without));
    for (base, tuned) in [(&with, &without), (&without, &with)] {
        let adapter = Extract::new(base, tuned).adapter().unwrap();
        assert_eq!(adapter.modules()[0].token_indices(), [7]);
        assert_eq!(adapter.modules()[0].tied_paths(), ["lm_head"]);
    }
    let mut other = small();
    edit(&mut other, EMBEDDING, 7);
    let other = write(&home.path().join("c"), true, &other);
    let error = Extract::new(&without, &other).adapter().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"lm_head.weight\" (only in the second)"),
        "{error}"
    );
}

#[test]
fn checkpoints_are_compared_row_by_row() {
    let home = tempfile::tempdir().unwrap();
    let mut second = small();
    edit(&mut second, EMBEDDING, 0);
    edit(&mut second, EMBEDDING, 9);
    edit(&mut second, NORM, 0);
    let (_, shape, bytes) = second.get_mut(HEAD).unwrap();
    shape[0] = 8;
    bytes.truncate(64);
    let (a, b) = (home.path().join("a"), home.path().join("b"));
    let (a, b) = (write(&a, false, &small()), write(&b, false, &second));
    assert!(CheckpointDiff::between(&a, &a).unwrap().is_empty());
    let diff = CheckpointDiff::between(&a, &b).unwrap();
    let [head, embedding] = &diff.tables[..] else {
        panic!("{diff:?}");
    };
    assert_eq!((head.tensor.as_str(), &head.changed[..]), (HEAD, &[][..]));
    assert_eq!(head.removed().collect::<Vec<_>>(), [TokenId(8), TokenId(9)]);
    assert_eq!(head.added().count(), 0);
    assert_eq!(embedding.changed, [TokenId(0), TokenId(9)]);
    assert_eq!(diff.tensors.len(), 1);
    assert_eq!(diff.tensors[0].difference, TensorDifference::Values);
    let rows: Vec<_> = embedding.rows(&a, &b).unwrap().collect();
    // The last row is [18, 19]; its first number's lowest bit has flipped.
    let table = b.table(EMBEDDING).unwrap().read_rows(&[TokenId(9)]).unwrap();
    let moved = table.to_f64_vec()[0];
    assert!((moved - 18.0).abs() < 1e-5 && moved != 18.0);
    assert_eq!(rows[1].distance, (moved - 18.0).abs());
    assert_eq!(rows[1].norms[0], (18f64 * 18.0 + 19.0 * 19.0).sqrt());
    assert!((rows[1].cosine - 1.0).abs() < 1e-9 && !rows[1].is_same);
    // The first row was [0, 1].
    assert!(rows[0].distance > 0.0 && rows[0].cosine > 0.0);
    let back = CheckpointDiff::between(&b, &a).unwrap();
    assert_eq!(
        back.tables[0].added().collect::<Vec<_>>(),
        [TokenId(8), TokenId(9)]
    );
}
