//! Properties over random rows, ids and damage.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use proptest::collection::{hash_set, vec};
use proptest::prelude::*;
use trainable_tokens_core::{DType, TokenRows, TokenSet};
use trainable_tokens_format::{Adapter, AdapterConfig, SafetensorsFile, TrainingState};

const VOCABULARY: usize = 1000;

fn dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F64, DType::F32, DType::F16, DType::BF16])
}

/// Ids and rows of any bits, NaNs too.
fn ids_and_rows() -> impl Strategy<Value = (Vec<u32>, TokenRows)> {
    (hash_set(0..1000u32, 0..12), 1..9usize, dtype()).prop_flat_map(|(ids, dim, dtype)| {
        let ids: Vec<u32> = ids.into_iter().collect();
        let bytes = vec(any::<u8>(), ids.len() * dim * dtype.size_in_bytes());
        bytes.prop_map(move |bytes| {
            let rows = TokenRows::from_le_bytes(dtype, ids.len(), dim, &bytes).unwrap();
            (ids.clone(), rows)
        })
    })
}

fn adapter(ids: &[u32], rows: &TokenRows) -> Adapter {
    let set = TokenSet::new(ids.iter().copied(), VOCABULARY).unwrap();
    let builder = Adapter::builder("model.embed_tokens", &set, rows.clone()).tied("lm_head");
    builder.build().unwrap()
}

fn read(config: &[u8], rows: Vec<u8>) -> trainable_tokens_format::Result<Adapter> {
    let config = AdapterConfig::from_json(config, "adapter_config.json")?;
    Adapter::from_parts(
        config,
        &SafetensorsFile::from_bytes("adapter_model.safetensors", rows)?,
    )
}

/// Damages bytes at random places and cuts the end off.
fn damage(mut bytes: Vec<u8>, flips: &[(prop::sample::Index, u8)], keep: f64) -> Vec<u8> {
    for (at, value) in flips {
        let at = at.index(bytes.len());
        bytes[at] ^= value;
    }
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss
    )]
    bytes.truncate((bytes.len() as f64 * keep).ceil() as usize);
    bytes
}

fn flips() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    vec((any::<prop::sample::Index>(), 1..=255u8), 0..4)
}

fn kept() -> impl Strategy<Value = f64> {
    prop_oneof![Just(1.0), 0.0..1.0]
}

proptest! {
    #[test]
    fn reading_undoes_writing((ids, rows) in ids_and_rows()) {
        let written = adapter(&ids, &rows);
        let back = read(written.config().to_json().as_bytes(), written.to_safetensors().unwrap()).unwrap();
        prop_assert_eq!(back.modules()[0].token_indices(), &ids);
        prop_assert!(back.modules()[0].rows().bits_eq(&rows));
        prop_assert_eq!(back.modules()[0].tied_paths(), ["lm_head"]);
        prop_assert_eq!(back.metadata(), written.metadata());
        prop_assert_eq!(back.to_safetensors().unwrap(), written.to_safetensors().unwrap());
    }

    #[test]
    fn damaged_files_never_panic(
        (ids, rows) in ids_and_rows(),
        in_config in flips(),
        in_rows in flips(),
        kept in (kept(), kept()),
    ) {
        let written = adapter(&ids, &rows);
        let config = damage(written.config().to_json().into_bytes(), &in_config, kept.0);
        let rows = damage(written.to_safetensors().unwrap(), &in_rows, kept.1);
        if let Err(error) = read(&config, rows.clone()) {
            prop_assert!(!error.to_string().contains('\n'), "{}", error);
        }
        if let Ok(file) = SafetensorsFile::from_bytes("x", rows) {
            let _ = TrainingState::from_file(&file);
            for name in file.names() {
                let _ = file.table(name).map(|table| table.digest());
            }
        }
    }

    #[test]
    fn any_json_survives_a_rewrite(text in "[\\x00-\\x7fé\u{1F600}]{0,12}", number in any::<f64>(), flag: bool) {
        let value = serde_json::json!({ text.clone(): [number, flag, {"x": text}, {}, []] });
        let config = AdapterConfig::new(&[1], &["emb"].into()).unwrap().with_field("other", &value).unwrap();
        let back = AdapterConfig::from_json(config.to_json().as_bytes(), "c.json").unwrap();
        prop_assert_eq!(back.field("other"), Some(value));
        prop_assert!(back.to_json().is_ascii());
        prop_assert_eq!(back, config);
    }

    #[test]
    fn any_bytes_are_a_value_or_an_error(bytes in vec(any::<u8>(), 0..64)) {
        let _ = AdapterConfig::from_json(&bytes, "c.json");
        let _ = SafetensorsFile::from_bytes("x", bytes);
    }
}
