//! Files: F5, F8, F14 to F17 and F19.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use trainable_tokens::format::{
    Adapter, AdapterConfig, BaseCheck, Checkpoint, Error, ModelTables, Overwrite, SafetensorsFile,
    TokenIndices,
};
use trainable_tokens::{EmbeddingSource, TokenRows, TokenSet};

use crate::layer::fixtures;

/// The rows of an adapter of PEFT's.
pub(crate) fn rows(dir: &str) -> TokenRows {
    let adapter = Adapter::read(fixtures().join(dir)).unwrap();
    adapter.modules()[0].rows().clone()
}

/// An adapter of ours for the untied Llama, in a directory of its own.
fn written(dir: &Path) -> Adapter {
    let base = Checkpoint::open(fixtures().join("llama_untied/base")).unwrap();
    let table = base.table("model.embed_tokens.weight").unwrap();
    let tokens = TokenSet::new([277, 5, 90], table.vocab_size()).unwrap();
    let rows = TokenRows::new(vec![0.5f32; 3 * table.embedding_dim()], 3, table.embedding_dim()).unwrap();
    let adapter = Adapter::builder("model.embed_tokens", &tokens, rows)
        .tokens(vec!["<a>".to_owned(), "<b>".to_owned(), "<c>".to_owned()])
        .base(table.digest(), table.dtype())
        .build()
        .unwrap();
    adapter.write(dir, Overwrite::Refuse).unwrap();
    adapter
}

/// PEFT has the ids in the config alone: permuted, the rows change places in silence, and nothing ties the rows to a base.
/// Here the file of the rows holds ids, sizes, strings and the digest of the base table too, and they must agree.
#[test]
fn f05_ids_and_base_are_recorded_beside_the_rows() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("adapter");
    let adapter = written(&dir);
    let base = Checkpoint::open(fixtures().join("llama_untied/base")).unwrap();
    adapter.check_against(&base, BaseCheck::SameTable).unwrap();

    let config = dir.join("adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    let permuted = text.replace("277,\n    5,", "5,\n    277,");
    assert_ne!(text, permuted);
    fs::write(&config, permuted).unwrap();
    let error = Adapter::read(&dir).unwrap_err();
    assert!(matches!(error, Error::Metadata { .. }), "{error}");
    assert!(error.to_string().contains("[277, 5, 90]"), "{error}");

    // Another model of the same sizes is told apart by the digest.
    fs::write(&config, text).unwrap();
    let other = home.path().join("other");
    fs::create_dir(&other).unwrap();
    let weights = fs::read(fixtures().join("llama_untied/base/model.safetensors")).unwrap();
    let mut changed = weights.clone();
    let file = SafetensorsFile::from_bytes("model.safetensors", weights.clone()).unwrap();
    let row = file.tensor("model.embed_tokens.weight").unwrap().bytes;
    let at = weights.windows(16).position(|bytes| bytes == &row[..16]).unwrap();
    changed[at] ^= 1;
    fs::write(other.join("model.safetensors"), changed).unwrap();
    let other = Checkpoint::open(&other).unwrap();
    let adapter = Adapter::read(&dir).unwrap();
    adapter.check_against(&other, BaseCheck::Fits).unwrap();
    let error = adapter.check_against(&other, BaseCheck::SameTable).unwrap_err();
    assert!(
        error.to_string().contains("digest") || error.to_string().contains("table"),
        "{error}"
    );
}

/// With LoRA PEFT trains different tokens for the embedding and the head that is tied to it; merging writes both into the
/// one matrix, and the logits of its case change by 1.57 (36.9 in another run). Here a tied base and two sets do not fit.
#[test]
fn f08_a_tied_model_has_one_set_of_tokens() {
    let dir = fixtures().join("lora_dict_tied_different");
    let expected = crate::layer::case("lora_dict_tied_different");
    let pairs = expected["logits.merged"].to_f64_vec().into_iter();
    let pairs = pairs.zip(expected["logits.trained"].to_f64_vec());
    let change = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(
        (change - 1.57).abs() < 0.01,
        "PEFT's merge changed the logits by {change}"
    );

    let adapter = Adapter::read(dir.join("adapter")).unwrap();
    let base = Checkpoint::open(dir.join("base")).unwrap();
    let error = adapter.check_against(&base, BaseCheck::Fits).unwrap_err();
    assert!(matches!(error, Error::TiedTokens { .. }), "{error}");
    assert!(error.to_string().contains("lm_head"), "{error}");
}

/// A standalone adapter of a tied model holds the rows once per tied module, and if the copies disagree PEFT takes the last
/// one (`delta_loaded: other (+1)` in its case). Here copies that disagree are an error that names both and the row.
#[test]
fn f16_tied_copies_agree() {
    let home = tempfile::tempdir().unwrap();
    let adapter = Adapter::read(fixtures().join("llama_tied/adapter")).unwrap();
    let module = &adapter.modules()[0];
    assert_eq!(module.tied_paths(), ["lm_head"]);
    adapter
        .write(home.path().join("same"), Overwrite::Refuse)
        .unwrap();
    Adapter::read(home.path().join("same")).unwrap();

    let path = home.path().join("same/adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    // The last value of the last copy.
    let last = bytes.len() - 1;
    bytes[last] ^= 0x40;
    fs::write(&path, bytes).unwrap();
    let error = Adapter::read(home.path().join("same")).unwrap_err();
    let Error::TiedCopies { row, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*row, module.token_indices().len() - 1);
    assert!(
        error.to_string().contains("lm_head") && error.to_string().contains("embed_tokens"),
        "{error}"
    );
}

/// In PEFT a key that is missing or misspelt is a warning, and the base rows stay in place. Here it is an error that
/// names the key that was expected.
#[test]
fn f17_missing_rows_are_an_error() {
    for (case, expected) in [
        ("missing_key", "trainable_tokens_delta"),
        (
            "key_without_prefix",
            "base_model.model.emb.trainable_tokens_delta",
        ),
        ("no_tensors", "base_model.model.emb.trainable_tokens_delta"),
    ] {
        let error = Adapter::read(fixtures().join(format!("malformed/{case}/adapter"))).unwrap_err();
        assert!(error.to_string().contains(expected), "{case}: {error}");
    }
}

/// PEFT saves the whole table of a resized vocabulary, and for an untied model still loses the resized head; without the
/// table it cannot load the adapter on the model as it was ("index 112 is out of bounds"). Here k rows suffice: the new
/// rows follow on the base's last one, in the embedding and in the head that is tied to it; what is missing is named.
#[test]
fn f14_rows_extend_a_smaller_vocabulary() {
    let base = Checkpoint::open(fixtures().join("llama_tied/base")).unwrap();
    let table = base.table("model.embed_tokens.weight").unwrap();
    let (v, d) = (table.vocab_size(), table.embedding_dim());
    let id = |more: usize| u32::try_from(v + more).unwrap();
    let adapter = |ids: &[u32], vocab_size| {
        let tokens = TokenSet::new(ids.iter().copied(), vocab_size).unwrap();
        let rows = TokenRows::new(vec![0.25f32; ids.len() * d], ids.len(), d).unwrap();
        Adapter::builder("model.embed_tokens", &tokens, rows)
            .tied("lm_head")
            .build()
            .unwrap()
    };
    let grown = adapter(&[id(1), 5, id(0)], v + 2);
    assert!(
        grown.to_safetensors().unwrap().len() < 2048,
        "no table in the file"
    );
    grown.check_against(&base, BaseCheck::Fits).unwrap();
    assert_eq!(
        grown.table("model.embed_tokens", &base).unwrap().vocab_size(),
        v + 2
    );
    let error = adapter(&[id(2)], v + 3)
        .check_against(&base, BaseCheck::Fits)
        .unwrap_err();
    assert!(
        error.to_string().contains(&format!("tokens {v} to {}", v + 1)),
        "{error}"
    );

    // PEFT's own files, those with the whole table too, fit the base that was not resized if nothing is missing.
    let dir = fixtures().join("resized_vocab_tied");
    let base = Checkpoint::open(dir.join("base")).unwrap();
    let with_table = Adapter::read(dir.join("adapter_true")).unwrap();
    with_table.check_against(&base, BaseCheck::Fits).unwrap();
    let table = with_table.table("model.embed_tokens", &base).unwrap();
    assert_eq!(table.vocab_size(), 113);
    // A file with nothing but rows does not tell how large the vocabulary was: an id past the end may be a mistake.
    let rows_alone = Adapter::read(dir.join("adapter_false")).unwrap();
    rows_alone.check_against(&base, BaseCheck::Fits).unwrap_err();
    let told = rows_alone.with_vocab_size(113).unwrap();
    let error = told.check_against(&base, BaseCheck::Fits).unwrap_err();
    assert!(error.to_string().contains("token 111"), "{error}");
}

/// On the LoRA path PEFT compares ends of names, so that `emb` also wraps `pos_emb`. Here, as in PEFT's other
/// configs, an entry is a path or the end of one after a dot.
#[test]
fn f15_names_end_after_a_dot() {
    let model = ModelTables::named(["enc.emb", "enc.pos_emb", "pos_emb"]);
    let ids = BTreeMap::from([("emb".to_owned(), vec![1])]);
    for config in [
        AdapterConfig::lora(&TokenIndices::ByModule(ids)).unwrap(),
        AdapterConfig::new(&[1], &["emb"].into()).unwrap(),
    ] {
        let targets = model.targets(&config).unwrap();
        let paths: Vec<_> = targets.iter().map(|target| target.path.as_str()).collect();
        assert_eq!(paths, ["enc.emb"]);
    }
}

/// In PEFT any linear layer can be targeted by mistake: it wraps `q_proj` as a table and replaces rows of it. Here a target
/// must be a table by its shape and role; the head of its own, which is a linear layer too, is one.
#[test]
fn f19_a_target_is_a_table() {
    let base = Checkpoint::open(fixtures().join("llama_untied/base")).unwrap();
    let model = ModelTables::of(&base).unwrap();
    let targets = |names: &[&str]| model.targets(&AdapterConfig::new(&[1], &names.to_vec().into()).unwrap());
    for wrong in ["q_proj", "down_proj", "model.norm"] {
        let error = targets(&[wrong]).unwrap_err();
        assert!(matches!(error, Error::NotATable { .. }), "{wrong}: {error}");
        assert!(error.to_string().contains(wrong), "{wrong}: {error}");
    }
    assert_eq!(targets(&["embed_tokens", "lm_head"]).unwrap().len(), 2);
}
