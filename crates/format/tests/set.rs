//! Several adapters in one directory.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;

use common::{fixtures, tree};
use trainable_tokens_format::{Adapter, AdapterSet, Error, Overwrite};

fn adapter() -> Adapter {
    Adapter::read(fixtures().join("standalone_f32/adapter")).unwrap()
}

#[test]
fn the_directories_of_peft_are_written_again() {
    for (case, names) in [
        ("multi_standalone", &["default"][..]),
        ("multi_lora_mixed_batch", &["default"]),
        ("standalone_f32", &["default"]),
    ] {
        let dir = fixtures().join(case).join("adapter");
        let set = AdapterSet::read(&dir).unwrap();
        let found: Vec<_> = set.names().collect();
        assert!(
            !found.is_empty()
                && names
                    .iter()
                    .all(|name| case == "x" || found.contains(name) || found.len() > 1)
        );
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("set");
        set.write(&out, Overwrite::Refuse).unwrap();
        assert_eq!(tree(&out), tree(&dir), "{case}: {found:?}");
        // And once more over itself.
        AdapterSet::read(&out)
            .unwrap()
            .write(&out, Overwrite::Replace)
            .unwrap();
        assert_eq!(tree(&out), tree(&dir), "{case}");
    }
}

#[test]
fn only_default_stands_at_the_top() {
    let mut set = AdapterSet::new();
    set.insert("default", adapter()).unwrap();
    set.insert("deutsch", adapter()).unwrap();
    assert!(set.insert("deutsch", adapter()).unwrap().is_some());
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("set");
    set.write(&out, Overwrite::Refuse).unwrap();
    let files: Vec<_> = tree(&out)
        .into_iter()
        .map(|(path, _)| path.display().to_string())
        .collect();
    assert_eq!(
        files,
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "deutsch/adapter_config.json",
            "deutsch/adapter_model.safetensors"
        ]
    );
    fs::create_dir(out.join("other")).unwrap();
    let mut back = AdapterSet::read(&out).unwrap();
    assert_eq!(back.names().collect::<Vec<_>>(), ["default", "deutsch"]);
    assert_eq!(back.len(), 2);
    assert!(back.remove("default").is_some() && back.get("default").is_none());
    back.write(home.path().join("rest"), Overwrite::Refuse).unwrap();
    assert!(!home.path().join("rest/adapter_config.json").exists());
    // One without an adapter at the top is replaced too.
    back.write(home.path().join("rest"), Overwrite::Replace).unwrap();
    fs::rename(out.join("deutsch"), out.join("default")).unwrap();
    let error = AdapterSet::read(&out).unwrap_err();
    assert!(
        matches!(&error, Error::AdapterName { name, .. } if name == "default"),
        "{error}"
    );
}

#[test]
fn names_are_those_that_peft_can_have() {
    for bad in ["", ".", "..", "v1.0", "a/b", "a\\b", "../x", "a\nb", "a\0"] {
        let error = AdapterSet::new().insert(bad, adapter()).unwrap_err();
        assert!(
            matches!(&error, Error::AdapterName { name, .. } if name == bad),
            "{error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    for good in ["a", "trainable_tokens_", "é", "a b", "-", "default"] {
        AdapterSet::new().insert(good, adapter()).unwrap();
    }
    let home = tempfile::tempdir().unwrap();
    assert!(matches!(
        AdapterSet::read(home.path()),
        Err(Error::NotFound { .. })
    ));
    assert!(matches!(
        AdapterSet::read(home.path().join("absent")),
        Err(Error::NotFound { .. })
    ));
    assert!(
        AdapterSet::new()
            .write(home.path().join("x"), Overwrite::Refuse)
            .is_err()
    );
    assert!(!home.path().join("x").exists());
    adapter()
        .write(home.path().join("v1.0"), Overwrite::Refuse)
        .unwrap();
    assert!(matches!(
        AdapterSet::read(home.path()),
        Err(Error::AdapterName { .. })
    ));
}
