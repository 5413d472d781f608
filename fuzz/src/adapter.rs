//! An adapter directory: the config and the rows.

use std::sync::OnceLock;

use trainable_tokens_format::{Adapter, AdapterConfig, BaseCheck, Checkpoint, SafetensorsFile};

use crate::check_message;
use crate::config::check_round_trip;
use crate::input::{Mode, split_file};

const CONFIG: &str = "adapter_config.json";
const ROWS: &str = "adapter_model.safetensors";

/// The input is a mode, the length of a config in four bytes, the config, and the file of rows.
///
/// What is read is written and read again to the same bits, and checked against a base.
pub fn adapter(input: &[u8]) {
    let Some((mode, rest)) = Mode::split(input) else {
        return;
    };
    let (config, rows) = split_file(rest);
    let config = match AdapterConfig::from_json(config, CONFIG) {
        Ok(config) => config,
        Err(error) => return check_message(&error.to_string()),
    };
    let file = match SafetensorsFile::from_bytes(ROWS, mode.file(rows)) {
        Ok(file) => file,
        Err(error) => return check_message(&error.to_string()),
    };
    match Adapter::from_parts(config, &file) {
        Ok(adapter) => {
            check_use(&adapter);
            check_again(&adapter, &file);
            check_base(&adapter);
        }
        Err(error) => check_message(&error.to_string()),
    }
}

fn check_use(adapter: &Adapter) {
    for module in adapter.modules() {
        let ids = module.token_ids();
        assert_eq!(module.rows().num_rows(), ids.len());
        assert!(module.all_paths().all(|path| adapter.rows(path).is_some()));
        match module.token_set(1 << 10) {
            Ok(set) => assert_eq!(set.ids(), ids),
            Err(error) => check_message(&error.to_string()),
        }
        adapter.module_metadata(module.path());
    }
    if let Some((path, id, column)) = adapter.first_non_finite() {
        let module = adapter.module(path).expect("the module is there");
        assert!(module.token_ids().contains(&id) && column < module.rows().embedding_dim());
    }
    for name in adapter.extra_tensors() {
        adapter.extra_tensor(name).expect("its own name");
    }
}

/// The same directory comes back, bit for bit.
fn check_again(adapter: &Adapter, file: &SafetensorsFile) {
    check_round_trip(adapter.config());
    let bytes = adapter.to_safetensors().expect("what was read is written");
    let again = SafetensorsFile::from_bytes(ROWS, bytes.clone()).expect("what was written is safetensors");
    assert!(file.names().eq(again.names()));
    for name in file.names() {
        let (a, b) = (file.tensor(name), again.tensor(name));
        let (a, b) = (a.expect("a name of the file"), b.expect("a name of the file"));
        assert_eq!((a.dtype, a.shape, a.bytes), (b.dtype, b.shape, b.bytes), "{name}");
    }
    let again =
        Adapter::from_parts(adapter.config().clone(), &again).expect("what was written is an adapter");
    assert_eq!(adapter.metadata(), again.metadata());
    assert_eq!(adapter.modules().len(), again.modules().len());
    for (a, b) in adapter.modules().iter().zip(again.modules()) {
        assert_eq!((a.path(), a.tied_paths()), (b.path(), b.tied_paths()));
        assert!(a.rows().bits_eq(b.rows()));
    }
    assert_eq!(bytes, again.to_safetensors().expect("what was read is written"));
}

fn check_base(adapter: &Adapter) {
    let base = base();
    for check in [BaseCheck::Fits, BaseCheck::SameTable] {
        if let Err(error) = adapter.check_against(base, check) {
            check_message(&error.to_string());
        }
    }
    match adapter.replacements(base) {
        Ok(replacements) => {
            for replacement in replacements {
                assert!(base.contains(&replacement.tensor));
                assert_eq!(replacement.ids.len(), replacement.rows.num_rows());
            }
        }
        Err(error) => check_message(&error.to_string()),
    }
}

/// A small model with the names and the row lengths of the seeds.
pub(crate) fn base() -> &'static Checkpoint {
    static BASE: OnceLock<Checkpoint> = OnceLock::new();
    BASE.get_or_init(|| {
        let header = br#"{"emb.weight":{"dtype":"F32","shape":[20,6]},
            "model.embed_tokens.weight":{"dtype":"F32","shape":[112,32]},
            "lm_head.weight":{"dtype":"BF16","shape":[112,32]}}"#;
        let index =
            br#"{"weight_map":{"emb.weight":"a","model.embed_tokens.weight":"a","lm_head.weight":"a"}}"#;
        let (mode, _) = Mode::split(&[1]).expect("one byte");
        let base = Checkpoint::from_parts("base", index.to_vec(), |path| {
            SafetensorsFile::from_bytes(path, mode.file(header))
        });
        base.expect("the base is sound")
    })
}
