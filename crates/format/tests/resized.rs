//! Models whose vocabulary has grown.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::fixtures;
use trainable_tokens_core::{
    BackendError as _, DType, EmbeddingSource, ErrorKind, HostTable, TokenId, TokenRows, TokenSet,
};
use trainable_tokens_format::{
    Adapter, AdapterConfig, BaseCheck, Checkpoint, ExtendedTable, SaveEmbeddingLayers, TokenIndices,
};

const EMBEDDING: &str = "model.embed_tokens";
const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head";

fn checkpoint(case: &str, dir: &str) -> Checkpoint {
    Checkpoint::open(fixtures().join(case).join(dir)).unwrap()
}

fn adapter(case: &str, dir: &str) -> Adapter {
    Adapter::read(fixtures().join(case).join(dir)).unwrap()
}

fn all_rows(table: &impl EmbeddingSource<Error = trainable_tokens_format::Error>) -> TokenRows {
    let ids = (0u32..).take(table.vocab_size()).map(TokenId);
    table.read_rows(&ids.collect::<Vec<_>>()).unwrap()
}

fn row(table: &impl EmbeddingSource<Error = trainable_tokens_format::Error>, id: u32) -> Vec<f32> {
    table.read_rows(&[TokenId(id)]).unwrap().to_f32_vec()
}

fn refused(adapter: &Adapter, base: &Checkpoint, kind: ErrorKind, parts: &[&str]) {
    for check in [BaseCheck::Fits, BaseCheck::SameTable] {
        let error = adapter.check_against(base, check).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        for part in parts {
            assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
        }
    }
}

#[test]
fn the_table_that_peft_stored_is_the_table() {
    for dir in ["adapter", "adapter_true"] {
        let adapter = adapter("resized_vocab_tied", dir);
        let (base, resized) = (
            checkpoint("resized_vocab_tied", "base"),
            checkpoint("resized_vocab_tied", "base_resized"),
        );
        for base in [&base, &resized] {
            adapter.check_against(base, BaseCheck::SameTable).unwrap();
            for path in [EMBEDDING, HEAD] {
                let table = adapter.table(path, base).unwrap();
                assert_eq!(table.vocab_size(), 113);
                assert!(all_rows(&table).bits_eq(&all_rows(&resized.table(TABLE).unwrap())));
            }
        }
    }
}

/// PEFT fails on a base that was not resized, unless the whole table is stored; the rows suffice if none is missing.
#[test]
fn f14_rows_extend_a_smaller_base() {
    let (base, resized) = (
        checkpoint("resized_vocab_tied", "base"),
        checkpoint("resized_vocab_tied", "base_resized"),
    );
    // Row 111 is neither in the base nor trained.
    let gap = adapter("resized_vocab_tied", "adapter_false");
    gap.check_against(&resized, BaseCheck::SameTable).unwrap();
    refused(
        &gap,
        &base,
        ErrorKind::TokenOutOfRange,
        &["token_indices[0] is 112", "110 rows", "none for token 111"],
    );
    // With it, in any order and beside other tokens, the table is that of the resized model but for the new rows.
    let set = TokenSet::new([112, 3, 110, 111], 113).unwrap();
    let values = (0..4 * 32).map(|at| f32::from(u8::try_from(at).unwrap()));
    let rows = TokenRows::new(values.collect(), 4, 32).unwrap();
    let whole = Adapter::builder(EMBEDDING, &set, rows.clone())
        .tied(HEAD)
        .build()
        .unwrap();
    let lora = AdapterConfig::lora(&TokenIndices::List(vec![112, 3, 110, 111])).unwrap();
    let lora = Adapter::builder(EMBEDDING, &set, rows.clone())
        .lora(lora)
        .build()
        .unwrap();
    for adapter in [whole, lora] {
        adapter.check_against(&base, BaseCheck::SameTable).unwrap();
        for path in [EMBEDDING, HEAD] {
            let table = adapter.table(path, &base).unwrap();
            assert_eq!((table.vocab_size(), table.added().num_rows()), (113, 3));
            for (id, slot) in [(110, 2), (111, 3), (112, 0)] {
                assert_eq!(row(&table, id), rows.to_f32_vec()[32 * slot..32 * (slot + 1)]);
            }
            assert_eq!(row(&table, 3), row(&base.table(TABLE).unwrap(), 3));
            assert!(table.row(TokenId(113)).is_none());
            assert_eq!(table.base().name(), TABLE);
        }
        assert_eq!(adapter.table(EMBEDDING, &resized).unwrap().added().num_rows(), 0);
    }
}

#[test]
fn an_id_past_the_end_is_a_new_token_only_where_someone_says_so() {
    let base = checkpoint("resized_vocab_tied", "base");
    let set = TokenSet::new([110, 3], 111).unwrap();
    let builder = Adapter::builder(EMBEDDING, &set, TokenRows::zeros(DType::F32, 2, 32)).without_metadata();
    let silent = builder.build().unwrap();
    let parts = &[
        "token_indices[0] is 110",
        "has 110 rows",
        "does not record a larger vocabulary",
    ];
    refused(&silent, &base, ErrorKind::TokenOutOfRange, parts);
    silent
        .clone()
        .with_vocab_size(111)
        .unwrap()
        .check_against(&base, BaseCheck::SameTable)
        .unwrap();
    let further = silent.clone().with_vocab_size(128).unwrap();
    refused(
        &further,
        &base,
        ErrorKind::TokenOutOfRange,
        &["trained on 128 rows", "none for tokens 111 to 127"],
    );
    assert!(silent.with_vocab_size(110).is_err());
}

/// PEFT loses the head of a resized model that is not tied: its logits are off by 2.9.
#[test]
fn f14_a_head_that_is_too_small_is_named() {
    let (base, resized) = (
        checkpoint("resized_vocab", "base"),
        checkpoint("resized_vocab", "base_resized"),
    );
    for dir in ["adapter", "adapter_true"] {
        let adapter = adapter("resized_vocab", dir);
        adapter.check_against(&resized, BaseCheck::SameTable).unwrap();
        let parts = &[
            "lm_head.weight has 110 rows",
            "grows to 113",
            "none for tokens 110 to 112",
        ];
        refused(&adapter, &base, ErrorKind::Shape, parts);
    }
    let gap = adapter("resized_vocab", "adapter_false");
    gap.check_against(&resized, BaseCheck::SameTable).unwrap();
    refused(&gap, &base, ErrorKind::TokenOutOfRange, &["none for token 111"]);
    // A head that is stored whole, or whose new rows train, is large enough.
    let stored = adapter("resized_vocab", "adapter_false");
    let module = &stored.modules()[0];
    let builder = Adapter::builder(EMBEDDING, &module.token_set(113).unwrap(), module.rows().clone())
        .embedding_layer(&resized.table(TABLE).unwrap())
        .unwrap();
    let stored = builder
        .clone()
        .head_layer(HEAD, &resized.table("lm_head.weight").unwrap())
        .unwrap();
    let stored = stored.build().unwrap();
    stored.check_against(&base, BaseCheck::SameTable).unwrap();
    let head = stored.table(HEAD, &base).unwrap();
    assert!(all_rows(&head).bits_eq(&all_rows(&resized.table("lm_head.weight").unwrap())));
    assert!(
        builder
            .build()
            .unwrap()
            .check_against(&base, BaseCheck::Fits)
            .is_err()
    );
    let set = TokenSet::new([110, 111], 112).unwrap();
    let rows = || TokenRows::zeros(DType::F32, 2, 32);
    let both = Adapter::builder(EMBEDDING, &set, rows())
        .module(HEAD, rows())
        .build()
        .unwrap();
    both.check_against(&base, BaseCheck::SameTable).unwrap();
    assert_eq!(both.table(HEAD, &base).unwrap().vocab_size(), 112);
}

#[test]
fn embedding_layers_are_written_as_by_peft() {
    for case in ["resized_vocab", "resized_vocab_tied"] {
        let resized = checkpoint(case, "base_resized").table(TABLE).unwrap();
        for (dir, save) in [
            ("adapter", SaveEmbeddingLayers::Auto),
            ("adapter_true", SaveEmbeddingLayers::Always),
            ("adapter_false", SaveEmbeddingLayers::Never),
        ] {
            let theirs = adapter(case, dir);
            let module = &theirs.modules()[0];
            let mut builder =
                Adapter::builder(EMBEDDING, &module.token_set(113).unwrap(), module.rows().clone());
            for tied in module.tied_paths() {
                builder = builder.tied(tied);
            }
            if save.decide(113, Some(110)) {
                builder = builder.embedding_layer(&resized).unwrap();
            }
            let ours = builder
                .without_metadata()
                .build()
                .unwrap()
                .to_safetensors()
                .unwrap();
            let file = fixtures().join(case).join(dir).join("adapter_model.safetensors");
            assert!(ours == fs::read(file).unwrap(), "{case}/{dir}");
        }
    }
    assert!(!SaveEmbeddingLayers::Auto.decide(110, Some(110)));
    assert!(!SaveEmbeddingLayers::Auto.decide(110, None));
    // With LoRA, PEFT wraps the table once more.
    let set = TokenSet::new([1], 113).unwrap();
    let lora = Adapter::builder(EMBEDDING, &set, TokenRows::zeros(DType::F32, 1, 32))
        .tied(HEAD)
        .lora(AdapterConfig::lora(&TokenIndices::List(vec![1])).unwrap())
        .embedding_layer(
            &checkpoint("resized_vocab_tied", "base_resized")
                .table(TABLE)
                .unwrap(),
        )
        .unwrap()
        .build()
        .unwrap();
    let names: Vec<_> = lora.extra_tensors().collect();
    assert_eq!(
        names,
        [
            "base_model.model.lm_head.token_adapter.base_layer.weight",
            "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
        ]
    );
    let base = checkpoint("resized_vocab_tied", "base");
    lora.check_against(&base, BaseCheck::SameTable).unwrap();
    assert_eq!(lora.table(HEAD, &base).unwrap().vocab_size(), 113);
}

#[test]
fn stored_tables_must_fit() {
    let base = checkpoint("resized_vocab_tied", "base");
    let set = TokenSet::new([1], 110).unwrap();
    let with = |shape: [usize; 2], value: u8| {
        Adapter::builder(EMBEDDING, &set, TokenRows::zeros(DType::F32, 1, 32))
            .tied(HEAD)
            .extra_tensor(
                "base_model.model.model.embed_tokens.base_layer.weight",
                safetensors::Dtype::F32,
                shape,
                vec![value; 4 * shape[0] * shape[1]],
            )
    };
    with([110, 32], 0)
        .build()
        .unwrap()
        .check_against(&base, BaseCheck::Fits)
        .unwrap();
    for shape in [[109, 32], [113, 31]] {
        let error = with(shape, 0)
            .build()
            .unwrap()
            .check_against(&base, BaseCheck::Fits)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Shape, "{error}");
    }
    let name = "base_model.model.lm_head.base_layer.weight";
    let differ =
        with([113, 32], 0).extra_tensor(name, safetensors::Dtype::F32, [113, 32], vec![1; 4 * 113 * 32]);
    let error = differ
        .build()
        .unwrap()
        .check_against(&base, BaseCheck::Fits)
        .unwrap_err();
    assert!(error.to_string().contains("copies of tied rows"), "{error}");
}

#[test]
fn added_rows_have_the_tables_type_and_length() {
    let table = Checkpoint::open(Path::new(&fixtures().join("standalone_bf16/base"))).unwrap();
    let table = table.table("emb.weight").unwrap();
    let (vocab_size, dim) = (table.vocab_size(), table.embedding_dim());
    let row = TokenRows::new(vec![1.001f32; dim], 1, dim).unwrap();
    let extended = ExtendedTable::new(table.clone(), &row).unwrap();
    assert_eq!(extended.dtype(), DType::BF16);
    let last = TokenId(u32::try_from(vocab_size).unwrap());
    assert!(
        extended
            .read_rows(&[last])
            .unwrap()
            .bits_eq(&row.to_dtype(DType::BF16))
    );
    assert!(ExtendedTable::new(table.clone(), &TokenRows::zeros(DType::F32, 1, dim + 1)).is_err());
    let plain = ExtendedTable::from(table.clone());
    assert!(all_rows(&plain).bits_eq(&all_rows(&table)));
    let past = TokenId(u32::try_from(vocab_size).unwrap() + 1);
    assert_eq!(
        extended.read_rows(&[past]).unwrap_err().kind(),
        ErrorKind::TokenOutOfRange
    );
}
