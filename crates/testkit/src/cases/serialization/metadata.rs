//! What the header of the rows' file says beyond PEFT's format.

use trainable_tokens_core::ErrorKind;
use trainable_tokens_format::{Adapter, AdapterMetadata, Error, digest};

use super::{Files, MODULE, framed, key, unframed};
use crate::failure::{ensure, equal, refused};
use crate::world::World;
use crate::{Failure, Harness, Outcome};

/// Files of an adapter with all metadata.
fn files<H: Harness>() -> Result<(Files, String), Failure> {
    let world = World::fixed(300, 2, &[277, 5, 0], &[]);
    let layer = world.trained::<H>()?;
    let digest = digest(layer.source())?;
    let tokens = ["<a>\"\\", "é\u{7f}😀", "\u{8}\t\n\u{c}\r\u{1}\u{1f}"].map(String::from);
    let adapter = Adapter::builder(MODULE, layer.tokens(), layer.rows()?)
        .tokens(tokens.to_vec())
        .base(digest, H::DTYPE)
        .init("keep")
        .build()?;
    Ok((Files::of(&adapter)?, digest.to_string()))
}

/// The metadata of a file of rows, and what follows them.
fn split(header: &str) -> Result<(&str, &str), Failure> {
    let start = format!(",\"{}", key(MODULE));
    let at = header.find(&start).ok_or("the header has no rows")?;
    Ok(header.split_at(at))
}

/// The metadata have these keys, sorted, and these values; without any, the file is PEFT's. Keys that are not known
/// are kept.
pub fn metadata_are_written_as_specified<H: Harness>() -> Outcome {
    let (files, digest) = files::<H>()?;
    let (header, _) = unframed(&files.rows)?;
    let (dtype, release) = (H::DTYPE, env!("CARGO_PKG_VERSION"));
    let want = [
        r#"{"__metadata__":{"format":"pt","#.to_owned(),
        format!(r#""trainable_tokens.base_digest":"{digest}","#),
        format!(r#""trainable_tokens.base_dtype":"{dtype}","#),
        r#""trainable_tokens.embedding_dim":"2","#.to_owned(),
        r#""trainable_tokens.format_version":"1","#.to_owned(),
        r#""trainable_tokens.init":"keep","#.to_owned(),
        format!(r#""trainable_tokens.library_version":"{release}","#),
        r#""trainable_tokens.token_indices":"[277,5,0]","#.to_owned(),
        // Escaped once as JSON, and once more as a string of the header.
        r#""trainable_tokens.tokens":"[\"<a>\\\"\\\\\",\"é"#.to_owned(),
        "\u{7f}😀".to_owned(),
        r#"\",\"\\b\\t\\n\\f\\r\\u0001\\u001f\"]","#.to_owned(),
        r#""trainable_tokens.vocab_size":"300"}"#.to_owned(),
    ];
    equal("the metadata", &split(header)?.0, &want.concat().as_str())?;
    let adapter = files.read()??;
    equal("the file written again", &adapter.to_safetensors()?, &files.rows)?;

    let peft = Files::of(&adapter.with_metadata(AdapterMetadata::none())?)?;
    let (header, data) = unframed(&peft.rows)?;
    equal(
        "PEFT's metadata",
        &split(header)?.0,
        &r#"{"__metadata__":{"format":"pt"}"#,
    )?;
    equal(
        "metadata of PEFT's file",
        peft.read()??.metadata(),
        &AdapterMetadata::none(),
    )?;
    // Read, and as it is written again.
    for (metadata, again) in [
        (r#""format":"mlx""#, r#""format":"mlx""#),
        (
            r#""a\u0001\n":"\"\u000b""#,
            r#""a\u0001\n":"\"\u000b","format":"pt""#,
        ),
        ("", r#""format":"pt""#),
        (
            r#""format":"pt","trainable_tokens.new":"x""#,
            r#""format":"pt","trainable_tokens.format_version":"1","trainable_tokens.new":"x""#,
        ),
    ] {
        let changed = header.replace(r#""format":"pt""#, metadata);
        let adapter = peft.with_rows(framed(&changed, data)).read()??;
        let again = format!(r#"{{"__metadata__":{{{again}}}"#);
        let written = adapter.to_safetensors()?;
        equal("the metadata", &split(unframed(&written)?.0)?.0, &again.as_str())?;
    }
    let bare = header.replace(r#""__metadata__":{"format":"pt"},"#, "");
    let adapter = peft.with_rows(framed(&bare, data)).read()??;
    equal(
        "a file without metadata, written again",
        &adapter.to_safetensors()?,
        &peft.rows,
    )
}

/// Reads the adapter with a value of its metadata replaced.
fn with<H: Harness>(key: &str, value: &str) -> Result<Result<Adapter, Error>, Failure> {
    let (files, _) = files::<H>()?;
    let (header, data) = unframed(&files.rows)?;
    let (metadata, rest) = split(header)?;
    let text = metadata
        .strip_prefix(r#"{"__metadata__":"#)
        .ok_or("the header has no metadata")?;
    let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)?;
    map.insert(format!("trainable_tokens.{key}"), value.into());
    let metadata = serde_json::to_string(&map)?;
    let header = format!("{{\"__metadata__\":{metadata}{rest}");
    files.with_rows(framed(&header, data)).read()
}

/// A value that does not parse, and another version of the format, is refused by the name of its key.
pub fn metadata_must_parse<H: Harness>() -> Outcome {
    let digest = format!("sha256:{}", "0".repeat(64));
    for (key, values) in [
        ("format_version", &["", "0", "2", "1.0", " 1"][..]),
        (
            "vocab_size",
            &[
                "",
                "-1",
                "+300",
                "300.0",
                "3e2",
                " 300",
                "x",
                "18446744073709551616",
            ],
        ),
        ("embedding_dim", &["", "-2", "+2", "two"]),
        (
            "token_indices",
            &[
                "",
                "277,5,0",
                "[277,5,-1]",
                "[277,5,0.0]",
                "[277,5,\"0\"]",
                "{}",
                "[277,5,0",
            ],
        ),
        (
            "tokens",
            &["", "[1,2,3]", "\"abc\"", "[\"a\",\"b\",\"c\"", "[null,null,null]"],
        ),
        (
            "base_digest",
            &["", "sha256:", "md5:00", &digest[..70], &digest[7..]],
        ),
        ("base_dtype", &["", "f32", "float32", "I32", "F8_E4M3"]),
    ] {
        for value in values {
            let what = format!("{key} of {value:?}");
            let result = with::<H>(key, value)?;
            let message = result
                .as_ref()
                .map_or_else(ToString::to_string, |_| String::new());
            refused(&what, result, ErrorKind::File)?;
            let named = message.contains(&format!("trainable_tokens.{key}"));
            ensure!(named, "{what}: the error does not name the key: {message}");
        }
    }
    // Either case of a digest is read; lower case is written.
    let upper = with::<H>("base_digest", &digest.replace('0', "A"))??;
    let stored = upper.metadata().base_digest.map(|digest| digest.to_string());
    equal("the digest", &stored, &Some(digest.replace('0', "a")))
}

/// Metadata that contradict the config or the rows are refused, with both values.
pub fn metadata_must_agree<H: Harness>() -> Outcome {
    for (key, value) in [
        ("token_indices", "[5,277,0]"),
        ("token_indices", "[277,5]"),
        ("token_indices", "[]"),
        ("embedding_dim", "3"),
        ("tokens", "[\"a\",\"b\"]"),
        ("tokens", "[]"),
        ("vocab_size", "277"),
        ("vocab_size", "0"),
    ] {
        let result = with::<H>(key, value)?;
        ensure!(
            matches!(result, Err(Error::Metadata { .. })),
            "{key} of {value} gives {result:?}"
        );
        refused(key, result, ErrorKind::File)?;
    }
    for (key, value) in [
        ("vocab_size", "278"),
        ("token_indices", "[277, 5, 0]"),
        ("tokens", r#"["", "", ""]"#),
    ] {
        with::<H>(key, value)??;
    }
    // The ids of the config swapped, as an editor would.
    let (files, _) = files::<H>()?;
    let swapped = files.config.replace("277,\n    5", "5,\n    277");
    ensure!(swapped != files.config, "the case is wrong");
    refused("swapped ids", files.with_config(swapped).read()?, ErrorKind::File)
}
