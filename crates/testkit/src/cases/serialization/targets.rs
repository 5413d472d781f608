//! Which modules an adapter is for.

use trainable_tokens_core::{DType, ErrorKind, TokenRows, TokenSet};
use trainable_tokens_format::{Adapter, TargetModules};

use super::{Files, HEAD, MODULE, adapter_of, framed, key, safetensors_of, unframed};
use crate::failure::{equal, refused, same};
use crate::world::{World, noise};
use crate::{Failure, Harness, Outcome};

/// Whether a list, a pattern or null targets a path.
fn targets(target: &TargetModules, path: &str) -> Result<bool, Failure> {
    let adapter = Adapter::builder(path, &TokenSet::new([2], 3)?, TokenRows::new(vec![1f32], 1, 1)?);
    let built = adapter.target_modules(target.clone()).build();
    if let Ok(adapter) = &built {
        equal(
            "the module",
            &Files::of(adapter)?.read()??.modules()[0].path(),
            &path,
        )?;
    }
    Ok(built.is_ok())
}

/// A list targets paths and their dotted ends; a string these, and what it matches as a regular expression from end
/// to end; null targets `embed_tokens`, or else the first module of the file.
pub fn a_module_is_targeted_as_the_config_says<H: Harness>() -> Outcome {
    let list = TargetModules::from(["emb", "dec.wte"]);
    let pattern = |text: &str| TargetModules::Pattern(text.to_owned());
    for (target, hits, misses) in [
        (
            list,
            &["emb", "a.emb", "dec.wte", "x.dec.wte"][..],
            &["pos_emb", "wte", "emb.x", "xdec.wte"][..],
        ),
        (
            pattern("dec.wte"),
            &["dec.wte", "decawte"],
            &["wte", "x.dec.wte", "x.decawte", "dec.wte.x"],
        ),
        (
            pattern(r".*\.emb|wte"),
            &["a.emb", "a.b.emb", "wte"],
            &["emb", "a.emb.x", "wte.a"],
        ),
        (pattern("(?!dec).*emb"), &["enc.emb", "emb"], &["dec.emb"]),
        (
            pattern(&format!("emb{}", "|x".repeat(2046))),
            &["emb", "x"],
            &["y"],
        ),
        (
            TargetModules::Default,
            &["embed_tokens", "model.embed_tokens", "wte"],
            &[],
        ),
    ] {
        for (paths, want) in [(hits, true), (misses, false)] {
            for path in paths {
                equal(
                    &format!("whether {target:?} targets {path}"),
                    &targets(&target, path)?,
                    &want,
                )?;
            }
        }
    }
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let files = Files::of(&adapter_of::<H>(&world.trained::<H>()?)?)?;
    let target = |text: &str| files.with_config(files.config.replace("[\n    \"embed_tokens\"\n  ]", text));
    for (text, path) in [
        ("null", MODULE),
        (r#""model.embed_tokens""#, MODULE),
        (r#"["lm_head"]"#, HEAD),
    ] {
        equal(text, &target(text).read()??.modules()[0].path(), &path)?;
    }
    for text in [
        "[]",
        r#"["embed_tokens", ""]"#,
        r#""(emb""#,
        r#""a)|(b""#,
        "[1]",
        "{}",
        "1",
    ] {
        refused(text, target(text).read()?, ErrorKind::File)?;
    }
    let long = format!("\"{}\"", "a".repeat(4097));
    refused("a pattern of 4097 bytes", target(&long).read()?, ErrorKind::File)?;
    for text in [r#"["wte"]"#, r#""wte""#, r#"["tokens"]"#] {
        refused("no target", target(text).read()?, ErrorKind::File)?;
    }
    // Without the usual name, null means the first module.
    let rows = noise(1, H::DTYPE, 2, 3);
    let (first, second) = (key("a.wte"), key("b.wte"));
    let rows = safetensors_of(&[(second.as_str(), &rows), (first.as_str(), &rows)])?;
    let files = target("null").with_rows(rows);
    let (header, data) = unframed(&files.rows)?;
    let adapter = files.read()??;
    equal("the first module", &adapter.modules()[0].path(), &"a.wte")?;
    equal(
        "its copies",
        &adapter.modules()[0].tied_paths(),
        &&["b.wte".to_owned()][..],
    )?;
    let renamed = header.replace("a.wte", "c.wte");
    let adapter = files.with_rows(framed(&renamed, data)).read()??;
    equal("the first module", &adapter.modules()[0].path(), &"b.wte")
}

/// What a reader would take for something else is not written: a path given twice, a module that is not targeted,
/// rows that are not those of the tokens.
pub fn what_would_be_read_otherwise_is_not_written<H: Harness>() -> Outcome {
    let world = World::fixed(7, 3, &[5, 2], &[]);
    let (set, rows) = (world.token_set()?, world.rows::<H>());
    let builder = || Adapter::builder(MODULE, &set, rows.clone());
    refused(
        "a copy for the module itself",
        builder().tied(MODULE).build(),
        ErrorKind::File,
    )?;
    refused(
        "a module twice",
        builder().module(MODULE, rows.clone()).build(),
        ErrorKind::File,
    )?;
    refused(
        "a copy twice",
        builder().tied(HEAD).tied(HEAD).build(),
        ErrorKind::File,
    )?;
    refused(
        "no target",
        builder().target_modules(["wte"]).build(),
        ErrorKind::File,
    )?;
    let half_targeted = builder()
        .module(HEAD, rows.clone())
        .target_modules(["embed_tokens"]);
    refused("a module without target", half_targeted.build(), ErrorKind::File)?;
    let more = noise(1, rows.dtype(), 3, 3);
    refused(
        "a row too many",
        Adapter::builder(MODULE, &set, more).build(),
        ErrorKind::Shape,
    )?;
    let adapter = builder().build()?;
    let elsewhere = adapter
        .config()
        .with_field("target_modules", &serde_json::json!(["wte"]))?;
    refused("another target", adapter.with_config(elsewhere), ErrorKind::File)?;

    // Targeted modules may differ in row length and type.
    let longer = noise(2, DType::F16, 2, 5);
    let adapter = builder().module("wte", longer.clone()).build()?;
    equal("embedding_dim", &adapter.metadata().embedding_dim, &None)?;
    let adapter = Files::of(&adapter)?.read()??;
    same(
        "rows",
        adapter.rows(MODULE).ok_or("no rows of the module")?,
        &rows,
    )?;
    same(
        "other rows",
        adapter.rows("wte").ok_or("no rows of the module")?,
        &longer,
    )
}
